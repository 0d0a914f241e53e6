"""Attention under a bias that learns, answered without Python: by one node of autograd, with the bits of Python's."""

import gc
import itertools
import threading
import weakref

import pytest
import torch
from gate_samples import biased, masked, numbers
from learned_samples import BIASES, EFFICIENT, Kernels, heads, hidden, scores
from torch.utils.checkpoint import checkpoint


@pytest.fixture
def kernels():
    found = Kernels()
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in (("", found.forward), ("_backward", found.backward)):
        library.impl(f"_scaled_dot_product_efficient_attention{name}", kernel, "CPU")
    library.impl("_fused_sdp_choice", found.choice, "CPU", allow_override=True)
    yield found
    library._destroy()


@pytest.fixture
def both(gated, kernels):
    """What a step gives that is answered without Python: the bits of what Python makes of it, and the same calls."""

    def run(step):
        gated.known(step)
        calls = kernels.asked, kernels.loads, kernels.given
        for each in (*calls, kernels.wanted):
            each.clear()
        hit, found = gated.answered(step)
        assert hit
        mine = [list(each) for each in calls]
        assert len(mine[0]) == len(mine[1]) == 1
        gated.extension.gates_ask(True)
        hit, expected = gated.answered(step)
        gated.extension.gates_ask(False)
        assert not hit
        assert list(calls) == [2 * each for each in mine]
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        return found

    return run


def leaf(bias):
    """Its numbers, laid as they are, as a tensor that learns."""
    return bias.detach().requires_grad_()


@pytest.mark.parametrize("function", [biased, masked])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BIASES)
def test_values_and_gradients_are_right_and_pythons(both, kernels, name, dtype, function):
    bias = BIASES[name](dtype=dtype)
    given = [*heads(dtype=dtype), bias]
    do = numbers(3, 2, 4, 8, seed=9, dtype=dtype)

    def step():
        leaves = [leaf(x) for x in given]
        o = function(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    found = both(step)
    assert all(x.dtype == y.dtype and x.shape == y.shape for x, y in zip(found[1:], given, strict=True))
    right = [x.double().requires_grad_() for x in given]
    seen = right[3].to(dtype).double()  # as it is added to the scores
    blank = (bias == -torch.inf).all(-1, True).expand(3, 2, 4, 1)
    o = scores(*right[:2], seen.masked_fill(blank, 0.0), None).softmax(-1) @ right[2]
    expected = [o.masked_fill(blank, 0.0)]
    expected += torch.autograd.grad(expected[0], right, do.double())
    within = 1e-5 if dtype == torch.float32 else 3e-2
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y.detach(), rtol=within, atol=within)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
def test_only_gradients_that_are_wanted_are_made(both, kernels, needs, scale):
    given = heads()
    for asked in itertools.product((False, True), repeat=4):
        if not any(asked) or any(a and not n for a, n in zip(asked, (*needs, True), strict=True)):
            continue
        leaves = [x.requires_grad_(need) for x, need in zip(given, needs, strict=True)] + [leaf(numbers(1, 2, 4, 16))]

        def step(leaves=leaves, asked=asked):
            o = biased(*leaves, scale=scale)
            return torch.autograd.grad(o.square().sum(), [x for x, a in zip(leaves, asked, strict=True) if a])

        both(step)
        assert kernels.wanted[0] == list(asked)


def test_it_is_one_node_whose_gradient_goes_to_the_bias_itself(both, gated):
    given = [x.requires_grad_() for x in heads()]
    bias = torch.nn.Parameter(numbers(1, 2, 4, 16))

    def step():
        bias.grad = None
        o = biased(*given, bias)
        o.backward(numbers(*o.shape, seed=9))
        return bias.grad.clone()

    both(step)
    o = biased(*given, bias)
    assert "Learned" in o.grad_fn.name()
    assert [node.variable is x for (node, _), x in zip(o.grad_fn.next_functions, [*given, bias], strict=True)] == [
        True
    ] * 4


def test_a_bias_that_is_made_of_what_learns_has_its_gradients(both):
    """A table whose entries are looked up, as models with windows have; and its gradient where a hook looks."""
    table = numbers(31, 2).requires_grad_()
    at = torch.arange(4)[:, None] - torch.arange(16) + 15
    given, seen = heads(), []

    def step():
        seen.clear()
        bias = table[at].permute(2, 0, 1)[None]
        bias.register_hook(lambda x: seen.append(x.clone()))
        o = biased(*given, bias)
        o.register_hook(lambda x: x * 2)
        found = torch.autograd.grad(o, table, numbers(*o.shape, seed=9))
        assert seen[0].shape == (1, 2, 4, 16)
        return [*found, *seen]

    both(step)


