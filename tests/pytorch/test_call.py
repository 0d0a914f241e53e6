"""A call takes the direct way only where that provably does the same as PyTorch's dispatcher would."""

import contextlib

import pytest
import torch
from call_samples import CALLS, every_call, inputs, on_the_cpu, same
from op_samples import BF16, data, ends, normal
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tilebook
from tilebook import call, casting, dispatch, layout

# Ways


class Subclass(torch.Tensor):
    pass


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def way_in(transform):
    """The way of a call inside a transform of a function of one tensor."""
    ways = []

    def function(x):
        ways.append(call.way(x))
        return (x * x).sum()

    transform(function)
    return ways[0]


X = torch.randn(3)
TRANSFORMS = {
    "vmap": ("op", lambda f: torch.vmap(f)(torch.randn(2, 3))),
    "vmap of vmap": ("op", lambda f: torch.vmap(torch.vmap(f))(torch.randn(2, 2, 3))),
    "functionalize": ("op", lambda f: torch.func.functionalize(f)(X)),
    "grad": ("pytorch", lambda f: torch.func.grad(f)(X)),
    "vjp": ("pytorch", lambda f: torch.func.vjp(f, X)),
    "jvp": ("pytorch", lambda f: torch.func.jvp(f, (X,), (X,))),
    "jacrev": ("pytorch", lambda f: torch.func.jacrev(f)(X)),
    "jacfwd": ("pytorch", lambda f: torch.func.jacfwd(f)(X)),
    "vmap of grad": ("pytorch", lambda f: torch.vmap(torch.func.grad(f))(torch.randn(2, 3))),
    "grad of vmap": ("pytorch", lambda f: torch.func.grad(lambda x: torch.vmap(f)(x).sum())(torch.randn(2, 3))),
    "script's trace": ("pytorch", lambda f: torch.jit.trace(f, X)),
    "make_fx": ("op", lambda f: make_fx(f)(X)),
    "make_fx of fakes": ("op", lambda f: make_fx(f, tracing_mode="fake")(X)),
    "no_grad": ("direct", torch.no_grad()(lambda f: f(X))),
    "inference mode": ("direct", torch.inference_mode()(lambda f: f(X))),
    "autograd": ("direct", lambda f: f(torch.randn(3, requires_grad=True)).backward()),
    "a parameter": ("direct", lambda f: f(torch.nn.Parameter(X))),
    "a buffer": ("direct", lambda f: f(torch.nn.Buffer(X))),
    "a subclass": ("op", lambda f: f(X.as_subclass(Subclass))),
    "a lazy negation": ("op", lambda f: f(torch.randn(3, dtype=torch.complex64).conj().imag)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_way_inside(name):
    expected, transform = TRANSFORMS[name]
    assert way_in(transform) == expected


@pytest.mark.usefixtures("forced")
def test_way_inside_modes():
    with Watching():
        assert call.way(X) == "op"
    with torch._subclasses.FakeTensorMode() as mode:
        assert call.way(mode.from_tensor(X)) == "op"
    with forward_ad.dual_level():
        assert call.way(X) == "pytorch"
    assert call.way(X) == "direct"


@pytest.mark.usefixtures("forced")
def test_every_tensor_is_asked_and_optional_ones_may_be_none():
    lazy = torch.randn(3, dtype=torch.complex64).conj().imag
    assert call.way(X, X, optional=(None, X)) == "direct"
    for other in (X.as_subclass(Subclass), lazy):
        assert call.way(X, other) == "op"
        assert call.way(X, optional=(None, other)) == "op"


def test_what_is_no_tensor_is_refused():
    for given, optional in (((None,), ()), ((X, 2.0), ()), ((X,), ("x",))):
        with pytest.raises(ValueError, match="expected a tensor"):
            call.way(*given, optional=optional)


def test_on_the_cpu_the_way_is_pytorchs():
    assert call.way(X) == "pytorch"
    assert call.untraceable(call.way(X)) == "pytorch"
    with Watching():
        assert call.way(X) == "pytorch"
        assert call.untraceable(call.way(X)) == "op"


# Results


@pytest.mark.usefixtures("forced")
@every_call
def test_direct_calls_and_their_gradients_are_right(name):
    function, args = CALLS[name][0], inputs(name)
    found = function(*args)
    same(found, lambda: function(*args))
    dy = torch.randn_like(found)
    same(torch.autograd.grad(found, args, dy), lambda: torch.autograd.grad(function(*args), args, dy))


@pytest.mark.usefixtures("forced")
@every_call
def test_dispatch_modes_see_the_op(name):
    function, args = CALLS[name][0], inputs(name, data)
    with Watching() as mode:
        found = function(*args)
    assert any(str(func).startswith("tilebook.") for func in mode.seen)
    same(found, lambda: function(*args))


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("name", [name for name in CALLS if name != "drop-in"])
def test_function_modes_see_the_public_function(name):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    seen, (function, args) = [], (CALLS[name][0], inputs(name, data))
    with Mode():
        found = function(*args)
    offered = {name for name, module in tilebook._MODULE.items() if module.startswith("kernels.")}
    assert offered & set(seen)
    same(found, lambda: function(*args))


@pytest.mark.usefixtures("forced")
@every_call
def test_subclasses_stay_what_they_are(name):
    function, args = CALLS[name][0], inputs(name, data)
    found = function(*(x.as_subclass(Subclass) for x in args))
    assert type(found) is Subclass
    same(found.as_subclass(torch.Tensor), lambda: function(*args))


@pytest.mark.usefixtures("forced")
@every_call
def test_a_lazy_negation_is_not_passed_by(name):
    function, args = CALLS[name][0], inputs(name, data)
    lazy = torch.complex(torch.zeros_like(args[0]), -args[0]).conj().imag
    assert lazy.is_neg()
    same(function(lazy, *args[1:]), lambda: function(*args))


@pytest.mark.usefixtures("forced")
@every_call
def test_a_lazily_negated_gradient_is_not_passed_by(name):
    function, args = CALLS[name][0], inputs(name)
    y = function(*args)
    dy = torch.randn_like(y)
    lazy = torch.complex(torch.zeros_like(dy), -dy).conj().imag
    same(torch.autograd.grad(y, args, lazy), lambda: torch.autograd.grad(function(*args), args, dy))


def stacked(name, make=normal):
    parts = [inputs(name, data) for _ in range(3)]
    made = [torch.stack([x * (1 + i) for i, x in enumerate(each)]) for each in zip(*parts, strict=True)]
    return tuple(x.requires_grad_(make is normal) for x in made)


@pytest.mark.usefixtures("forced")
@every_call
def test_vmap_is_right_and_gradients_pass_through_it(name):
    function, args = CALLS[name][0], stacked(name)
    found = torch.vmap(function)(*args)

    def loop():
        return torch.stack([function(*(x[i] for x in args)) for i in range(3)])

    same(found, loop)
    dy = torch.randn_like(found)
    same(torch.autograd.grad(found, args, dy), lambda: torch.autograd.grad(loop(), args, dy))


LEARNT = torch.tensor(2.0, requires_grad=True)
NUMBERS = {
    "attention": lambda **option: tilebook.attention(Q, KV, KV, **option),
    "packed": lambda **option: tilebook.attention_varlen(Q[0], Q[0], Q[0], ends(1, 2), ends(1, 2), **PACK, **option),
    "decoding": lambda **option: tilebook.attention_decode(Q, KV, KV, **option),
    "rms_norm": lambda **option: tilebook.rms_norm(Q, **option),
    "layer_norm": lambda **option: tilebook.layer_norm(Q, **option),
    "head": lambda **option: tilebook.linear_cross_entropy(Q[0, 0], Q[0, 1], torch.arange(5), **option),
    "loss": lambda **option: tilebook.cross_entropy(Q[0, 0], torch.zeros(len(Q[0, 0]), dtype=torch.int64), **option),
}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *[(name, option) for name in ("attention", "packed", "decoding") for option in ("scale", "softcap")],
        *[("attention", "dropout_p"), ("rms_norm", "eps"), ("layer_norm", "eps")],
        *[(name, option) for name in ("loss", "head") for option in ("label_smoothing", "softcap", "z_loss")],
    ],
)
def test_a_number_that_wants_a_gradient_is_refused(name, option):
    with pytest.raises(TypeError, match=f"{option} must be a number"):
        NUMBERS[name](**{option: LEARNT})


