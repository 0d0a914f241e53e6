"""Masks and biases as programs have them: cut out of larger ones, of fewer axes than the scores."""

import pytest
import torch

import tilebook
from programs.compare import assert_no_worse, assert_same_outcome
from programs.families import FAMILIES, SDPA, plain_masked, rand, usual
from programs.isolated import alone_on_a_gpu


def _masked(q, k, v, mask):
    return tilebook.scaled_dot_product_attention(q, k, v, mask)


def _attention_masked(q, k, v, mask):
    return tilebook.attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("size", [(5, 7, 16), (5, 5, 64), (96, 96, 64), (31, 77, 32), (64, 128, 128)], ids=str)
@pytest.mark.parametrize("kind", ["boolean", "added"])
@alone_on_a_gpu
def test_masks_cut_out_of_larger_ones_give_pytorchs_numbers(device, kind, size):
    dtype = usual(device)
    generator = torch.Generator().manual_seed(2)
    large = torch.randn(7, 131, 137, generator=generator)
    large = (large > -0.5).to(device) if kind == "boolean" else large.to(device, dtype)
    wrong, (seq_q, seq_k, width) = [], size
    if device == "cpu" and seq_q > 5:
        pytest.skip("the sizes are of kernels that run on a GPU")
    q, k, v = (rand(generator, (2, 4, n, width), device, dtype).requires_grad_() for n in (seq_q, seq_k, seq_k))
    for name, mask in {
        "one column in": large[0, :seq_q, 1 : 1 + seq_k],
        "three rows and five columns in": large[0, 3 : 3 + seq_q, 5 : 5 + seq_k],
        "of a head each": large[1:5, :seq_q, 7 : 7 + seq_k],
        "one column for all": large[0, :seq_q, 3:4],
        "one row for all": large[0, 2:3, 1 : 1 + seq_k],
        "one number for all": large[0, 2:3, 1:2],
    }.items():
        for call in (_masked, _attention_masked):
            if call is _masked and device == "cuda":  # what sees nothing, PyTorch's kernels give a mean or NaN
                unseen = ~mask.any(-1, True) if kind == "boolean" else torch.zeros_like(mask[..., :1], dtype=torch.bool)
                mask = torch.where(unseen, True, mask) if kind == "boolean" else mask
            try:
                assert_no_worse(call, plain_masked, (q, k, v, mask))
            except (AssertionError, ValueError) as failure:
                wrong.append(f"{call.__name__} {seq_q}×{seq_k}, {name}: {failure}")
    assert not wrong, "\n".join(wrong)


def test_a_bias_cut_out_of_a_larger_one_has_pytorchs_gradient(device):
    q, k, v, bias = FAMILIES["bias"].leaves(device)
    _, rows, columns = bias.shape
    table = torch.randn(4, rows + 5, columns + 7, device=device, dtype=q.dtype)
    cut = table[:, 1 : 1 + rows, 3 : 3 + columns].requires_grad_()
    assert_no_worse(
        lambda q, k, v, bias: tilebook.attention(q, k, v, bias=bias),
        lambda q, k, v, bias: plain_masked(q, k, v, bias.contiguous()),
        (q, k, v, cut),
    )


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3)])
@pytest.mark.parametrize("columns", [33, 48])
def test_the_drop_in_takes_a_mask_beside_any_number_of_batch_dimensions(device, lead, axes, columns):
    q = torch.randn(*lead, 33, 32, device=device, dtype=usual(device)).requires_grad_()
    k, v = (torch.randn(*lead, columns, 32, device=device, dtype=q.dtype).requires_grad_() for _ in range(2))
    mask = torch.rand((*lead, 33, columns)[-axes:], device=device) < 0.7
    if axes > len(lead) + 2:
        pytest.skip("more than there are")
    mask[..., 0] = True
    for given in (mask, torch.where(mask, 0.5, -torch.inf).to(q.dtype)):

        def ours(q, k, v, given=given):
            return tilebook.scaled_dot_product_attention(q, k, v, attn_mask=given)

        def plain(q, k, v, given=given):
            return SDPA(q, k, v, attn_mask=given if given.dtype == torch.bool else given.to(q.dtype))

        assert_same_outcome(ours, plain, (q, k, v))
