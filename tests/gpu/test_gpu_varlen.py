"""Packed sequences on the GPU that is here: random packs, cross-talk, configs, graphs, and PyTorch's own kernel."""

import contextlib
import itertools
import random

import pytest
import torch

import tilebook
from tilebook import device as devices
from tilebook import dispatch, native
from tilebook.kernels.attention.form import form
from tilebook.kernels.varlen.ops import attention_varlen_bwd, attention_varlen_fwd
from tilebook.kernels.varlen.problem import ForwardProblem
from tilebook.launch import intercepted
from tilebook.tuner.judge.verify import Case, verify

pytestmark = pytest.mark.gpu

OPS = (attention_varlen_fwd, attention_varlen_bwd)
PROBLEMS = [
    "B16,H8,T4096,S1024,D64,causal",
    "B16,H8,T4096,S1024,D128",
    "B8,H8,Hkv2,T2048,Tk4096,S512,Sk2048,D128,causal",
    "B8,H4,T4096,Tk1024,S2048,Sk256,D64,causal",
    "B8,H4,T4096,S1024,D128,causal,window200x0",
    "B8,H4,T4096,S1024,D96,causal,softcap",
    "B8,H4,T2048,Tk4096,S512,Sk1024,D64,causal,top_left",
    "B256,H4,T4096,S64,D64,causal",
]