GRADIENTS = {
    "not at a whole vector": lambda shape: numbers(193).as_strided(shape, (64, 32, 8, 1), 1),
    "one for all": lambda shape: torch.ones(()).expand(shape),
    "transposed": lambda shape: numbers(3, 4, 2, 8).transpose(1, 2),
    "with gaps": lambda shape: numbers(3, 2, 4, 10)[..., :8],
    "by columns": lambda shape: numbers(3, 2, 8, 4).mT,
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_that_lie_anyhow_are_copied_where_pythons_are(both, name):
    given = [*(x.requires_grad_() for x in heads()), numbers(1, 2, 4, 16).requires_grad_()]
    both(lambda: torch.autograd.grad(biased(*given), given, GRADIENTS[name]((3, 2, 4, 8))))


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_a_gradient_that_is_not_there_is_zeros(both):
    given = [*heads(), numbers(1, 2, 4, 16).requires_grad_()]
    (found,) = both(lambda: torch.autograd.grad(Nothing.apply(biased(*given)), given[3:], torch.ones(3, 2, 4, 8)))
    assert not found.any()


@pytest.mark.parametrize("of", [0, 3])
@pytest.mark.parametrize("kept", ["where it lies", "copied"])
@pytest.mark.parametrize("loss", [lambda o: o.square().sum(), lambda o: o.sum()], ids=["square", "sum"])
def test_gradients_of_gradients_are_refused_as_pythons_are(both, loss, kept, of):
    bias = numbers(1, 2, 4, 16) if kept == "where it lies" else numbers(1, 2, 4, 16).double()
    given = [*heads(), bias]
    given[of].requires_grad_()
    bias.requires_grad_()

    def step():
        first = torch.autograd.grad(loss(biased(*given)), given[of], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="is not implemented"):
            first.sum().backward()
        return first.detach()

    both(step)


@pytest.mark.parametrize("kept", [False, True])
def test_a_graph_is_gone_through_again_only_where_it_is_kept(both, kept):
    given = [*heads(), numbers(1, 2, 4, 16).requires_grad_()]

    def step():
        o = biased(*given).square().sum()
        found = torch.autograd.grad(o, given[3:], retain_graph=kept)
        if kept:
            return [*found, *torch.autograd.grad(o, given[3:])]
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(o, given[3:])
        return found

    both(step)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
@pytest.mark.parametrize("how", ["where it lies", "expanded", "copied"])
def test_what_changed_before_its_gradient_is_an_error_unless_it_was_copied(both, how, index):
    def step():
        bias = numbers(1, 2, 4, 16)
        given = [*heads(), (bias.double() if how == "copied" else bias).requires_grad_()]
        o = biased(*given[:3], given[3].expand(3, 2, 4, 16) if how == "expanded" else given[3])
        with torch.no_grad():
            given[index].add_(1)
        if how == "copied" and index == 3:
            return torch.autograd.grad(o, given[3], torch.ones(3, 2, 4, 8))
        with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
            torch.autograd.grad(o, given[3], torch.ones(3, 2, 4, 8))
        return o.detach()

    both(step)


def test_nothing_is_kept_once_the_result_is_gone(both, gated):
    bias = numbers(1, 2, 4, 16).requires_grad_()
    both(lambda: biased(*heads(), bias).detach())
    given = [x.clone() for x in heads()]
    o = biased(*given, bias)
    refs = [weakref.ref(x) for x in (*given, o)]
    del given
    gc.collect()
    assert all(ref() is not None for ref in refs)
    del o
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4


# What is not answered so


@pytest.mark.parametrize("chosen", [0, 1, 3, RuntimeError("no kernel")])
def test_what_other_kernels_are_to_run_is_looked_at(gated, kernels, chosen):
    given = [*heads(), numbers(1, 2, 4, 16).requires_grad_()]
    gated.known(biased, *given)
    kernels.chosen = chosen
    assert gated.looked_at(biased, *given)
    if isinstance(chosen, Exception):
        with pytest.raises(RuntimeError, match="no kernel"):
            biased(*given)
    kernels.chosen = EFFICIENT
    assert gated.answered(biased, *given)[0]


UNLIKE = {
    "no whole columns": lambda: (heads(24), numbers(1, 2, 4, 24), {}),
    "one column for all": lambda: (heads(), numbers(1, 2, 4, 1), {}),
    "columns that are one in memory": lambda: (heads(), numbers(1, 2, 4, 1).expand(1, 2, 4, 16), {}),
    "two axes": lambda: (heads(), numbers(4, 16), {}),
    "other head counts": lambda: ([x[:, : 1 + (i == 0)] for i, x in enumerate(heads())], numbers(1, 2, 4, 16), {}),
    "a causal mask": lambda: (heads(), numbers(1, 2, 4, 16), {"causal": True}),
    "a mask beside it": lambda: (heads(), numbers(1, 2, 4, 16), {"attn_mask": torch.ones(4, 16, dtype=torch.bool)}),
    "not at a whole vector": lambda: (heads(), numbers(129)[1:].view(1, 2, 4, 16), {}),
    "of another batch": lambda: (heads(), numbers(2, 2, 4, 16), {}),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_otherwise_is_looked_at(gated, kernels, name):
    given, bias, options = UNLIKE[name]()
    bias.requires_grad_()
    assert all(gated.looked_at(biased, *given, bias, **options) for _ in range(4))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
@pytest.mark.parametrize("expanded", [False, True])
def test_where_it_learns_nothing_now_it_is_pytorchs_own_call(gated, kernels, context, expanded):
    given, bias = heads(), hidden(numbers(1, 2, 4, 16)).requires_grad_()
    bias = bias[:, :1, :1].expand(3, 2, 4, 16) if expanded else bias
    assert bias.requires_grad
    gated.known(biased, *given, bias)
    kernels.loads.clear()
    with context():
        assert not gated.answered(biased, *given, bias)[0]
        gated.known(biased, *given, bias)
        hit, found = gated.answered(biased, *given, bias)
        expected = torch.nn.functional.scaled_dot_product_attention(*given, bias)
    assert hit
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not found.requires_grad
    assert not kernels.loads
    assert gated.answered(biased, *given, bias)[1].requires_grad
    assert len(kernels.loads) == 1


def test_calls_whose_bias_does_not_learn_are_of_another_kind(gated, kernels):
    given, bias = [x.requires_grad_() for x in heads()], numbers(1, 2, 4, 16)
    gated.known(biased, *given, bias.clone().requires_grad_())
    kernels.loads.clear()
    assert not gated.answered(biased, *given, bias)[0]
    gated.known(biased, *given, bias)
    assert gated.answered(biased, *given, bias)[0]
    assert not kernels.loads
    assert not gated.answered(biased, *[x.detach() for x in given], bias)[0]
    assert gated.answered(biased, *[x.detach() for x in given], bias.clone().requires_grad_())[0]


def test_under_autocast_a_bias_is_cast_and_what_else_would_be_is_looked_at(both, gated):
    bias = numbers(1, 2, 4, 16).requires_grad_()
    given = [x.requires_grad_() for x in heads(dtype=torch.bfloat16)]

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            o = biased(*given, bias)
        assert o.dtype == torch.bfloat16
        return torch.autograd.grad(o, [*given, bias], numbers(*o.shape, seed=9, dtype=torch.bfloat16))

    assert both(step)[3].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert all(gated.looked_at(biased, *heads(), bias) for _ in range(4))


def test_what_hooks_may_change_is_looked_at(gated, kernels):
    given = [*heads(), numbers(1, 2, 4, 16).requires_grad_()]
    gated.known(biased, *given)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert gated.looked_at(biased, *given)
    assert gated.answered(biased, *given)[0]


@pytest.mark.parametrize("how", ["kept", "recomputed", "with anomalies looked for"])
def test_a_layer_is_recomputed_and_looked_into(gated, kernels, how):
    given, do = [*heads(), hidden(numbers(1, 2, 4, 16, seed=3))], numbers(3, 2, 4, 8, seed=9)

    def attended(*leaves):
        return 2 * biased(*leaves)

    def step():
        leaves = [leaf(x) for x in given]
        with torch.autograd.set_detect_anomaly(how == "with anomalies looked for"):
            again = how == "recomputed"
            o = checkpoint(attended, *leaves, use_reentrant=True) if again else attended(*leaves)
            o.backward(do)
        return [o.detach(), *(x.grad for x in leaves)]

    for _ in range(5):
        found = step()
    gated.extension.gates_ask(True)
    expected = step()
    gated.extension.gates_ask(False)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(x.isfinite().all() for x in found)


def test_a_batch_of_gradients_is_each_of_them(both):
    """As `torch.autograd.functional.jacobian(vectorize=True)` asks for."""
    given, batch = (
        [*(x.requires_grad_() for x in heads()), numbers(1, 2, 4, 16).requires_grad_()],
        numbers(5, 3, 2, 4, 8),
    )
    found = both(lambda: torch.autograd.grad(biased(*given), given, batch, is_grads_batched=True))
    each = [torch.autograd.grad(biased(*given), given, dy) for dy in batch]
    torch.testing.assert_close(found, tuple(torch.stack(x) for x in zip(*each, strict=True)), rtol=0, atol=0)


def test_threads_have_each_its_own(gated, kernels):
    given, wrong = [*heads(), numbers(1, 2, 4, 16).requires_grad_()], []

    def step():
        return torch.autograd.grad(biased(*given), given[3:], numbers(3, 2, 4, 8, seed=9))[0]

    gated.known(step)
    expected = step()

    def work():
        for _ in range(50):
            if not torch.equal(step(), expected):
                wrong.append(True)

    gated.here._tell("counted")
    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong
    assert sum(calls for _, calls in gated.extension.gates_counted()) == 200
