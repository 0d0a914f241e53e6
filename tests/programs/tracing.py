"""Programs that trace a call once and run it with other inputs: make_fx, symbolic_trace, jit.trace, export, compile."""

import io

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from programs.compare import assert_as_near, cotangent, doubled, fresh, value_and_gradients
from programs.families import BLOCKS, FAMILIES, FEW, FEW_NODES, TRAINED, families


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


class Qkv(torch.nn.Module):
    """Named inputs, as tracers that read signatures want them."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, q, k, v):
        return self.function(q, k, v)


def other(family, device):
    """Inputs of the same shapes with other numbers in the first ones."""
    inputs = family.leaves(device)
    return tuple(-1.5 * x.detach().flip(0) if i < max(1, family.trained) else x for i, x in enumerate(inputs))


def agree(got, family, inputs):
    """A value, or a value and gradients, of these inputs."""
    with torch.set_grad_enabled(len(got) > 1):
        asked = tuple(x.detach().requires_grad_(len(got) > 1 and i < family.trained) for i, x in enumerate(inputs))
        truth = value_and_gradients(family.plain, doubled(asked))
        theirs = value_and_gradients(family.plain, asked)
    assert_as_near([x.detach() for x in got], theirs, truth)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@families()
def test_make_fx_follows_its_inputs(device, family, mode):
    family = FAMILIES[family]
    first = tuple(x.detach() for x in family.leaves(device))
    graph = make_fx(lambda *inputs: family.ours(*inputs), tracing_mode=mode)(*first)
    agree([graph(*first)], family, first)
    agree([graph(*other(family, device))], family, other(family, device))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@families(*TRAINED)
def test_make_fx_over_a_gradient_follows_its_inputs(device, family, mode):
    family = FAMILIES[family]

    def step(*inputs):
        leaves = tuple(x.detach().requires_grad_(i < family.trained) for i, x in enumerate(inputs))
        o = family.ours(*leaves)
        return o.detach(), *torch.autograd.grad(o, leaves[: family.trained], torch.ones_like(o))

    def plain_step(*inputs):
        leaves = tuple(x.detach().requires_grad_(i < family.trained) for i, x in enumerate(inputs))
        o = family.plain(*leaves)
        return o.detach(), *torch.autograd.grad(o, leaves[: family.trained], torch.ones_like(o))

    first = tuple(x.detach() for x in family.leaves(device))
    graph = make_fx(step, tracing_mode=mode)(*first)
    inputs = other(family, device)
    truth = plain_step(*(x.double() if x.is_floating_point() else x for x in inputs))
    assert_as_near(graph(*inputs), plain_step(*inputs), truth)


@families("attention", "drop_in", "decode", "mlp", "rms_norm", "softcap")
def test_symbolic_trace_records_one_node(device, family):
    """As for PyTorch's function: what holds of one call, on whatever tensors, is not looked into."""
    family = FAMILIES[family]
    inputs = tuple(x.detach() for x in family.leaves(device))
    names = ", ".join(f"x{i}" for i in range(len(inputs)))
    scope = {"function": family.ours}
    exec(f"def forward({names}): return function({names})", scope)
    graph = torch.fx.symbolic_trace(scope["forward"])
    calls = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    assert len(calls) == 1, [str(node) for node in calls]
    assert calls[0].op == "call_function"
    agree([graph(*other(family, device))], family, other(family, device))


@pytest.mark.filterwarnings("ignore")
@families()
def test_jit_trace_follows_its_inputs(device, family):
    family = FAMILIES[family]
    first = tuple(x.detach() for x in family.leaves(device))
    with torch.no_grad():
        traced = torch.jit.trace(Call(family.ours), first, check_trace=False)
        agree([traced(*first)], family, first)
        agree([traced(*other(family, device))], family, other(family, device))


@pytest.mark.filterwarnings("ignore")
@families("drop_in", "attention", "causal")
def test_jit_trace_takes_other_lengths_as_pytorchs_does(device, family):
    family = FAMILIES[family]
    first = tuple(x.detach() for x in family.leaves(device))
    shorter = tuple(x[:1, :, :-5] for x in first)
    with torch.no_grad():
        traced = torch.jit.trace(Qkv(family.ours), first, check_trace=False)
        agree([traced(*shorter)], family, shorter)


@pytest.mark.filterwarnings("ignore")
@families(*TRAINED)
def test_jit_trace_has_gradients(device, family):
    family = FAMILIES[family]
    first = family.leaves(device)
    traced = torch.jit.trace(Call(family.ours), first, check_trace=False)
    agree(value_and_gradients(traced, fresh(first)), family, first)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("strict", [False, True])
@families("attention", "drop_in", "drop_in_mask", "softcap", "decode", "varlen", "mlp", "rms_norm")
def test_an_exported_program_follows_its_inputs(device, family, strict):
    family = FAMILIES[family]
    first = tuple(x.detach() for x in family.leaves(device))
    program = torch.export.export(Call(family.ours), first, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for each in (program, torch.export.load(file)):
        agree([each.module()(*other(family, device))], family, other(family, device))


@families("drop_in", "attention", "causal")
def test_a_program_exported_for_any_length_takes_any_length(device, family):
    family = FAMILIES[family]
    first = tuple(x.detach() for x in family.leaves(device))
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Qkv(family.ours), first, dynamic_shapes=[{2: length}] * 3)
    shorter = tuple(x[:, :, :-5] for x in first)
    agree([program.module()(*shorter)], family, shorter)


