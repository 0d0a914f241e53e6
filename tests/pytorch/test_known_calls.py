"""A call like one made before runs without checks, and nothing else is taken for such a call."""

import numpy as np
import pytest
import torch
from op_samples import angles, data, ends, ints, normal

import tilebook
from tilebook.dispatch import Choice, Dispatch


def packed(q, k, v, rows, columns, most=5):
    return tilebook.attention_varlen(q, k, v, rows, columns, max_seqlen_q=most, max_seqlen_k=most, causal=True)


def biased(q, k, v, bias):
    return tilebook.attention(q, k, v, bias=bias)


def masked(q, k, v, mask):
    return tilebook.attention(q, k, v, attn_mask=mask)


def sloped(q, k, v, slopes):
    return tilebook.attention(q, k, v, alibi_slopes=slopes)


def rotated(*given):
    return torch.cat(tilebook.apply_rope(*given), 1)


HALF = torch.float16


def qkv(make=data, heads_kv=4, **how):
    return [make(2, 4, 6, 16, **how), *(make(2, heads_kv, 6, 16, **how) for _ in range(2))]


def layers(make=data):
    shapes = (5, 8), (12, 8), (12,), (8, 12), (8,)
    return [make(*shape, dtype=HALF) for shape in shapes]


SEEN = torch.arange(6) < torch.tensor([4, 0])[:, None, None, None]
LABELS = torch.tensor([1, 7, -100, 0, 3])

CALLS = {
    "attention": (tilebook.attention, qkv),
    "attention, bias": (biased, lambda make=data: [*qkv(make), make(1, 4, 6, 6)]),
    "attention, mask": (masked, lambda make=data: [*qkv(make), SEEN]),
    "attention, slopes": (sloped, lambda make=data: [*qkv(make), data(4).abs()]),
    "packed": (packed, lambda make=data: [*(make(9, 4, 16) for _ in range(3)), ends(4, 9), ends(4, 9)]),
    "decode": (
        lambda q, k, v, n: tilebook.attention_decode(q, k, v, seq_lens=n),
        lambda make=data: [data(2, 4, 1, 16, dtype=HALF), *qkv(dtype=HALF)[1:], ints(3, 6)],
    ),
    "layers": (tilebook.mlp, layers),
    "gated layers": (tilebook.swiglu, lambda make=data: [make(5, 8), make(12, 8), make(12, 8), make(8, 12)]),
    "gated layers, recomputed": (
        lambda *args: tilebook.geglu(args[0], args[1], None, args[2], recompute=True),
        lambda make=data: [make(5, 8), make(24, 8), make(6, 12)],
    ),
    "gate": (tilebook.glu, lambda make=data: [make(5, 8), make(5, 8)]),
    "rotation": (rotated, lambda make=data: [make(2, 4, 6, 16), make(2, 2, 6, 16), *angles(1, 6, 16, dtype=None)]),
    "norm": (tilebook.rms_norm, lambda make=data: [make(5, 8), make(8)]),
    "layer norm": (tilebook.layer_norm, lambda make=data: [make(5, 8), make(8), make(8)]),
    "loss": (lambda x, labels: tilebook.cross_entropy(x, labels), lambda make=data: [make(5, 8), LABELS]),
}
BROADCAST = "attention, bias", "attention, mask"
every_call = pytest.mark.parametrize("name", CALLS)


@every_call
def test_a_call_like_one_before_is_neither_checked_nor_chosen_again(here, name, monkeypatch):
    function, make = CALLS[name]
    args = make()
    first = function(*args)
    monkeypatch.setattr(here, "choose", None)
    families = {"layers": "mlp", "norm": "norms", "layer norm": "norms", "packed": "varlen", "decode": "decode"}
    families |= {"loss": "cross_entropy", "rotation": "rope"}
    family = "glu" if name.startswith("gate") else families.get(name, "attention")
    monkeypatch.setattr(f"tilebook.kernels.{family}.check", None)
    assert torch.equal(function(*args), first)
    assert all(each.implementation.name == "triton" for each in here._memo.values())
    assert {each.calls for each in here._memo.values()} == {2}


