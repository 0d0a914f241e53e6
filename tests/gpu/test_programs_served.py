"""Programs that only a GPU runs: what is served compiled, under determinism, on streams, in more than 2³¹ elements."""

import importlib
import pkgutil

import pytest
import torch
from programs.compare import assert_as_near, assert_no_worse, cotangent, doubled, fresh, value_and_gradients
from programs.families import FAMILIES, FEW, SDPA, TRAINED, families
from programs.modes import deterministic

import tilebook
import tilebook.kernels

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def own_kernels():
    """Names of our GPU kernels."""
    import triton

    names = set()
    for module in pkgutil.walk_packages(tilebook.kernels.__path__, "tilebook.kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, triton.runtime.JITFunction):
                names.add(name)
    return names


def started(function):
    """Names of the kernels that a call starts, once it is warm."""
    for _ in range(5):
        function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return {event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA}


def step(function, inputs, start):
    def run():
        return torch.autograd.grad(function(*inputs), [x for x in inputs if x.requires_grad], start)

    return run


def _measured(name):
    """Inputs of a shape whose verdict ships for Hopper, and the call."""
    generator = torch.Generator("cuda").manual_seed(0)

    def rand(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()

    if name == "attention":  # long enough that the host does not bound it
        inputs = tuple(rand(8, 16, 2048, 128) for _ in range(3))
        return inputs, lambda *qkv: tilebook.attention(*qkv, causal=True), lambda *qkv: SDPA(*qkv, is_causal=True)
    if name == "mlp":
        inputs = rand(1568, 384), rand(1152, 384), rand(1152), rand(384, 1152), rand(384)
        return inputs, tilebook.mlp, FAMILIES["mlp"].plain
    return (rand(8192, 4096), rand(4096)), tilebook.rms_norm, FAMILIES["rms_norm"].plain


@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize("name", ["attention"])  # norms and MLPs are the compiler's to fuse
def test_a_compiled_call_starts_the_kernels_that_the_verdict_names(name, direction):
    inputs, function, _ = _measured(name)
    if direction == "forward":
        inputs = tuple(x.detach() for x in inputs)

    def program(called):
        if direction == "forward":
            return lambda: called(*inputs)
        return step(called, inputs, cotangent(function(*inputs)))

    ours = started(program(function)) & own_kernels()
    if not ours:
        pytest.skip("no kernel of ours serves this here")
    compiled = started(program(torch.compile(function, fullgraph=True)))
    assert compiled & own_kernels(), compiled


@pytest.mark.parametrize("name", ["attention", "mlp", "rms_norm"])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_training_step_gives_pytorchs_numbers(name, mode):
    inputs, function, plain = _measured(name)
    truth = value_and_gradients(plain, doubled(inputs))
    theirs = value_and_gradients(plain, fresh(inputs))
    compiled = torch.compile(function, mode=mode, fullgraph=True)
    leaves = fresh(inputs)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = [x.clone() for x in value_and_gradients(compiled, leaves)]
        assert_as_near(found, theirs, truth)


@families(*FEW, "decode")
def test_compiled_calls_with_cuda_graphs_give_pytorchs_numbers(family):
    family = FAMILIES[family]
    compiled = torch.compile(family.ours, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        inputs = family.leaves("cuda", seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        found = [x.clone() for x in value_and_gradients(compiled, fresh(inputs))]
        theirs = value_and_gradients(family.plain, fresh(inputs))
        assert_as_near(found, theirs, value_and_gradients(family.plain, doubled(inputs)), f"seed {seed}")


@pytest.mark.parametrize("seq", [1024, 2048, 4096])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("call", ["attention", "drop_in"])
def test_deterministic_algorithms_repeat_the_bits_of_long_sequences(seq, causal, call):
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = tuple(
        torch.randn(2, 8, seq, 128, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
        for _ in range(3)
    )

    def function(*qkv):
        if call == "attention":
            return tilebook.attention(*qkv, causal=causal)
        return tilebook.scaled_dot_product_attention(*qkv, is_causal=causal)

    run = step(function, inputs, torch.randn_like(inputs[0]))
    for _ in range(3):
        run()  # not deterministic: what is remembered of it must not serve the flag
    with deterministic():
        try:
            first = run()
        except RuntimeError as refused:
            assert "determinis" in str(refused)  # noqa: PT017
            return
        for _ in range(8):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@families(*TRAINED)
def test_calls_on_other_streams_wait_for_what_they_should(family):
    family = FAMILIES[family]
    inputs = family.leaves("cuda")
    theirs = value_and_gradients(family.plain, fresh(inputs))
    truth = value_and_gradients(family.plain, doubled(inputs))
    streams = [torch.cuda.Stream() for _ in range(3)]
    found = []
    for stream in streams * 2:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            later = tuple(
                (x * 1).detach().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs
            )
            found.append(value_and_gradients(family.ours, later))
        torch.cuda.current_stream().wait_stream(stream)
    for each in found:
        assert_as_near(each, theirs, truth)


@families(*TRAINED)
def test_nothing_waits_for_the_gpu(family):
    """PyTorch's debug mode raises wherever a program waits for the GPU."""
    family = FAMILIES[family]
    inputs = fresh(family.leaves("cuda"))
    start = cotangent(family.plain(*inputs))
    run = step(family.ours, inputs, start)
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _needs(gib):
    free, _ = torch.cuda.mem_get_info()
    if free < gib << 30:
        pytest.skip(f"less than {gib} GiB of GPU memory are free")


def test_norms_of_more_than_2_31_elements_are_right():
    _needs(28)
    rows, width = (1 << 31) // 8192 + 5, 8192
    x = torch.empty(rows, width, device="cuda", dtype=torch.bfloat16)
    x[:5].normal_()
    x[5:].copy_(x[0])
    x[-3:].normal_()
    weight = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    y = tilebook.rms_norm(x, weight)
    for part in (slice(0, 4), slice(-4, None)):
        assert_as_near(
            [y[part]],
            [FAMILIES["rms_norm"].plain(x[part], weight)],
            [FAMILIES["rms_norm"].plain(x[part].double(), weight.double())],
        )


@pytest.mark.parametrize("packed", [False, True])
def test_attention_of_more_than_2_31_elements_is_right(packed):
    _needs(40)
    heads, seq, width = 16, 64, 64
    batch = (1 << 31) // (heads * seq * width) + 3
    x = torch.empty(batch, seq, heads, width, device="cuda", dtype=torch.bfloat16)
    x[:3].normal_()
    x[3:].copy_(x[0])
    x[-2:].normal_()
    if packed:
        rows, ends = x.view(-1, heads, width), torch.arange(batch + 1, device="cuda", dtype=torch.int32) * seq
        o = tilebook.attention_varlen(rows, rows, rows, ends, ends, max_seqlen_q=seq, max_seqlen_k=seq).view(x.shape)
    else:
        o = tilebook.attention(*[x.transpose(1, 2)] * 3).transpose(1, 2)
    for part in (slice(0, 2), slice(-3, None)):
        qkv = [x[part].transpose(1, 2)] * 3
        assert_as_near([o[part].transpose(1, 2)], [SDPA(*qkv)], [SDPA(*(each.double() for each in qkv))])


def test_the_current_gpu_need_not_be_that_of_the_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    for name, family in FAMILIES.items():
        inputs = tuple(x.detach().to("cuda:1").requires_grad_(x.requires_grad) for x in family.leaves("cuda"))
        assert torch.cuda.current_device() == 0
        assert_no_worse(family.ours, family.plain, inputs, what=name)
        for i in range(len(inputs)):
            with pytest.raises((ValueError, RuntimeError)):
                family.ours(*(x.to("cuda:0") if i == j else x for j, x in enumerate(inputs)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@families()
def test_other_dtypes_give_pytorchs_numbers(family, dtype):
    if family == "linear_cross_entropy" and dtype == torch.float16:
        pytest.skip("PyTorch's own sum of smoothed losses is past fp16's range, and it is what serves")
    family = FAMILIES[family]
    assert_no_worse(family.ours, family.plain, family.leaves("cuda", dtype))


@families(*TRAINED)
def test_memory_is_given_back_after_steps(family):
    family = FAMILIES[family]
    inputs = fresh(family.leaves("cuda"))
    run = step(family.ours, inputs, cotangent(family.plain(*inputs)))
    for _ in range(5):
        run()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        run()
    assert torch.cuda.memory_allocated() <= before