@pytest.mark.parametrize("softcap", [-1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["attention", "packed", "decoding", "loss", "head"])
def test_a_soft_cap_is_finite_and_not_negative(name, softcap):
    with pytest.raises(ValueError, match="softcap must not be negative, infinite or NaN"):
        NUMBERS[name](softcap=softcap)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.usefixtures("forced")
def test_nested_tensors_of_the_older_layout_are_pytorch_s():
    q, k, v = (torch.nested.nested_tensor([data(4, n, 16) for n in (3, 5)]) for _ in range(3))
    found = tilebook.scaled_dot_product_attention(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for one, other in zip(found.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_scale_that_is_not_positive_gives_the_formula_s_numbers_under_a_causal_mask(scale):
    q, k, v = (x.double().requires_grad_() for x in (Q, KV.repeat_interleave(2, 1), KV.repeat_interleave(2, 1)))
    seen = torch.ones(5, 7, dtype=torch.bool).tril()
    expected = torch.softmax((scale * q @ k.mT).masked_fill(~seen, -torch.inf), -1) @ v
    found = tilebook.attention(q, k, v, causal=True, scale=scale)
    packed = tilebook.attention_varlen(
        *(x[0].transpose(0, 1) for x in (q, k, v)), ends(5), ends(7), max_seqlen_q=5, max_seqlen_k=7,
        causal="top_left", scale=scale,
    )  # fmt: skip
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(packed.transpose(0, 1), expected[0])
    for one, other in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("window", [0, 4, (), (1,), (1, 2, 3), (1.5, 0), "ab", (-2, 0)])
@pytest.mark.parametrize("name", ["attention", "packed"])
def test_a_window_is_two_whole_numbers(name, window):
    with pytest.raises(ValueError, match="window must be two numbers"):
        NUMBERS[name](window=window)


@pytest.mark.parametrize("causal", ["top_left", "bottom_right", None])
def test_decoding_has_no_other_diagonal_than_its_own(causal):
    with pytest.raises(ValueError, match="causal must be a bool"):
        NUMBERS["decoding"](causal=causal)


Q, KV = data(2, 4, 5, 16), data(2, 2, 7, 16)
PACK = {"max_seqlen_q": 4, "max_seqlen_k": 4}
ALONE = {
    "bias": (lambda x: tilebook.attention(Q, KV, KV, bias=x), data(3, 4, 5, 7)),
    "bias, soft-cap": (lambda x: tilebook.attention(Q, KV, KV, bias=x, softcap=2.0), data(3, 1, 5, 7)),
    "mask": (lambda x: tilebook.attention(Q, KV, KV, attn_mask=x), torch.rand(3, 5, 7) > 0.3),
    "slopes": (lambda x: tilebook.attention(Q, KV, KV, alibi_slopes=x, causal=True), torch.rand(3, 4)),
    "log-sum-exp": (lambda x: tilebook.attention(x, KV, KV, return_lse=True)[1], torch.stack([Q, 2 * Q, 3 * Q])),
    "log-sum-exp, window": (
        lambda x: tilebook.attention(Q, x, KV, window=(1, 0), return_lse=True)[1], torch.stack([KV, 2 * KV, 3 * KV]),
    ),
    "packed log-sum-exp": (
        lambda x: tilebook.attention_varlen(x, x, x, ends(2, 6), ends(2, 6), return_lse=True, **PACK)[1],
        data(3, 7, 4, 16),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("implementation", ["", "torch"])
@pytest.mark.parametrize("name", ALONE)
def test_vmap_over_one_argument_alone_is_a_loop(name, implementation):
    function, batch = ALONE[name]
    with dispatch.use(implementation) if implementation else contextlib.nullcontext():
        found = torch.vmap(function)(batch)
        torch.testing.assert_close(found, torch.stack([function(x) for x in batch]))


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("name", [name for name in CALLS if name != "packed"])
def test_traced_scripts_are_right(name):
    function, args = CALLS[name][0], inputs(name, data)
    traced = torch.jit.trace(function, args)
    other = tuple(x * 2 for x in args)
    same(traced(*other), lambda: function(*other))


@pytest.mark.usefixtures("forced")
def test_symbolic_traces_have_the_public_function_as_a_node():
    class Model(torch.nn.Module):
        def forward(self, q, w):
            return tilebook.rms_norm(tilebook.attention(q, q, q, causal=True), w)

    traced = torch.fx.symbolic_trace(Model())
    assert {"attention", "rms_norm"} <= {getattr(n.target, "__name__", "") for n in traced.graph.nodes}
    q, w = data(2, 4, 6, 16), data(16)
    same(traced(q, w), lambda: Model()(q, w))


@pytest.mark.usefixtures("forced")
@every_call
def test_fake_tensors_give_fake_results_laid_out_as_real_ones(name):
    function, args = CALLS[name][0], inputs(name, data)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = function(*(mode.from_tensor(x) for x in args))
    real = function(*args)
    assert isinstance(fake, torch._subclasses.FakeTensor)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


# Autocast, and helpers


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("name", [name for name in CALLS if name != "drop-in"])
def test_autocast_gives_its_dtype_and_gradients_in_their_own(name):
    function, args = CALLS[name][0], inputs(name)
    with torch.autocast("cpu", BF16):
        y = function(*args)
        expected = on_the_cpu(lambda: function(*args))
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, atol=0.05, rtol=0.05)
    assert {x.dtype for x in torch.autograd.grad(y.float().sum(), args)} == {torch.float32}


def test_autocast_casts_floating_point_but_not_double():
    given = data(3), data(3).double(), data(3).half(), torch.arange(3), None, 2.0
    assert casting.autocast(*given) == given
    with torch.autocast("cpu", BF16):
        assert casting.autocast_dtype(given[0]) == BF16
        found = casting.autocast(*given)
    assert [x.dtype for x in found[:4]] == [BF16, torch.float64, BF16, torch.int64]
    assert found[4:] == (None, 2.0)


def test_autocast_is_off_where_a_device_has_none():
    x = torch.empty(3, device="meta")
    with torch.autocast("cpu", BF16):
        assert casting.autocast_dtype(x) is None
        assert casting.autocast(x) == (x,)


def test_rows_and_vectors_are_copied_only_where_their_last_axis_is_not_contiguous():
    x, y, scalar = torch.randn(3, 4), torch.randn(8), torch.tensor(1.0)
    assert layout.rows(x) is x
    assert layout.rows(x[:, :2]).data_ptr() == x.data_ptr()
    assert layout.rows(y) is y
    odd = [x.t(), x[:, ::2], x[:1].expand(3, 4).t()]
    for given in (*odd, y[::2]):
        found = layout.rows(given)
        assert found.is_contiguous()
        assert torch.equal(found, given)
    assert layout.rows(scalar) is scalar


def test_gradients_are_recorded_only_where_they_are_wanted():
    x, y = normal(3), data(3)
    assert call.recorded((y, None, x))
    assert not call.recorded((y, None, y))
    with torch.no_grad():
        assert not call.recorded((x,))