@pytest.mark.parametrize("native", [False, True])
@every_call
def test_after_good_calls_a_tensor_of_another_shape_or_dtype_is_checked(here, name, native):
    function, make = CALLS[name]
    args = make()
    here.native = native
    for _ in range(3):
        function(*args)
    for at, x in enumerate(args):
        for other in (x[..., None], x.to(torch.int64), x[..., :1], x.flatten()[0], x.repeat(*[1] * (x.ndim - 1), 3)):
            if at == 3 and name in BROADCAST and other.shape[-1:] in ((), (1,)) and other.ndim < 5:
                continue  # it broadcasts
            given = [other if i == at else y for i, y in enumerate(args)]
            if name.endswith("norm") and at == 0 and other.shape == x.shape and other.is_floating_point():
                continue
            if name == "loss" and (other.shape == x.shape if at else other.ndim == 2) and other.dtype == x.dtype:
                continue  # other classes, or the same targets
            with pytest.raises(ValueError, match=r"must|expected|takes|asks|on cpu, but"):
                function(*given)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "decode"])
def test_gradients_of_calls_known_and_not_are_right(here, name):
    function, make = CALLS[name]
    args = make(normal)
    inputs = [x for x in args if x.requires_grad]
    dy = torch.randn_like(function(*args))
    found = [torch.autograd.grad(function(*args), inputs, dy) for _ in range(3)]
    expected = torch.autograd.grad(reference(here, function, args), inputs, dy)
    error = {"atol": 0.02, "rtol": 0.02} if dy.dtype == HALF else {"atol": 2e-5, "rtol": 2e-5}
    for grads in found:
        torch.testing.assert_close(grads, expected, **error)


def reference(here, function, args):
    """What PyTorch's own functions give."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda x: False))
        patch.setattr("tilebook.left._here", Dispatch())
        return function(*args)


@every_call
def test_what_is_left_to_pytorch_needs_no_kernel(here, name, monkeypatch):
    function, make = CALLS[name]
    here.native = True
    monkeypatch.setattr(Choice, "__call__", None)
    args = make()
    for _ in range(3):
        torch.testing.assert_close(function(*args), reference(here, function, args))
    assert {(each.native, each.calls) for each in here._memo.values()} == {(True, 3)}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["attention, bias", "attention, mask"])
def test_what_pytorch_serves_with_a_mask_is_known_before_anything_is_checked(here, name, trained, monkeypatch):
    function, make = CALLS[name]
    here.native = True
    args = make(normal if trained else data)
    expected = reference(here, function, args)
    for _ in range(2):
        function(*args)
    monkeypatch.setattr("tilebook.kernels.attention.attend", None)
    o = function(*args)
    torch.testing.assert_close(o, expected)
    if name == "attention, mask":
        assert not o[1].any()  # which sees nothing
    if trained:
        inputs, do = [x for x in args if x.requires_grad], torch.randn_like(o)
        found, right = (torch.autograd.grad(y, inputs, do) for y in (o, expected))
        torch.testing.assert_close(found, right)


def test_booleans_are_no_bias_however_well_known_they_are_as_a_mask(here):
    here.native = True
    args = qkv()
    for _ in range(3):
        tilebook.attention(*args, attn_mask=SEEN)
    with pytest.raises(ValueError, match="bias must be floating point"):
        tilebook.attention(*args, bias=SEEN)


def test_decoding_has_no_gradient_also_after_a_call_that_wanted_none(here):
    here.native = True
    q, k, v = data(2, 4, 1, 16), *qkv()[1:]
    tilebook.attention_decode(q, k, v)
    tilebook.attention_decode(q, k, v)
    with pytest.raises(ValueError, match="no backward"):
        tilebook.attention_decode(q.requires_grad_(), k, v)


def test_a_statistic_is_not_left_to_pytorchs_function_which_has_none(here):
    here.native = True
    q, k, v = qkv()
    here.forced = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tilebook.kernels.attention.plain", None)
        patch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: 0)
        o, lse = tilebook.attention(q, k, v, return_lse=True)
    expected, right = reference(here, lambda *args: tilebook.attention(*args, return_lse=True), (q, k, v))
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(lse, right)


NUMBERS = {
    "attention": lambda one: tilebook.attention(*qkv(), scale=one, softcap=one),
    "packed": lambda one: tilebook.attention_varlen(
        *(data(9, 4, 16) for _ in range(3)), *(ends(4, 9),) * 2, max_seqlen_q=5, max_seqlen_k=5, scale=one, softcap=one
    ),
    "decode": lambda one: tilebook.attention_decode(*qkv(dtype=HALF), scale=one, softcap=one),
    "norm": lambda one: tilebook.rms_norm(data(5, 8), data(8), one),
    "loss": lambda one: tilebook.cross_entropy(data(5, 8), LABELS, softcap=one, z_loss=one, label_smoothing=one),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_another_type_is_no_other_call_and_another_number_is(here, name):
    for one in (np.float32(1), 1, 1.0, np.int64(1), True):
        NUMBERS[name](one)
    assert len(here._memo) == 1
    NUMBERS[name](0.5)
    assert len(here._memo) == 2
