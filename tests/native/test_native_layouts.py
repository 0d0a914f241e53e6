"""Tensors that are laid out for what comes next: masks of attention, gradients that are put together."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tilebook.native import resolve_anew

B, H, S, T, D = 2, 3, 8, 16, 4


def _heads(seed, length):
    drawn = torch.randn(B, H, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.requires_grad_()


def _attention(mask, **options):
    q, k, v = _heads(0, S), _heads(1, T), _heads(2, T)
    o = F.scaled_dot_product_attention(q, k, v, mask, **options)
    return o, *torch.autograd.grad((o * o.detach().sin()).sum(), (q, k, v))


def _written_out(mask):
    q, k, v = _heads(0, S), _heads(1, T), _heads(2, T)
    scores = q @ k.mT * D**-0.5
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).nan_to_num(0.0)
    o = weights @ v
    return o, *(each.nan_to_num(0.0) for each in torch.autograd.grad((o * o.detach().sin()).sum(), (q, k, v)))


def _rows(*lead):
    """Whole rows, of which the third sees nothing."""
    return (torch.arange(S) != 2).view(*[1] * len(lead), S, 1).expand(*lead, S, T)


MASKS = {
    "no keys are masked": lambda: torch.ones(1, 1, S, 1, dtype=torch.bool).expand(B, 1, S, T),
    "rows without keys": lambda: _rows(B, H),
    "two axes": lambda: _rows(),
    "a row for all": lambda: torch.ones(1, 1, dtype=torch.bool).expand(S, T),
    "transposed": lambda: (torch.randn(T, S, generator=torch.Generator().manual_seed(3)) > -0.5).T.expand(B, 1, S, T),
    "a bias for rows": lambda: torch.linspace(-1, 1, S, dtype=torch.float64)[:, None].expand(S, T),
    "a transposed bias": lambda: torch.randn(B, H, T, S, generator=torch.Generator().manual_seed(3)).double().mT,
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_any_strides_mean_the_same(it, name):
    mask = MASKS[name]()
    assert mask.stride(-1) != 1
    if mask.dtype == torch.bool and not mask.any(-1).all():
        wanted = _written_out(mask)
        found = _attention(mask)
        assert (found[0][..., 2, :] == 0).all()
    else:
        found, wanted = _attention(mask), _written_out(mask)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


class Seen(TorchDispatchMode):
    """Notes the masks that PyTorch's attention gets."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in func.name():
            self.masks.append((kwargs or {}).get("attn_mask", args[5] if len(args) > 5 else None))
        return func(*args, **(kwargs or {}))


def _seen(mask, dtype=torch.float32):
    q, k, v = (x.detach().to(dtype) for x in (_heads(0, S), _heads(1, T), _heads(2, T)))
    with Seen() as seen:
        F.scaled_dot_product_attention(q, k, v, mask)
    return seen.masks


def test_a_mask_that_is_the_same_for_all_keys_is_none(it):
    for name in ("no keys are masked", "rows without keys", "two axes"):
        assert _seen(MASKS[name]()) == [None]
    it.stop()
    assert _seen(MASKS["two axes"]())[0] is not None


def test_others_have_their_keys_side_by_side_and_take_no_more_memory(it):
    (mask,) = _seen(MASKS["transposed"]())
    assert mask.stride(-1) == 1
    (bias,) = _seen(torch.randn(T, S).T.expand(B, H, S, T))
    assert bias.stride(-1) == 1
    assert bias.untyped_storage().nbytes() == S * T * 4


LEFT = {
    "side by side": lambda: torch.ones(S, T, dtype=torch.bool),
    "one key": lambda: torch.ones(S, 1, dtype=torch.bool),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_lies_right_is_left(both, name):
    mask = LEFT[name]()
    both(lambda: _attention(mask)[0])


@pytest.mark.parametrize("mask", [_rows(B, H, 1), _rows(5, 1), torch.ones(S + 1, 1, dtype=torch.bool).expand(S + 1, T)])
def test_masks_that_do_not_fit_are_refused_as_ever(it, mask):
    raised = []
    for on in (True, False):
        if not on:
            it.stop()
        try:
            F.scaled_dot_product_attention(*(_heads(0, S), _heads(1, T), _heads(2, T)), mask)
            raised.append(None)
        except RuntimeError as error:
            raised.append(str(error))
    assert raised[0] == raised[1]


def _traced(program, *args):
    """What a program gives, traced by autograd, and its graph's calls of attention, with what they have by name."""
    from torch._dynamo.backends.common import aot_autograd

    calls = []

    def kept(module, inputs):
        calls.extend((str(node.target), node.kwargs) for node in module.graph.nodes if "attention" in str(node.target))
        return module

    torch.compiler.reset()
    return torch.compile(program, backend=aot_autograd(fw_compiler=kept), fullgraph=True, dynamic=True)(*args), calls


def _with_rows_masked(q, k, v):
    mask = (torch.arange(S)[None, None, :, None] >= 0).expand(B, -1, S, T)
    return F.scaled_dot_product_attention(q, k, v, mask)


def test_a_traced_program_has_no_mask(it):
    q, k, v = (x.detach().float() for x in (_heads(0, S), _heads(1, T), _heads(2, T)))
    resolve_anew(())
    found, ((_, given),) = _traced(_with_rows_masked, q, k, v)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v))
    assert given == {}


