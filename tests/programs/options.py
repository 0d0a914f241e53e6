"""Options that programs pass: scales, masks, alignments, dropout, and what PyTorch refuses."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import tilebook
from programs.compare import assert_no_worse, assert_same_outcome, value_and_gradients
from programs.families import FAMILIES, SDPA, families, plain_masked, rand, small, usual

CALLS = {
    "drop_in": lambda q, k, v, **options: tilebook.scaled_dot_product_attention(q, k, v, **options),
    "attention": lambda q, k, v, is_causal=False, **options: tilebook.attention(q, k, v, causal=is_causal, **options),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e-3, 3.0])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_any_scale_gives_pytorchs_numbers(device, call, scale, causal):
    """Those of its plainest path: its CPU kernel masks before it scales, and cuDNN makes NaN of some scales."""

    def plain(*qkv):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return SDPA(*qkv, scale=scale, is_causal=causal)

    assert_no_worse(
        lambda *qkv: CALLS[call](*qkv, scale=scale, is_causal=causal), plain, FAMILIES["attention"].leaves(device)
    )


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_any_scale_under_a_mask_gives_pytorchs_numbers(device, scale):
    *inputs, mask = FAMILIES["drop_in_mask"].leaves(device)
    added = torch.where(mask, 0.0, -math.inf).to(inputs[0].dtype)
    for each in (mask, added):
        assert_no_worse(
            lambda *args: tilebook.scaled_dot_product_attention(*args, scale=scale),
            lambda *args: plain_masked(*args, scale=scale),
            (*inputs, each),
        )


def test_slopes_that_are_learnt_have_their_gradient(device):
    q, k, v, slopes = FAMILIES["alibi"].leaves(device)
    assert_no_worse(
        FAMILIES["alibi"].ours, FAMILIES["alibi"].plain, (q, k, v, slopes.detach().clone().requires_grad_())
    )


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@families("softcap", "varlen", "decode")
def test_any_scale_of_attention_without_a_counterpart_is_followed(device, scale, family):
    """Scores of -s are those of -q; scores of 0 weigh all alike."""
    q, k, v, *rest = FAMILIES[family].leaves(device)
    most = len(q)

    def call(q, *tensors, factor):
        if family == "softcap":
            return tilebook.attention(q, *tensors, softcap=5.0, scale=factor)
        if family == "varlen":
            return tilebook.attention_varlen(q, *tensors, max_seqlen_q=most, max_seqlen_k=most, scale=factor)
        return tilebook.attention_decode(q, *tensors, scale=factor)

    assert_no_worse(
        lambda q, *tensors: call(q, *tensors, factor=scale),
        lambda q, *tensors: (
            call(q if scale else q * 0, *tensors, factor=abs(scale) or 1.0)
            if scale == 0
            else call(-q, *tensors, factor=-scale)
        ),
        (q, k, v, *rest),
    )


@pytest.mark.parametrize("call", CALLS)
def test_a_scale_that_is_a_number_of_another_library_is_taken(device, call):
    inputs = FAMILIES["attention"].leaves(device)
    for scale in (np.float64(0.3), np.float32(0.25), 1, torch.tensor(0.25)):
        ours, plain = (functools.partial(f, scale=scale) for f in (CALLS[call], SDPA))
        assert_same_outcome(ours, plain, inputs, calls=2)


@families("attention", "drop_in", "softcap", "varlen")
def test_a_scale_that_requires_a_gradient_has_it_or_is_refused(device, family):
    q, k, v, *rest = FAMILIES[family].leaves(device)
    scale = torch.tensor(0.3, device=device, requires_grad=True)
    for _ in range(4):
        try:
            if family == "drop_in":
                o = tilebook.scaled_dot_product_attention(q, k, v, scale=scale)
            elif family == "varlen":
                o = tilebook.attention_varlen(q, k, v, *rest, max_seqlen_q=99, max_seqlen_k=99, scale=scale)
            else:
                o = tilebook.attention(q, k, v, softcap=5.0 if family == "softcap" else 0.0, scale=scale)
        except TypeError:
            continue
        (grad,) = torch.autograd.grad(o.float().pow(2).sum(), scale)
        assert grad.abs() > 0


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_that_see_nothing_are_zero_and_so_are_their_gradients(device, call, dtype):
    if call == "drop_in" and device == "cuda":
        pytest.skip("there it is what PyTorch makes of it, a mean or NaN")
    generator = torch.Generator().manual_seed(5)
    n, width = small(64, device), small(64, device)
    q, k, v = (rand(generator, (2, 4, n, width), device, dtype).requires_grad_() for _ in range(3))
    mask = torch.ones(2, 1, n, n, dtype=torch.bool, device=device).tril()
    mask[:, :, 3] = False
    mask[1, :, 7:9] = False
    for each in (mask, mask[:1, 0], mask.expand(2, 4, n, n)) if device == "cuda" else (mask,):
        empty = ~each.any(-1).expand(2, 4, n)
        ours, plain = (functools.partial(f, attn_mask=each) for f in (CALLS[call], SDPA))
        for _ in range(4 if device == "cuda" else 1):
            o, dq, _, _ = value_and_gradients(ours, (q, k, v))
            assert not o[empty].any()
            assert not dq[empty].any()
        if dtype == torch.float32:  # PyTorch's other paths do not agree among themselves
            assert_no_worse(ours, plain, (q, k, v))


@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_drop_in_refuses_the_masks_that_pytorch_refuses(device, dtype, mask_dtype):
    q, k, v = FAMILIES["attention"].leaves(device, dtype)
    mask = torch.zeros(q.shape[2], k.shape[2], device=device, dtype=mask_dtype)
    assert_same_outcome(
        lambda *args: tilebook.scaled_dot_product_attention(*args),
        lambda *args: SDPA(*args),
        (q, k, v, mask),
    )


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right], ids=lambda make: make.__name__)
@pytest.mark.parametrize("sizes", [(96, 96), (40, 96)], ids=str)
def test_pytorchs_causal_biases_give_pytorchs_numbers(device, make, sizes):
    n_q, n_k = (small(n, device) for n in sizes)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        rand(generator, (2, 4, n, small(64, device)), device, usual(device)).requires_grad_() for n in (n_q, n_k, n_k)
    )
    bias = make(n_q, n_k)
    for each in (bias, bias.to(device) if n_q == n_k else bias):
        ours, plain = (functools.partial(f, attn_mask=each) for f in (tilebook.scaled_dot_product_attention, SDPA))
        assert_same_outcome(ours, plain, (q, k, v))
    with torch.device(device):
        bias = make(n_q, n_k)
    assert_same_outcome(
        lambda *qkv: tilebook.scaled_dot_product_attention(*qkv, attn_mask=bias),
        lambda *qkv: SDPA(*qkv, attn_mask=bias),
        (q, k, v),
    )


def test_one_seed_drops_the_same_again_and_another_does_not(device):
    q, k, v = FAMILIES["attention"].leaves(device)
    for call in (
        lambda: tilebook.attention(q, k, v, dropout_p=0.5),
        lambda: tilebook.scaled_dot_product_attention(q, k, v, dropout_p=0.5),
    ):
        found = []
        for seed in (1, 1, 2, 1):
            torch.manual_seed(seed)
            found.append(call())
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[3])
        assert not torch.equal(found[0], found[2])


def test_dropout_keeps_the_mean_and_its_gradient_drops_the_same(device):
    heads = (8, 8) if device == "cuda" else (2, 4)
    q = torch.zeros(*heads, 32, 32, device=device, dtype=usual(device), requires_grad=True)
    v = torch.ones(*heads, 32, 32, device=device, dtype=usual(device), requires_grad=True)
    for _ in range(4):
        o = tilebook.scaled_dot_product_attention(q, q, v, dropout_p=0.25)
        assert abs(o.float().mean().item() - 1) < 0.1
        (dv,) = torch.autograd.grad(o.float().sum(), v)
        # Each row of o is the sum of what was kept of v's rows, so both sums count what was kept.
        assert abs(dv.float().sum().item() - o.float().sum().item()) <= 0.01 * o.numel()


@pytest.mark.parametrize("p", [0.0, 1.0, 1.5, -0.5])
def test_the_drop_in_takes_the_dropout_that_pytorch_takes(device, p):
    inputs = FAMILIES["attention"].leaves(device)
    assert_same_outcome(
        lambda *qkv: tilebook.scaled_dot_product_attention(*qkv, dropout_p=p),
        lambda *qkv: SDPA(*qkv, dropout_p=p),
        inputs,
    )


WRONG = {
    "a mask and causal": lambda f, q, k, v: f(q, k, v, torch.ones(1, 1, device=q.device), is_causal=True),
    "a mask of integers": lambda f, q, k, v: f(q, k, v, torch.ones(1, 1, device=q.device, dtype=torch.int64)),
    "a mask of other sizes": lambda f, q, k, v: f(q, k, v, torch.ones(3, 5, device=q.device, dtype=torch.bool)),
    "other dtypes": lambda f, q, k, v: f(q, k.double(), v),
    "other head dimensions": lambda f, q, k, v: f(q, k[..., :-1], v),
    "other numbers of keys": lambda f, q, k, v: f(q, k, v[..., 1:, :]),
    "fewer heads": lambda f, q, k, v: f(q, k[:, :2], v[:, :2]),
    "three heads for four": lambda f, q, k, v: f(q, k[:, :3], v[:, :3], enable_gqa=True),
    "one axis": lambda f, q, k, v: f(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]),
    "no tensor": lambda f, q, k, v: f(q, None, v),
    "a list": lambda f, q, k, v: f(q, k.tolist(), v),
    "an unknown option": lambda f, q, k, v: f(q, k, v, causal=True),
    "too few": lambda f, q, k, v: f(q, k),
    "integers": lambda f, q, k, v: f(q.int(), k.int(), v.int()),
    "a scale that is text": lambda f, q, k, v: f(q, k, v, scale="0.5"),
    "causal as a number": lambda f, q, k, v: f(q, k, v, is_causal=1),
    "causal as nothing": lambda f, q, k, v: f(q, k, v, is_causal=None),
    "groups as a number": lambda f, q, k, v: f(q, k, v, enable_gqa=1),
    "scale by position": lambda f, q, k, v: f(q, k, v, None, 0.0, False, 0.5),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_drop_in_refuses_as_pytorch_refuses(device, what):
    q, k, v = FAMILIES["attention"].leaves(device)
    try:
        WRONG[what](SDPA, q, k, v)
    except Exception as refused:
        for _ in range(4):
            with pytest.raises(type(refused)):
                WRONG[what](tilebook.scaled_dot_product_attention, q, k, v)
    else:
        o = WRONG[what](tilebook.scaled_dot_product_attention, q, k, v)
        assert o.shape == WRONG[what](SDPA, q, k, v).shape
    tilebook.scaled_dot_product_attention(q, k, v)


REFUSED = {
    "window is a number": lambda q, k, v: tilebook.attention(q, k, v, window=4),
    "window is three numbers": lambda q, k, v: tilebook.attention(q, k, v, window=(1, 2, 3)),
    "window is text": lambda q, k, v: tilebook.attention(q, k, v, window="ab"),
    "window is negative": lambda q, k, v: tilebook.attention(q, k, v, window=(-2, 0)),
    "causal is a word": lambda q, k, v: tilebook.attention(q, k, v, causal="left"),
    "softcap is negative": lambda q, k, v: tilebook.attention(q, k, v, softcap=-1.0),
    "dropout is 1": lambda q, k, v: tilebook.attention(q, k, v, dropout_p=1.0),
    "bias is a list": lambda q, k, v: tilebook.attention(q, k, v, bias=[0.0]),
    "k is None": lambda q, k, v: tilebook.attention(q, None, v),
    "v is a number": lambda q, k, v: tilebook.attention(q, k, 1.0),
    "slopes are a list": lambda q, k, v: tilebook.attention(q, k, v, alibi_slopes=[1.0] * 4),
    "slopes are of another size": lambda q, k, v: tilebook.attention(q, k, v, alibi_slopes=q.new_ones(3).float()),
    "varlen: window is a number": lambda q, k, v: _varlen(q, window=4),
    "varlen: lengths are a list": lambda q, k, v: _varlen(q, lengths=[0, 8]),
    "varlen: lengths are floats": lambda q, k, v: _varlen(q, lengths=torch.tensor([0.0, 8.0], device=q.device)),
    "decode: window is a pair": lambda q, k, v: tilebook.attention_decode(q.detach(), k, v, window=(4, 0)),
    "decode: lengths are a list": lambda q, k, v: tilebook.attention_decode(q.detach(), k, v, seq_lens=[1, 1]),
    "rms_norm: a number": lambda q, k, v: tilebook.rms_norm(q, 1.0),
    "mlp: no weight": lambda q, k, v: tilebook.mlp(q, None, None, q[0, 0], None),
    "mlp: an unknown activation": lambda q, k, v: tilebook.mlp(q, k[0, 0], None, v[0, 0].mT, None, activation="silu"),
}


def _varlen(q, lengths=None, **options):
    rows = q.detach()[0].transpose(0, 1)
    ends = torch.tensor([0, len(rows)], dtype=torch.int32, device=q.device) if lengths is None else lengths
    return tilebook.attention_varlen(rows, rows, rows, ends, ends, max_seqlen_q=99, max_seqlen_k=99, **options)


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_argument_is_a_value_error(device, what):
    inputs = tuple(x.detach() for x in FAMILIES["attention"].leaves(device))
    not_a_tensor = what.endswith(("list", "k is None", "v is a number", "a number")) and "window" not in what
    refused = (ValueError, TypeError) if not_a_tensor else ValueError
    for _ in range(3):
        with pytest.raises(refused):
            REFUSED[what](*inputs)
    for _ in range(3):  # and after good calls
        tilebook.attention(*inputs)
    with pytest.raises(refused):
        REFUSED[what](*inputs)


def test_a_norm_without_a_weight_is_pytorchs_or_a_value_error(device):
    x, _ = FAMILIES["rms_norm"].leaves(device)
    for _ in range(4):
        try:
            y = tilebook.rms_norm(x, None)
        except ValueError:
            continue
        torch.testing.assert_close(y, F.rms_norm(x, x.shape[-1:], None, 1e-6), rtol=0.02, atol=0.02)
