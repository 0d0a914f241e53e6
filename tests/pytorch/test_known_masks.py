"""A mask of `tilebook.attention` that PyTorch serves starts at whole vectors, in the dtype that its kernels take."""

import pytest
import torch
from op_samples import data

import tilebook
from tilebook.kernels.attention import learned, pytorch
from tilebook.layout import VECTOR

SDPA = pytorch.scaled_dot_product_attention


@pytest.fixture
def given(here, monkeypatch):
    """All calls are PyTorch's; the masks that its function is given, with the dtype of q."""
    here.native, masks = True, []

    def sdpa(q, k, v, mask=None, **options):
        masks.append((q.dtype, mask))
        return SDPA(q, k, v, mask, **options)

    monkeypatch.setattr(pytorch, "scaled_dot_product_attention", sdpa)
    return masks


def qkv(columns, dtype):
    return data(2, 4, 6, 16, dtype=dtype), *(data(2, 4, columns, 16, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_in_one_piece_that_starts_anywhere_is_copied(given, dtype):
    q, k, v = qkv(16, dtype)
    bias = torch.randn(1 + 2 * 4 * 6 * 16).to(dtype)[1:].view(2, 4, 6, 16)
    expected = SDPA(q, k, v, bias.clone())
    for _ in range(4):
        torch.testing.assert_close(tilebook.attention(q, k, v, bias=bias), expected)
    assert len(given) == 4
    assert not any(mask.data_ptr() % VECTOR for _, mask in given)


@pytest.mark.parametrize("kind", ["shown", "added"])
def test_a_call_that_is_known_without_autocast_has_its_dtype_and_gaps_under_it(given, kind):
    q, k, v = qkv(13, torch.float32)
    mask = torch.randn(1, 4, 6, 13)
    mask = mask > 0 if kind == "shown" else mask
    for _ in range(3):
        tilebook.attention(q, k, v, attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        o = tilebook.attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(o, SDPA(q, k, v, mask))
    dtype, passed = given[-1]
    assert (dtype, passed.dtype, passed.stride(-2)) == (torch.bfloat16, torch.bfloat16, 16)


def test_a_bias_that_learns_is_of_autocasts_dtype_in_calls_that_are_known_without_it(given, monkeypatch):
    seen = []

    def attention(q, k, v, bias, scale):
        seen.append({q.dtype, k.dtype, v.dtype, bias.dtype})
        return SDPA(q, k, v, bias, scale=scale)

    monkeypatch.setattr(learned, "efficient", lambda *_: True)
    monkeypatch.setattr(learned, "attention", attention)
    q, k, v = qkv(16, torch.float32)
    bias = torch.randn(1, 4, 6, 16, requires_grad=True)
    for _ in range(3):
        tilebook.attention(q, k, v, bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert tilebook.attention(q, k, v, bias=bias).dtype == torch.bfloat16
    assert seen == [{torch.float32}] * 3 + [{torch.bfloat16}]
