"""Tensors as programs have them: strided, expanded, cut out of others, unaligned, empty, one long."""

import math

import pytest
import torch
import torch.nn.functional as F

import tilebook
from programs.compare import assert_no_worse, assert_same_outcome, value_and_gradients
from programs.families import (
    BLOCKS,
    FAMILIES,
    SDPA,
    WHOLE,
    composed,
    families,
    plain_masked,
    plain_mlp,
    plain_norm,
    rand,
    usual,
)
from programs.isolated import alone_on_a_gpu, each


def _transposed(x):
    return x.transpose(-2, -3).contiguous().transpose(-2, -3) if x.ndim > 2 else x.mT.contiguous().mT


def _every_other(x):
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


def _one_off(x):
    buffer = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    return buffer.copy_(x)


def _cut_out(x):
    wide = torch.cat([x[..., :1], x, x[..., :2]], -1)
    return wide[..., 1:-2]


def _one_for_all(x):
    return x[:1].expand_as(x)


def _overlapping(x):
    """Each row begins one element after the last one."""
    x = x.contiguous()
    return x.as_strided(x.shape, (*x.stride()[:-2], 1, 1))


LAYOUTS = {
    "transposed": _transposed,
    "every other element": _every_other,
    "one element off": _one_off,
    "cut out of a larger one": _cut_out,
    "one for all": _one_for_all,
    "overlapping": _overlapping,
}