def test_tracers_that_have_met_an_op_before_find_what_stands_in_it_since(it):
    q, k, v = (x.detach().float() for x in (_heads(0, S), _heads(1, T), _heads(2, T)))
    kept = torch.ops.aten.scaled_dot_product_attention.default._dispatch_cache
    kept.clear()
    # As a program that was traced before the extension was loaded leaves it.
    kept[torch._C.DispatchKey.AutogradCPU] = torch._C.DispatchKey.CompositeImplicitAutograd
    _, ((_, given),) = _traced(_with_rows_masked, q, k, v)
    assert set(given) == {"attn_mask"}
    resolve_anew(())
    _, ((_, given),) = _traced(_with_rows_masked, q, k, v)
    assert given == {}


def _packed(length=S):
    """q, k, v of one linear layer, attended, and the gradient of its result; what a layer of a transformer does."""
    x = torch.randn(B, length, 3 * H * D, generator=torch.Generator().manual_seed(5)).requires_grad_()
    whole = x * 1.0
    q, k, v = whole.view(B, length, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    o = torch.tanh(q.transpose(1, 2)).transpose(1, 2) * k + v
    strides = []
    whole.register_hook(lambda gradient: strides.append(gradient.stride()))
    (dx,) = torch.autograd.grad((o * o.detach().sin()).sum(), x)
    return dx, strides


def test_gradients_of_one_tensor_are_put_together_as_it_lay(both, it):
    both(lambda: _packed()[0])
    moved = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            moved.append(func.name())
            return func(*args, **(kwargs or {}))

    dq, dk, dv = (torch.randn(B, S, H, D).transpose(1, 2) for _ in range(3))
    whole = torch.randn(B, S, 3 * H * D, requires_grad=True)
    heads = whole.view(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    with Copies():
        (found,) = torch.autograd.grad(heads, whole, (dq, dk, dv))
    assert torch.equal(found, torch.stack([x.transpose(1, 2) for x in (dq, dk, dv)], 2).flatten(2))
    assert not any("clone" in each or "copy" in each for each in moved)


def test_a_stack_outside_of_a_backward_pass_lies_as_ever(it):
    parts = [torch.randn(B, S, H, D).transpose(1, 2) for _ in range(3)]
    for _ in range(2):
        made = torch.stack(parts)
        assert made.is_contiguous()
        assert torch.equal(made[1], parts[1])
        it.stop()


class Stacks(torch.autograd.Function):
    """Stacks what is laid out as heads are where a program does it: in a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        made = torch.stack([dy, 2 * dy, 3 * dy])
        ctx.seen.append(made.stride())
        return made.view(3, -1).sum(0).view(dy.shape), None


def test_a_stack_that_a_program_makes_in_a_backward_pass_lies_as_ever(both):
    def program():
        seen, x = [], torch.randn(B, H, S, D, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = Stacks.apply(x, seen)
        dy = torch.ones(B, S, H, D).transpose(1, 2)
        return torch.autograd.grad(y, x, dy), seen

    (dx,), _ = both(program)
    assert torch.equal(dx, torch.full((B, H, S, D), 6.0))


def test_gradients_of_gradients_are_the_same(both):
    x = torch.randn(B, S, 3 * H * D, dtype=torch.float64, requires_grad=True)

    def twice():
        q, k, v = x.view(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        (dx,) = torch.autograd.grad((q * k * v).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    both(twice)


@pytest.fixture
def tag():
    """PyTorch's configuration, and a tag of the user's in it."""
    from torch.compiler import config

    before, config.cache_key_tag = config.cache_key_tag, "mine"
    yield config
    config.cache_key_tag = before  # not by monkeypatch, which deletes what an object does not hold itself


def test_what_was_traced_without_it_is_not_taken_from_a_cache(library, tag):
    from tilebook import native

    graphs = native._Graphs()
    for _ in range(2):
        graphs.mark(library)
    assert tag.cache_key_tag.startswith("minetilebook-")
    tag.cache_key_tag += "more"
    for _ in range(2):
        graphs.unmark()
    assert tag.cache_key_tag == "minemore"