@families(*TRAINED)
def test_a_program_exported_for_training_has_gradients(device, family):
    family = FAMILIES[family]
    first = family.leaves(device)
    program = torch.export.export(Call(family.ours), tuple(x.detach() for x in first))
    agree(value_and_gradients(program.module(), fresh(first)), family, first)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("family", "backend"), [(name, "aot_eager") for name in FAMILIES] + [(name, "eager") for name in FEW]
)
def test_a_compiled_call_gives_pytorchs_numbers_without_a_graph_break(device, family, backend):
    family = FAMILIES[family]
    compiled = torch.compile(family.ours, backend=backend, fullgraph=True)
    for inputs in (family.leaves(device), family.leaves(device, seed=1)):
        agree(value_and_gradients(compiled, fresh(inputs)), family, inputs)
        with torch.no_grad():
            agree([compiled(*inputs)], family, inputs)


@pytest.mark.sampled(8)
@families(*FEW, "decode")
def test_inductor_gives_pytorchs_numbers(device, family):
    family = FAMILIES[family]
    compiled = torch.compile(lambda *inputs: family.ours(*inputs) * 2, fullgraph=True)
    inputs = family.leaves(device)
    truth = value_and_gradients(lambda *x: family.plain(*x) * 2, doubled(inputs))
    theirs = value_and_gradients(lambda *x: family.plain(*x) * 2, fresh(inputs))
    for _ in range(2):
        assert_as_near(value_and_gradients(compiled, fresh(inputs)), theirs, truth)


def _graphs(function, inputs_of, lengths, **options):
    """How many graphs a compiled function needs for inputs of these lengths."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, **options)
    results = [value_and_gradients(compiled, inputs_of(n)) for n in lengths]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"], results


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("family", "dynamic"),
    [(name, None) for name in (*FEW, "attention", "causal")] + [(name, True) for name in FEW if name != "softcap"],
)
def test_twenty_lengths_compile_no_more_graphs_than_pytorchs(device, family, dynamic):
    family = FAMILIES[family]
    whole = family.leaves(device)
    axis = 0 if family.name == "varlen" else 1 if family.name in BLOCKS else 2
    cut = 1 if family.name in BLOCKS else 3
    size = whole[0].shape[axis]

    def inputs_of(n):
        xs = (x.detach().narrow(axis, 0, n).clone() if i < cut else x.detach() for i, x in enumerate(whole))
        if family.name == "varlen":  # the sequence in front is all there is
            q, k, v, _, _ = xs
            ends = torch.tensor([0, n], dtype=torch.int32, device=device)
            return tuple(x.requires_grad_() for x in (q, k, v)), ends
        return tuple(x.requires_grad_(i < family.trained) for i, x in enumerate(xs))

    lengths = [size - i for i in range(20)]
    if family.name == "varlen":
        import tilebook

        def ours(q, k, v, ends):
            return tilebook.attention_varlen(q, k, v, ends, ends, max_seqlen_q=len(q), max_seqlen_k=len(q))

        def plain(q, k, v, ends):
            return FAMILIES["attention"].plain(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)

        def flat(n):
            tensors, ends = inputs_of(n)
            return *tensors, ends
    else:
        ours, plain, flat = family.ours, family.plain, inputs_of
    try:
        allowed, expected = _graphs(plain, flat, lengths, dynamic=dynamic)
    except RuntimeError as refused:
        pytest.skip(f"PyTorch itself does not compile this: {str(refused)[:80]}")
    needed, results = _graphs(ours, flat, lengths, dynamic=dynamic)
    assert needed <= allowed
    for n, got, theirs in zip(lengths, results, expected, strict=True):
        assert_as_near(got, theirs, value_and_gradients(plain, doubled(flat(n))), f"length {n}")


@pytest.mark.sampled(6)
@families(*FEW_NODES)
def test_compiled_autograd_over_an_eager_forward_gives_pytorchs_gradients(device, family, recwarn):
    family = FAMILIES[family]
    inputs = fresh(family.leaves(device))
    for _ in range(2):
        o = family.ours(*inputs)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            gradients = torch.autograd.grad(o, inputs[: family.trained], cotangent(o))
        agree([o, *gradients], family, inputs)
    assert not [str(w.message) for w in recwarn if "tilebook" in str(w.message)]


def test_compiling_a_module_that_calls_every_function_gives_pytorchs_numbers(device):
    from programs.transforms import blocks

    ours, plain = blocks(device)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 24, 32, device=device)
    for length in (24, 24, 17, 9):
        got, right = compiled(x[:, :length]), plain(x[:, :length])
        torch.testing.assert_close(got, right, rtol=1e-2, atol=2e-3)
        got.square().mean().backward()
        right.square().mean().backward()
    expected = dict(plain.named_parameters())
    for name, p in ours.named_parameters():
        right = expected[name].grad
        torch.testing.assert_close(p.grad, right, rtol=2e-2, atol=2e-3 * right.abs().max().item() + 1e-6)


@families("drop_in", "mlp", "rms_norm")
def test_a_call_compiled_under_autocast_gives_pytorchs_dtype(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device, torch.float32)

    def under(function):
        def run(*inputs):
            with torch.autocast(device, torch.bfloat16):
                return function(*inputs)

        return run

    compiled = torch.compile(under(family.ours), backend="aot_eager", fullgraph=True)
    got = value_and_gradients(compiled, fresh(inputs))
    eager = value_and_gradients(under(family.ours), fresh(inputs))
    assert [x.dtype for x in got] == [x.dtype for x in eager]
    for a, b in zip(got, eager, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.02 * b.float().abs().max().item())