def _ends(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (100, 0)], ids=str)
@pytest.mark.parametrize("by", ["verdict", "ours"])
def test_pytorchs_own_function_is_ours_where_that_is_asked_for(window, by):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if not native.available():
        pytest.skip("the extension is not built")
    lengths = [700, 1, 64, 1300]
    ends, most = _ends(lengths), max(lengths)
    q, do = (_random(sum(lengths), 8, 64, seed=n) for n in (0, 1))
    k, v = (_random(sum(lengths), 4 if by == "ours" else 8, 64, seed=n) for n in (2, 3))
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def found():
        keys = [x.repeat_interleave(8 // x.shape[1], 1) for x in inputs[1:]]
        o = varlen.varlen_attn(inputs[0], *keys, ends, ends, most, most, window_size=window)
        return [o, *torch.autograd.grad(o, inputs, do)]

    def kernels():
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            found()
            torch.cuda.synchronize()
        return {each.key for each in profile.key_averages() if "attention" in each.key or "flash" in each.key}

    right, theirs = found(), kernels()
    with tilebook.enabled(), dispatch.use("triton") if by == "ours" else contextlib.nullcontext():
        for _ in range(4):
            for got, wanted in zip(found(), right, strict=True):
                assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
                torch.testing.assert_close(got, wanted, rtol=0.03, atol=0.03 * wanted.abs().max().item())
        ours = kernels()
    assert any(each.startswith("attention_fwd") for each in ours) == (by == "ours"), ours
    if by == "verdict" and not any(each.startswith("attention_") for each in ours):
        assert ours == theirs


def _random(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", dtype=dtype)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("text", PROBLEMS)
def test_default_and_random_configs_are_right_with_empty_sequences(text, op):
    problem, gpu, space = op.problem.parse(text, "bf16"), devices.current(), op.tunable.space
    cases = [Case.make(op, problem, "cuda", seed) for seed in (0, 1)]
    feasible = space.feasible(problem, gpu)
    descriptors = [config for config in feasible if config["DESCRIPTORS"]]
    source = random.Random(text)
    more = source.sample(descriptors, min(3, len(descriptors)))
    chosen = [space.default(problem, gpu), *source.sample(feasible, 3), *more]
    for config in chosen:
        try:
            verify(op.tunable, config, cases)
        except Exception as broken:
            if type(broken).__name__ != "OutOfResources" or config == chosen[0]:
                raise AssertionError(f"{config}: {broken}") from broken


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("text", PROBLEMS)
def test_flash_attention_2_of_pytorch_is_right_with_empty_sequences(text, op):
    problem, other = op.problem.parse(text, "bf16"), op.implementations["flash_attention_2"]
    if not other.can_run(problem, devices.current()):
        pytest.skip("PyTorch has no such kernel")
    verify(other, None, [Case.make(op, problem, "cuda", seed) for seed in (0, 1)])


def _with_gradients(function, do, *tensors):
    o = function(*tensors)
    return (o, *torch.autograd.grad(o, tensors, do.to(o.dtype)))


def _by_sequence(lengths_q, lengths_k, causal):
    """`F.scaled_dot_product_attention` of each sequence; causal is aligned at the bottom right.

    Its plainest path: cuDNN confuses gradients that differ in layout alone, and loads vectors of masks without looking.
    """

    def attend(q, k, v):
        parts = []
        for n_q, n_k, *each in zip(
            lengths_q, lengths_k, q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True
        ):
            mask = torch.ones(n_q, n_k, dtype=torch.bool, device="cuda").tril(n_k - n_q) if causal else None
            each = [x.transpose(0, 1)[None] for x in each]
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                o = torch.nn.functional.scaled_dot_product_attention(*each, attn_mask=mask, enable_gqa=True)
            parts.append(o[0].transpose(0, 1))
        return torch.cat(parts)

    return attend


# Where PyTorch's code composes attention it rounds scores to 16 bits, which its fused kernels do not.
@pytest.mark.parametrize(("implementation", "factor"), [("triton", 2), ("torch", 4)])
@pytest.mark.parametrize("seed", range(20))
def test_random_packs_err_at_most_a_few_times_as_much_as_pytorch(seed, implementation, factor):
    source = random.Random(seed)
    count, causal = source.randint(1, 24), source.random() < 0.6
    dtype, width = source.choice([torch.bfloat16, torch.float16]), source.choice([32, 64, 128])
    heads_kv, group = source.choice([(4, 1), (2, 4), (1, 8)])
    lengths_q = [int(2 ** source.uniform(0, 10.5)) for _ in range(count)]
    lengths_k = lengths_q if source.random() < 0.5 else [n + source.randint(0, 500) for n in lengths_q]
    query, key = (sum(lengths_q), heads_kv * group, width), (sum(lengths_k), heads_kv, width)
    do = _random(*query, dtype=dtype, seed=seed)
    inputs = [_random(*s, dtype=dtype, seed=seed + i).requires_grad_() for i, s in enumerate((query, key, key), 1)]

    def ours(q, k, v):
        return tilebook.attention_varlen(
            q, k, v, _ends(lengths_q), _ends(lengths_k), max_seqlen_q=max(lengths_q), max_seqlen_k=max(lengths_k),
            causal=causal,
        )  # fmt: skip

    plain = _by_sequence(lengths_q, lengths_k, causal)
    truth = _with_gradients(plain, do, *(x.detach().float().requires_grad_() for x in inputs))
    theirs = _with_gradients(plain, do, *inputs)
    with dispatch.use(implementation):
        found = _with_gradients(ours, do, *inputs)
    for name, right, other, got in zip(("o", "dq", "dk", "dv"), truth, theirs, found, strict=True):
        floor = torch.finfo(dtype).eps / 2 * right.abs().max().item()
        allowed = factor * (other.float() - right).abs().max().item() + floor
        wrong = (got.float() - right).abs().max().item()
        assert wrong <= allowed, name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("descriptors", [0, 1])
def test_nothing_of_a_neighbour_enters_a_sequence(descriptors, causal):
    lengths = [100, 777, 1, 0, 300, 64]
    problem = ForwardProblem.parse("B8,H4,T2048,S1024,D128" + ",causal" * causal, "bf16")
    total, gpu = sum(lengths) + 50, devices.current()
    if descriptors and gpu.capability < 90:
        pytest.skip("tensor descriptors need sm_90 or later")
    configs = [op.tunable.space.default(problem, gpu).replace(DESCRIPTORS=descriptors) for op in OPS]
    clean = [_random(total, 4, 128, seed=i) for i in range(4)]
    asked = form(right=0 if causal else -1, bottom_right=True)
    rest = _ends(lengths), _ends(lengths), 1024, 1024, asked, 128**-0.5

    def run(do, q, k, v):
        o, lse = attention_varlen_fwd.tunable(q, k, v, *rest, config=configs[0])
        return o, *attention_varlen_bwd.tunable(do, q, k, v, o, lse, *rest, config=configs[1])

    expected = run(*clean)
    assert all((x[sum(lengths) :] == 0).all() for x in expected)
    for b, bad in ((0, torch.nan), (1, torch.inf), (2, 1e30), (5, torch.nan)):
        part = slice(*rest[0][b : b + 2].tolist())
        dirty = [torch.full_like(x, bad) for x in clean]
        for x, whole in zip(dirty, clean, strict=True):
            x[part] = whole[part]
        assert all(torch.equal(got[part], right[part]) for got, right in zip(run(*dirty), expected, strict=True))


def test_repeated_calls_and_a_captured_graph_follow_the_lengths_on_the_gpu():
    """From the third call on a recorded plan runs; the numbers in cu_seqlens are read anew each time."""
    q, k, v, do = (_random(2048, 8, 128, seed=i) for i in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ends = _ends([500, 1000, 548])

    def call():
        o = tilebook.attention_varlen(*leaves, ends, ends, max_seqlen_q=2048, max_seqlen_k=2048, causal=True)
        return (o, *torch.autograd.grad(o, leaves, do))

    # The engine remembers the stream of what it ran: the default one cannot take part in a capture.
    stream = torch.cuda.Stream()
    packs = ([500, 1000, 548], [2048, 0, 0], [1, 2000, 3], [7, 8, 9], [600, 600, 600])
    expected = []
    torch.cuda.synchronize()
    for lengths in packs:
        with torch.cuda.stream(stream):
            ends.copy_(_ends(lengths))
            expected.append([x.detach().clone() for x in call()])
            with dispatch.use("torch"):
                for got, right in zip(expected[-1], call(), strict=True):
                    torch.testing.assert_close(got, right, rtol=3e-2, atol=3e-2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = call()
    for lengths, right in zip(packs, expected, strict=True):
        ends.copy_(_ends(lengths))
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(captured, right, strict=True))


def test_no_call_waits_for_the_gpu():
    q, k, v = (_random(1024, 4, 128, seed=i).requires_grad_() for i in range(3))
    ends = _ends([300, 724])
    lengths = {"max_seqlen_q": 724, "max_seqlen_k": 724}
    for _ in range(4):
        torch.cuda.set_sync_debug_mode("error")
        try:
            tilebook.attention_varlen(q, k, v, ends, ends, causal=True, **lengths).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("descriptors", [0, 1])
def test_one_binary_serves_every_pack(descriptors):
    """Numbers of tokens and sequences do not specialise; or each step of a training would compile anew."""
    problem = ForwardProblem.parse("B16,H16,T16384,S2048,D64,causal", "bf16")
    config = attention_varlen_fwd.tunable.space.default(problem, devices.current()).replace(DESCRIPTORS=descriptors)
    if descriptors and devices.current().capability < 90:
        pytest.skip("tensor descriptors need sm_90 or later")
    binaries = set()

    def compile_only(kernel, grid, args, meta):
        binaries.add(kernel.warmup(*args, grid=grid, **meta).hash)

    for total, count in ((1000, 1), (1001, 16), (16384, 33)):
        q = torch.empty(total, 16, 64, device="cuda", dtype=torch.bfloat16)
        ends = torch.zeros(count + 1, device="cuda", dtype=torch.int32)
        with intercepted(compile_only):
            attention_varlen_fwd.tunable(q, q, q, ends, ends, 2048, 2048, form(right=0, bottom_right=True), 0.1,
                                         config=config)  # fmt: skip
    assert len(binaries) == 1
