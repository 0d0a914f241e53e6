"""Function transforms: vmap, grad, jacobians, per-sample gradients, forward mode, gradients of gradients."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from programs.compare import assert_as_near, assert_no_worse, cotangent, doubled, fresh, some_calls
from programs.families import BLOCKS, FAMILIES, TRAINED, families

SHARED = {"varlen": (3, 4), "alibi": (3,), "drop_in_mask": (3,)}
"""Inputs that a batch of calls has in common: numbers of the inputs."""


def stacked(family, device, n=3):
    """Inputs of n calls stacked in front, and where vmap finds them."""
    calls = [family.leaves(device, seed=i) for i in range(n)]
    shared = SHARED.get(family.name, ())
    dims = tuple(None if i in shared else 0 for i in range(len(calls[0])))
    inputs = (xs[0] if d is None else torch.stack(xs).detach() for xs, d in zip(zip(*calls, strict=True), dims))  # noqa: B905
    return tuple(inputs), dims


def quiet(function):
    """PyTorch warns where a batching rule is a loop."""
    return pytest.mark.filterwarnings("ignore:There is a performance drop")(function)


def agree(ours, plain, inputs, what=""):
    """Two functions of the same inputs that give tuples of tensors."""
    truth = plain(*(x.detach().double() if x.is_floating_point() else x for x in inputs))
    try:
        theirs = plain(*(x.detach() for x in inputs))
    except (RuntimeError, NotImplementedError) as refused:
        pytest.skip(f"PyTorch does not either: {refused}")
    for _ in range(some_calls(inputs)):
        assert_as_near(ours(*(x.detach() for x in inputs)), theirs, truth, what)


def in_a_tuple(function):
    return lambda *args: (function(*args),)


@quiet
@families()
def test_vmap_gives_pytorchs_numbers(device, family):
    family = FAMILIES[family]
    inputs, dims = stacked(family, device)
    agree(in_a_tuple(vmap(family.ours, in_dims=dims)), in_a_tuple(vmap(family.plain, in_dims=dims)), inputs)


@quiet
@families("drop_in", "softcap", "mlp", "rms_norm", "decode")
def test_vmap_over_one_input_and_not_the_others_gives_pytorchs_numbers(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)
    for i, x in enumerate(inputs):
        batch = torch.stack([x, 2 * x]).detach()
        dims = tuple(0 if i == j else None for j in range(len(inputs)))
        agree(
            in_a_tuple(vmap(family.ours, in_dims=dims)),
            in_a_tuple(vmap(family.plain, in_dims=dims)),
            (*inputs[:i], batch, *inputs[i + 1 :]),
            f"input {i}",
        )


@quiet
@families("drop_in", "mlp", "rms_norm")
def test_vmap_over_another_axis_and_inside_another_vmap_gives_pytorchs_numbers(device, family):
    family = FAMILIES[family]
    inputs, dims = stacked(family, device)
    last = tuple(x.movedim(0, -1) for x in inputs)
    agree(
        in_a_tuple(vmap(family.ours, in_dims=-1, out_dims=1)),
        in_a_tuple(vmap(family.plain, in_dims=-1, out_dims=1)),
        last,
    )
    twice = tuple(torch.stack([x, 0.5 * x]) for x in inputs)
    agree(in_a_tuple(vmap(vmap(family.ours))), in_a_tuple(vmap(vmap(family.plain))), twice)
    assert dims == (0,) * len(inputs)


def _loss(function):
    return lambda *inputs: function(*inputs).sin().sum()


@families(*TRAINED)
def test_functional_gradients_are_pytorchs(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)
    which = tuple(range(family.trained))
    agree(grad(_loss(family.ours), which), grad(_loss(family.plain), which), inputs)


@families(*TRAINED)
def test_vjps_are_pytorchs(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)
    n = family.trained

    def pullback(function):
        def run(*inputs):
            o, back = vjp(lambda *xs: function(*xs, *inputs[n:]), *inputs[:n])
            return o, *back(cotangent(o))

        return run

    agree(pullback(family.ours), pullback(family.plain), inputs)


@quiet
@families("drop_in", "softcap", "mlp", "rms_norm")
def test_jacobians_are_pytorchs(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)

    def corner(function):
        """Of the first output numbers by the first input."""
        return in_a_tuple(jacrev(lambda x, *rest: function(x, *rest).flatten()[:6].clone()))

    agree(corner(family.ours), corner(family.plain), inputs)


@quiet
@families("drop_in", "attention", "softcap", "varlen", "mlp", "rms_norm")
def test_per_sample_gradients_are_pytorchs(device, family):
    family = FAMILIES[family]
    inputs, dims = stacked(family, device)
    if family.name in BLOCKS:  # samples differ, weights do not
        dims = (0, *[None] * (len(inputs) - 1))
        inputs = (inputs[0], *(x[0] for x in inputs[1:]))
    which = tuple(range(family.trained))
    agree(
        vmap(grad(_loss(family.ours), which), in_dims=dims),
        vmap(grad(_loss(family.plain), which), in_dims=dims),
        inputs,
    )


class Block(torch.nn.Module):
    """Attention, an MLP and a norm with weights of their own, by one set of functions or the other."""

    def __init__(self, attend, mlp, norm, width=32):
        super().__init__()
        self.attend, self.mlp, self.norm = attend, mlp, norm
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.up, self.down = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, x):
        b, s, width = x.shape
        q, k, v = self.qkv(self.norm(x, self.weight)).view(b, s, 3, -1, 16).permute(2, 0, 3, 1, 4)
        x = x + self.attend(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, width)
        up, down = self.up, self.down
        return x + self.mlp(self.norm(x, self.weight), up.weight, up.bias, down.weight, down.bias)


def blocks(device, dtype=torch.float32):
    """A block that calls tilebook and one that calls PyTorch, with the same weights."""
    import tilebook

    mlp, norm = FAMILIES["mlp"].plain, FAMILIES["rms_norm"].plain
    torch.manual_seed(0)
    ours = Block(tilebook.scaled_dot_product_attention, tilebook.mlp, tilebook.rms_norm).to(device, dtype)
    plain = Block(FAMILIES["attention"].plain, mlp, norm).to(device, dtype)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@quiet
def test_per_sample_gradients_of_a_module_called_functionally_are_pytorchs(device):
    ours, plain = blocks(device)
    x = torch.randn(4, 24, 32, generator=torch.Generator().manual_seed(1)).to(device)
    parameters = {name: p.detach() for name, p in plain.named_parameters()}

    def gradients(module):
        def loss(parameters, sample):
            return functional_call(module, parameters, (sample[None],)).square().mean()

        return vmap(grad(loss), in_dims=(None, 0))(parameters, x)

    expected = gradients(plain)
    for name, got in gradients(ours).items():
        torch.testing.assert_close(got, expected[name], rtol=2e-2, atol=2e-3 * expected[name].abs().max().item() + 1e-6)


@quiet
@families(*TRAINED)
def test_gradients_for_a_batch_of_cotangents_are_pytorchs(device, family):
    """`is_grads_batched`, as `torch.autograd.functional.jacobian(vectorize=True)` asks for them."""
    family = FAMILIES[family]

    def run(function, inputs):
        o = function(*inputs)
        start = cotangent(o)
        batch = torch.stack([start, start.flip(0), -2 * start])
        return torch.autograd.grad(o, inputs[: family.trained], batch, is_grads_batched=True)

    inputs = family.leaves(device)
    truth = run(family.plain, doubled(inputs))
    try:
        theirs = run(family.plain, fresh(inputs))
    except RuntimeError as refused:
        pytest.skip(f"PyTorch does not either: {refused}")
    for _ in range(some_calls(inputs)):
        assert_as_near(run(family.ours, fresh(inputs)), theirs, truth)


@families()
def test_a_forward_mode_tangent_is_right_or_refused(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)
    n = max(1, family.trained)

    def with_dual_numbers(function, inputs):
        with forward_ad.dual_level():
            dual = (forward_ad.make_dual(x.detach(), cotangent(x)) for x in inputs[:n])
            return forward_ad.unpack_dual(function(*dual, *inputs[n:]))

    def with_func(function, inputs):
        tangents = tuple(cotangent(x) for x in inputs[:n])
        return jvp(lambda *xs: function(*xs, *inputs[n:]), tuple(x.detach() for x in inputs[:n]), tangents)

    for way in (with_dual_numbers, with_func):
        truth = with_math(way, family.plain, doubled(inputs))
        for _ in range(some_calls(inputs)):
            try:
                o, tangent = way(family.ours, fresh(inputs))
            except NotImplementedError:
                continue
            assert tangent is not None, "the tangent is gone without a word"
            for got, right in zip((o, tangent), truth, strict=True):
                scale = right.abs().max().item()
                # PyTorch's own tangents of norms err in the third digit.
                coarse = got.dtype == torch.bfloat16 or "norm" in family.name
                tolerance = 0.04 if coarse else 1e-4
                torch.testing.assert_close(got.double(), right, rtol=0, atol=tolerance * scale)


def with_math(way, function, inputs):
    """PyTorch's own forward mode exists on its plainest path alone."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return tuple(x.detach() for x in way(function, inputs))