def laid_out(x, layout):
    """The tensor, or other numbers of its shape, in this layout; sequence lengths stay what they are."""
    if x.dtype == torch.int32 and layout in ("one for all", "overlapping"):
        return x
    if x.ndim == 1 and layout in ("transposed", "overlapping"):
        return x
    return LAYOUTS[layout](x.detach()).requires_grad_(x.requires_grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@alone_on_a_gpu
def test_tensors_of_any_layout_give_pytorchs_numbers(device, layout):
    def body(name):
        family = FAMILIES[name]
        inputs = tuple(laid_out(x, layout) for x in family.leaves(device))
        assert_no_worse(family.ours, family.plain, inputs)

    # PyTorch's CPU kernel itself errs where the heads of a sequence overlap.
    each([name for name in FAMILIES if device == "cuda" or (name, layout) != ("varlen", "overlapping")], body)


WITHOUT_OPTIONS = [*WHOLE, "drop_in_mask", "decode"]


def _one_after_another_changed(device, layouts, names):
    def body(which):
        layout, name = which.split(": ")
        family = FAMILIES[name]
        inputs = family.leaves(device)
        assert_no_worse(family.ours, family.plain, inputs)
        for i, x in enumerate(inputs):
            changed = (*inputs[:i], laid_out(x, layout), *inputs[i + 1 :])
            assert_no_worse(family.ours, family.plain, changed, calls=2, what=f"input {i}")

    each([f"{layout}: {name}" for layout in layouts for name in names], body)


# On a GPU a process for each layout of each kind: cuDNN builds a graph, and Triton compiles, for each new one.
@pytest.mark.parametrize("layout", LAYOUTS)
@alone_on_a_gpu
def test_one_tensor_of_another_layout_after_good_calls_gives_pytorchs_numbers(device, layout):
    _one_after_another_changed(device, [layout], ["decode"] if device == "cpu" else WITHOUT_OPTIONS)


@pytest.mark.parametrize("layout", LAYOUTS)
@alone_on_a_gpu
def test_one_tensor_of_another_layout_beside_options_gives_pytorchs_numbers(device, layout):
    others = [name for name in FAMILIES if name not in (*WITHOUT_OPTIONS, *BLOCKS)]
    _one_after_another_changed(device, [layout], ["softcap"] if device == "cpu" else others)


@alone_on_a_gpu
def test_one_tensor_of_another_layout_of_a_block_gives_pytorchs_numbers(device):
    _one_after_another_changed(device, LAYOUTS, BLOCKS)


def test_a_weight_with_a_stride_gives_pytorchs_numbers(device):
    x, weight = FAMILIES["rms_norm"].leaves(device)
    strided = torch.randn(len(weight), 2, device=device, dtype=x.dtype)[:, 0].requires_grad_()
    assert not strided.is_contiguous()
    assert_no_worse(tilebook.rms_norm, plain_norm, (x, strided))
    assert_no_worse(tilebook.rms_norm, plain_norm, (x, weight))


def test_one_weight_expanded_to_all_columns_gives_pytorchs_numbers(device):
    x, weight = FAMILIES["rms_norm"].leaves(device)
    expanded = torch.randn(300, device=device, dtype=x.dtype)[:1].expand_as(weight).requires_grad_()
    assert_no_worse(tilebook.rms_norm, plain_norm, (x, expanded))


@pytest.mark.parametrize("layout", ["every other element", "one for all", "one element off"])
def test_biases_with_a_stride_give_pytorchs_numbers(device, layout):
    x, w1, b1, w2, b2 = FAMILIES["mlp"].leaves(device, torch.bfloat16)
    assert_no_worse(tilebook.mlp, plain_mlp, (x, w1, laid_out(b1, layout), w2, b2), what="b1")
    assert_no_worse(tilebook.mlp, plain_mlp, (x, w1, b1, w2, laid_out(b2, layout)), what="b2")


def test_one_zero_expanded_to_a_bias_gives_pytorchs_numbers(device):
    x, w1, b1, w2, b2 = FAMILIES["mlp"].leaves(device, torch.bfloat16)
    zero = torch.zeros(1, device=device, dtype=x.dtype)
    inputs = x, w1, zero.expand_as(b1).requires_grad_(), w2, zero.expand_as(b2).requires_grad_()
    assert_no_worse(tilebook.mlp, plain_mlp, inputs)


@families("attention", "drop_in", "gqa", "varlen", "decode")
def test_keys_and_values_expanded_with_a_stride_of_zero_give_pytorchs_numbers(device, family):
    family = FAMILIES[family]
    q, k, v, *rest = family.leaves(device)
    for axis in range(k.ndim - 1):
        key, value = (x.detach().narrow(axis, 0, 1).expand_as(x).requires_grad_(x.requires_grad) for x in (k, v))
        assert_no_worse(family.ours, family.plain, (q, key, value, *rest), what=f"axis {axis}")


@pytest.mark.parametrize("causal", [False, True])
def test_broadcast_keys_of_pytorchs_own_tests_are_served(device, causal):
    """Of its `test_cudnn_attention_broadcast_stride_zero`: heads and batch of k and v that are one, expanded."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(3)
    for shape in ((1, 4, 31, 64), (2, 1, 31, 64), (1, 1, 31, 64)):
        q = rand(generator, (2, 4, 31, 64), device, dtype).requires_grad_()
        k, v = (rand(generator, shape, device, dtype).expand(2, 4, 31, 64).requires_grad_() for _ in range(2))
        assert_no_worse(
            lambda q, k, v: tilebook.scaled_dot_product_attention(q, k, v, is_causal=causal),
            lambda q, k, v: SDPA(q, k, v, is_causal=causal),
            (q, k, v),
            what=str(shape),
        )


def test_sequence_lengths_with_a_stride_are_followed(device):
    q, k, v, ends, _ = FAMILIES["varlen"].leaves(device)
    both = torch.stack([ends, ends + 1000], 1).to(torch.int32)[:, 0]
    assert_no_worse(FAMILIES["varlen"].ours, FAMILIES["varlen"].plain, (q, k, v, both, both))
    q, k, v = FAMILIES["decode"].leaves(device)
    lens = torch.tensor([[37, 9999], [11, 9999]], dtype=torch.int32, device=device)[:, 0]
    mask = torch.arange(k.shape[2], device=device) < lens[:, None, None, None]
    assert_no_worse(
        lambda *qkv: tilebook.attention_decode(*qkv, seq_lens=lens),
        lambda *qkv: plain_masked(*qkv, mask, enable_gqa=True),
        (q, k, v),
    )


def test_slopes_with_a_stride_are_followed(device):
    q, k, v, slopes = FAMILIES["alibi"].leaves(device)
    assert_no_worse(FAMILIES["alibi"].ours, FAMILIES["alibi"].plain, (q, k, v, laid_out(slopes, "every other element")))


EMPTY = {
    "no sequences": (0, 4, 16, 32),
    "no heads": (2, 0, 16, 32),
    "no queries": (2, 4, 0, 32),
}


@pytest.mark.parametrize("what", [*EMPTY, "no keys"])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"causal": True}, {"return_lse": True}], ids=str)
def test_attention_of_nothing_is_what_pytorch_makes_of_it(device, what, options):
    dtype, shape = usual(device), EMPTY.get(what, (2, 4, 16, 32))
    q = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    kv_shape = (*shape[:2], 0 if what == "no keys" else 16, 32)
    k, v = (torch.randn(kv_shape, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    for _ in range(4):
        o = tilebook.attention(q, k, v, **options)
        if options.get("return_lse"):
            o, lse = o
            assert lse.shape == q.shape[:-1]
            assert (lse == -math.inf).all()
        assert o.shape == q.shape
        assert not o.any()
        assert [x.shape for x in torch.autograd.grad(o.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("what", [*EMPTY, "no keys"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_drop_in_on_nothing_is_what_pytorch_makes_of_it(device, what, causal):
    if what == "no heads" and device == "cpu" and torch.__version__ < "2.12":
        pytest.skip("PyTorch's function divides by the number of heads, and ends the process")
    dtype, shape = usual(device), EMPTY.get(what, (2, 4, 16, 32))
    q = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    kv_shape = (*shape[:2], 0 if what == "no keys" else 16, 32)
    k, v = (torch.randn(kv_shape, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    assert_same_outcome(
        lambda *qkv: tilebook.scaled_dot_product_attention(*qkv, is_causal=causal),
        lambda *qkv: SDPA(*qkv, is_causal=causal),
        (q, k, v),
    )


def test_a_pack_of_nothing_is_nothing(device):
    dtype = usual(device)
    for ends in ([0], [0, 0], [0, 0, 0]):
        q, k, v = (torch.randn(0, 4, 64, device=device, dtype=dtype).requires_grad_() for _ in range(3))
        cu = torch.tensor(ends, dtype=torch.int32, device=device)
        for _ in range(4):
            o = tilebook.attention_varlen(q, k, v, cu, cu, max_seqlen_q=0, max_seqlen_k=0)
            assert o.shape == (0, 4, 64)
            assert [x.shape for x in torch.autograd.grad(o.sum(), (q, k, v))] == [(0, 4, 64)] * 3


def test_sequences_without_keys_are_zero(device):
    dtype = usual(device)
    q = torch.randn(40, 4, 64, device=device, dtype=dtype).requires_grad_()
    k, v = (torch.randn(0, 4, 64, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    cu_q = torch.tensor([0, 30, 31, 40], dtype=torch.int32, device=device)
    cu_k = torch.zeros_like(cu_q)
    for _ in range(4):
        o = tilebook.attention_varlen(q, k, v, cu_q, cu_k, max_seqlen_q=40, max_seqlen_k=0)
        assert not o.any()
        assert not any(x.any() for x in torch.autograd.grad(o.sum(), (q, k, v)))


def test_decoding_nothing_is_nothing(device):
    dtype = usual(device)
    for batch, heads, seq_q, seq_k in ((0, 4, 1, 20), (2, 0, 1, 20), (2, 4, 0, 20), (2, 4, 1, 0)):
        q = torch.randn(batch, heads, seq_q, 64, device=device, dtype=dtype)
        k, v = (torch.randn(batch, heads, seq_k, 64, device=device, dtype=dtype) for _ in range(2))
        for _ in range(4):
            o, lse = tilebook.attention_decode(q, k, v, return_lse=True)
            assert o.shape == q.shape
            assert not o.any()
            assert (lse == -math.inf).all()


def test_blocks_on_no_rows_are_what_pytorch_makes_of_them(device):
    for name in BLOCKS:
        family = FAMILIES[name]
        x, *rest = family.leaves(device)
        for shape in ((0, x.shape[-1]), (2, 0, x.shape[-1]), (0, 3, x.shape[-1])):
            nothing = x.new_empty(shape).requires_grad_()
            assert_same_outcome(family.ours, family.plain, (nothing, *rest))


@families()
def test_one_row_gives_pytorchs_numbers(device, family):
    family = FAMILIES[family]
    if family.name in BLOCKS:
        x, *rest = family.leaves(device)
        assert_no_worse(family.ours, family.plain, (x[..., :1, :].detach().requires_grad_(), *rest))
        assert_no_worse(family.ours, family.plain, (x.detach().flatten(0, -2)[0].requires_grad_(), *rest))
    elif family.name in ("attention", "causal", "drop_in", "softcap", "decode"):
        q, k, v = (x.detach()[:, :, :1].requires_grad_(x.requires_grad) for x in family.leaves(device))
        assert_no_worse(family.ours, family.plain, (q, k, v))
    else:
        pytest.skip("its other tensors are of its lengths")


@pytest.mark.parametrize(("width", "width_v"), [(20, 20), (64, 32), (7, 7), (1, 1), (264, 264)])
def test_the_drop_in_takes_head_dimensions_that_no_kernel_has(device, width, width_v):
    dtype = usual(device)
    q, k = (torch.randn(2, 4, 33, width, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    v = torch.randn(2, 4, 33, width_v, device=device, dtype=dtype).requires_grad_()
    assert_same_outcome(tilebook.scaled_dot_product_attention, SDPA, (q, k, v))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_the_drop_in_takes_any_number_of_batch_dimensions(device, lead):
    q, k, v = (torch.randn(*lead, 33, 32, device=device, dtype=usual(device)).requires_grad_() for _ in range(3))
    assert_same_outcome(tilebook.scaled_dot_product_attention, SDPA, (q, k, v))


def test_batch_dimensions_that_broadcast_give_pytorchs_numbers(device):
    dtype = usual(device)
    q = torch.randn(2, 4, 33, 32, device=device, dtype=dtype).requires_grad_()
    k, v = (torch.randn(1, 4, 33, 32, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    assert_same_outcome(tilebook.scaled_dot_product_attention, SDPA, (q, k, v))


def test_an_output_expanded_gradient_is_followed(device):
    for name in ("attention", "softcap", "varlen", "mlp", "rms_norm"):
        family = FAMILIES[name]
        inputs = family.leaves(device)
        needed = [x for x in inputs if x.requires_grad]
        for reduce in (torch.sum, torch.mean, lambda x: x[..., 0].sum(), lambda x: x.mT.reshape(-1)[::3].sum()):
            ours = torch.autograd.grad(reduce(family.ours(*inputs)).float(), needed)
            plain = torch.autograd.grad(reduce(family.plain(*inputs)).float(), needed)
            for got, right in zip(ours, plain, strict=True):
                torch.testing.assert_close(got, right, rtol=0.03, atol=0.03 * right.abs().max().item() + 1e-6)


def test_composed_attention_is_what_pytorch_computes(device):
    """The yardstick of options that PyTorch's function does not have, beside it where it has them."""
    q, k, v = FAMILIES["gqa"].leaves(device, torch.float32)
    truth = value_and_gradients(lambda *qkv: SDPA(*qkv, enable_gqa=True), (q, k, v))
    got = value_and_gradients(composed, (q, k, v))
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert F.scaled_dot_product_attention is SDPA
