"""Calls that are known to be PyTorch's, answered without Python: the same numbers, and only where all is usual."""

from functools import partial

import pytest
import torch
from gate_samples import CALLS, PLAIN, heads, layers, numbers, rows
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import tilebook

every_call = pytest.mark.parametrize("name", CALLS)
BIASED = [name for name in CALLS if name.startswith("attention, ") and "bias" in name]
TURNS = [name for name in CALLS if name.startswith("rotation")]  # Python leaves angles that learn to PyTorch at once
TRAINS = [name for name in CALLS if name != "decode" and name not in (*BIASED, *TURNS)]


def graded(run, tensors):
    """What it gives and the gradients of all floating tensors."""
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in tensors]
    found = run(*leaves)
    results = found if isinstance(found, tuple) else (found,)
    wanted = [x for x in leaves if x.requires_grad]
    dys = [numbers(*y.shape, seed=7).to(y.dtype) for y in results]
    return [*results, *torch.autograd.grad(results, wanted, dys)]


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@every_call
def test_the_second_call_of_a_kind_is_answered_and_is_pytorchs(gated, name):
    function, make, options = CALLS[name]
    args = make()
    answered = [gated.answered(function, *args, **options)[0] for _ in range(4)]
    assert (answered[0], answered[2:]) == (False, [True, True])
    for other in (make(dtype=torch.bfloat16), args):
        gated.known(function, *other, **options)
        hit, found = gated.answered(function, *other, **options)
        assert hit
        same(found, PLAIN[name](*other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRAINS)
def test_gradients_are_pytorchs(gated, name, dtype):
    function, make, options = CALLS[name]
    run = partial(gated, function, **options)
    for _ in range(3):
        graded(run, make(dtype=dtype))
    gated.here._tell("counted")
    found = graded(run, make(dtype=dtype))
    assert sum(calls for _, calls in gated.extension.gates_counted()) == 1
    same(found, graded(PLAIN[name], make(dtype=dtype)))


@pytest.mark.parametrize("name", TURNS)
def test_gradients_of_rotated_heads_are_pytorchs_also_where_angles_learn(gated, name):
    function, make, options = CALLS[name]
    *given, cos, sin = make()
    for _ in range(3):
        graded(lambda q, k: gated(function, q, k, cos, sin, **options), given)
    gated.here._tell("counted")
    found = graded(lambda q, k: gated(function, q, k, cos, sin, **options), given)
    assert sum(calls for _, calls in gated.extension.gates_counted()) == 1
    same(found, graded(lambda q, k: PLAIN[name](q, k, cos, sin), given))
    same(graded(partial(gated, function, **options), make()), graded(PLAIN[name], make()))


@pytest.mark.parametrize("name", BIASED)
def test_gradients_beside_a_bias_are_pytorchs_and_one_that_learns_by_other_kernels_is_looked_at(gated, name):
    function, make, _ = CALLS[name]
    *given, bias = make()
    for _ in range(3):
        graded(lambda *qkv: gated(function, *qkv, bias), given)
    gated.here._tell("counted")
    found = graded(lambda *qkv: gated(function, *qkv, bias), given)
    assert sum(calls for _, calls in gated.extension.gates_counted()) == 1
    same(found, graded(lambda *qkv: PLAIN[name](*qkv, bias), given))
    for _ in range(3):
        assert not gated.answered(function, *given, bias.clone().requires_grad_())[0]


@pytest.mark.parametrize("booleans", [False, True])
@pytest.mark.parametrize(
    "changed",
    [
        lambda mask: mask[..., ::2].repeat_interleave(2, -1).mT.contiguous().mT,  # by columns
        lambda mask: mask.expand(2, 2, 4, 8).clone()[..., :6],  # fewer columns than keys
        lambda mask: mask[0],  # another number of axes
        lambda mask: mask.double(),
        lambda mask: torch.cat((mask, mask), -1)[..., :8],  # rows with gaps
    ],
)
def test_masks_that_do_not_lie_as_pytorchs_kernels_load_them_are_pythons(gated, changed, booleans):
    q, k, v = heads(keys=8)
    mask = numbers(1, 1, 4, 8, seed=5)
    mask = changed(mask > 0 if booleans else mask)
    for _ in range(4):
        assert gated.looked_at(tilebook.attention, q, k, v, attn_mask=mask)


@pytest.mark.parametrize("name", TRAINS)
def test_what_is_recomputed_in_a_backward_pass_is_answered_and_is_pytorchs(gated, name):
    function, make, options = CALLS[name]

    def gradients(call):
        leaves = [x.requires_grad_() if x.is_floating_point() else x for x in make()]
        found = checkpoint(call, *leaves, use_reentrant=True)
        gated.here._tell("counted")
        torch.autograd.backward([y.sum() for y in (found if isinstance(found, tuple) else (found,))])
        return [x.grad for x in leaves], sum(calls for _, calls in gated.extension.gates_counted())

    for _ in range(4):
        found, answered = gradients(partial(gated, function, **options))
    assert answered == 1
    same(found, gradients(PLAIN[name])[0])


@every_call
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_calls_without_gradients_are_kinds_of_their_own(gated, name, context):
    function, make, options = CALLS[name]
    args = make()
    with context():
        gated.known(function, *args, **options)
        hit, found = gated.answered(function, *args, **options)
        assert hit
        same(found, PLAIN[name](*args))
        assert found is not None
    with_gradients = [x.requires_grad_() if x.is_floating_point() else x for x in make()]
    if name != "decode":
        assert not gated.answered(function, *with_gradients, **options)[0]


@pytest.mark.parametrize("name", TRAINS)
def test_autocast_is_pytorchs(gated, name):
    function, make, options = CALLS[name]
    run = partial(gated, function, **options)
    gated.known(function, *make(), **options)

    def inside(run):
        with torch.autocast("cpu", torch.bfloat16):
            return graded(run, make())

    found = [inside(run) for _ in range(4)]
    expected = inside(PLAIN[name])
    if "norm" in name:  # which ours give in the dtype of x
        expected = [y.to(x.dtype) for x, y in zip(found[0], expected, strict=True)]
    for each in found:
        same(each, expected)


# What is not answered


class Subclass(torch.Tensor):
    pass


class Learnt(torch.nn.Parameter):
    pass


def shifted(x):
    """The same numbers, not at a whole vector."""
    made = torch.empty(x.numel() + 1)[1:].view(x.shape)
    return made.copy_(x)


def dual(x):
    return forward_ad.make_dual(x, torch.zeros_like(x))


OTHERS = {
    "a subclass": lambda x: x.as_subclass(Subclass),
    "a subclass of parameters": lambda x: Learnt(x, requires_grad=False),
    "a lazy negation": lambda x: torch._neg_view(-x),
    "not at a whole vector": shifted,
    "other strides": lambda x: x.mT.contiguous().mT,
    "another dtype": lambda x: x.double(),
    "another size": lambda x: torch.cat([x, x]),
    "with gradients": lambda x: x.clone().requires_grad_(),
    "on another device": lambda x: x.to("meta"),
    "with a tangent": dual,
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("name", OTHERS)
def test_a_tensor_of_another_kind_is_looked_at(gated, name, place):
    given = heads()
    gated.known(tilebook.attention, *given)
    with forward_ad.dual_level():
        other = [OTHERS[name](x) if i == place else x for i, x in enumerate(given)]
        assert gated.looked_at(tilebook.attention, *other)
    assert gated.answered(tilebook.attention, *given)[0]


def test_tensors_inside_of_transforms_are_looked_at(gated):
    given = heads()
    gated.known(tilebook.attention, *given)
    found = []

    def inside(q):
        found.append(gated.looked_at(tilebook.attention, *given))
        found.append(gated.looked_at(tilebook.rms_norm, q))
        return q.sum()

    gated.known(tilebook.rms_norm, given[0])
    torch.func.grad(inside)(given[0])
    torch.func.vmap(inside)(given[0][None])
    torch.func.jvp(inside, (given[0],), (given[0],))
    torch.func.functionalize(inside)(given[0])
    assert found == [True] * 8


def test_programs_that_are_traced_have_all_of_it(gated):
    given = rows(2)
    gated.known(tilebook.layer_norm, *given)
    found = []

    def program(x, weight, bias):
        found.append(gated.looked_at(tilebook.layer_norm, x, weight, bias))
        return tilebook.layer_norm(x, weight, bias)

    traced = torch.jit.trace(program, given, check_trace=False)
    same(traced(*given), PLAIN["layer norm"](*given))
    graph = make_fx(program)(*given)
    assert any("layer_norm" in str(node.target) for node in graph.graph.nodes)
    assert found == [True, True]


HOOKS = torch.autograd.graph.saved_tensors_hooks


def test_what_hooks_may_change_is_looked_at(gated):
    x, weight = rows(1)
    gated.known(tilebook.rms_norm, x, weight)
    learnt = weight.clone().requires_grad_()
    gated.known(tilebook.rms_norm, x, learnt)
    with HOOKS(lambda t: t, lambda t: t):
        assert gated.looked_at(tilebook.rms_norm, x, learnt)
        assert gated.answered(tilebook.rms_norm, x, weight)[0]
        with torch.no_grad():
            assert gated.answered(tilebook.rms_norm, x, learnt)[0]
    assert gated.answered(tilebook.rms_norm, x, learnt)[0]


OPTIONS = {
    "attention": (
        heads,
        [
            {"window": (2, 0)}, {"softcap": 1.0}, {"alibi_slopes": torch.ones(2)}, {"bias": torch.zeros(4, 4)},
            {"attn_mask": torch.ones(4, 4, dtype=torch.bool)}, {"dropout_p": 0.1}, {"return_lse": True},
            {"deterministic": True}, {"causal": "top_left"}, {"scale": -1.0}, {"scale": 1}, {"causal": True},
        ],
    ),
    "scaled_dot_product_attention": (
        heads,
        [{"dropout_p": 0.1}, {"attn_mask": torch.ones(4, 4, dtype=torch.bool)}, {"is_causal": True}, {"scale": -1.0}],
    ),
    "attention_decode": (
        lambda: heads(1, 1, 6),
        [
            {"seq_lens": torch.tensor([3, 6], dtype=torch.int32)}, {"softcap": 1.0}, {"window": 2},
            {"return_lse": True}, {"causal": False}, {"scale": -1.0},
        ],
    ),
    "rms_norm": (lambda: rows(1), [{"eps": 1}]),
    "mlp": (layers, [{"activation": "relu"}]),
    "cross_entropy": (
        CALLS["loss"][1],
        [
            {"weight": torch.ones(8)}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"softcap": 2.0},
            {"z_loss": 0.1},
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_a_call_with_other_options_is_another(gated, name):
    make, options = OPTIONS[name]
    function, args = getattr(tilebook, name), make()
    gated.known(function, *args)
    for each in options:
        assert gated.looked_at(function, *args, **each), each
    assert gated.answered(function, *args)[0]


def test_decoding_of_several_rows_is_looked_at(gated):
    given = heads(1, 2, 6)
    gated.known(tilebook.attention_decode, *given)
    assert not gated.answered(tilebook.attention_decode, *given)[0]


@pytest.mark.parametrize("how", ["meta", "nested mask", "nested", "sparse mask"])
def test_tensors_without_sizes_or_memory_are_left_to_the_function(gated, how):
    q, k, v = heads(keys=8)
    mask = numbers(1, 1, 4, 8, seed=5)
    gated.known(tilebook.attention, q, k, v, attn_mask=mask)
    if how == "meta":
        q, k, v, mask = (x.to("meta") for x in (q, k, v, mask))
    elif how == "nested":
        q, k, v = (torch.nested.nested_tensor([x[0], x[1][:, :2]]) for x in (q, k, v))
    else:
        mask = mask.to_sparse() if how == "sparse mask" else torch.nested.nested_tensor(list(mask.expand(2, 1, 4, 8)))
    assert all(gated.looked_at(tilebook.attention, q, k, v, attn_mask=mask) for _ in range(2))
    for each in (tilebook.attention_decode, tilebook.scaled_dot_product_attention):
        assert gated.looked_at(each, q, k, v)