@families(*[name for name in TRAINED if name != "rope"])  # which is linear: its gradient is a constant
def test_a_gradient_of_a_gradient_is_right_or_refused(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)

    def second(function, inputs, asked):
        o = function(*inputs)
        needed = inputs[: family.trained]
        (first,) = torch.autograd.grad(o, needed[asked], cotangent(o), create_graph=True)
        if not first.requires_grad:  # of the last bias it is a constant
            return [torch.zeros_like(x) for x in needed]
        return torch.autograd.grad(first, needed, cotangent(first), allow_unused=True, materialize_grads=True)

    for asked in range(family.trained):
        truth = with_math(lambda *given, i=asked: second(*given, i), family.plain, doubled(inputs))
        for _ in range(some_calls(inputs)):
            try:
                found = second(family.ours, fresh(inputs), asked)
            except (RuntimeError, NotImplementedError):
                continue  # differentiable once, and says so
            for got, right in zip(found, truth, strict=True):
                scale = max(x.abs().max().item() for x in truth)
                tolerance = 0.04 if got.dtype == torch.bfloat16 else 1e-4
                torch.testing.assert_close(got.double(), right, rtol=0, atol=tolerance * scale)


def test_a_gradient_penalty_gets_its_gradient_or_an_error(device):
    """Under `create_graph` a first gradient that cannot be differentiated must not look as if it were a constant."""
    for name in TRAINED:
        family = FAMILIES[name]
        inputs = family.leaves(device)
        o = family.ours(*inputs)
        try:
            (first,) = torch.autograd.grad(o, inputs[0], cotangent(o), create_graph=True)
            first.float().square().sum().backward()
        except (RuntimeError, NotImplementedError):
            continue
        assert inputs[min(1, family.trained - 1)].grad is not None, name


@families(*TRAINED)
def test_gradients_for_some_of_the_inputs_are_pytorchs(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)
    for i in range(family.trained):
        some = tuple(x.detach().requires_grad_(i == j) for j, x in enumerate(inputs))
        assert_no_worse(family.ours, family.plain, some, calls=min(3, some_calls(inputs)), what=f"only input {i}")
        most = tuple(x.detach().requires_grad_(i != j and j < family.trained) for j, x in enumerate(inputs))
        assert_no_worse(family.ours, family.plain, most, calls=1, what=f"all but input {i}")
