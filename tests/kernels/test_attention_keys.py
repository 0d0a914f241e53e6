"""Attention under masks of keys, which all rows have: what is hidden at the ends is not visited, gaps are masked."""

import pytest
import torch
from attention_formula import DEVICE, agree, shapes

import tilebook
from tilebook import dispatch

N = 150
HIDDEN = {
    "nothing": lambda mask: mask,
    "the end": lambda mask: mask.index_fill(-1, torch.arange(70, N), False),
    "the end, at a block's": lambda mask: mask.index_fill(-1, torch.arange(64, N), False),
    "the beginning": lambda mask: mask.index_fill(-1, torch.arange(70), False),
    "both": lambda mask: mask.index_fill(-1, torch.cat([torch.arange(67), torch.arange(75, N)]), False),
    "one key": lambda mask: mask.index_fill(-1, torch.tensor([64]), False),
    "all but one": lambda mask: mask.index_fill(-1, torch.cat([torch.arange(127), torch.arange(128, N)]), False),
    "all": torch.zeros_like,
}
FORMS = [
    {}, {"causal": True}, {"window": (20, 0)}, {"window": (5, 40)}, {"causal": True, "softcap": 3.0},
    {"causal": "bottom_right"},
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_keys(form, hidden):
    """Of one sequence; the other one of the batch has gaps."""
    mask = torch.ones(2, 1, 1, N, dtype=torch.bool)
    mask[0] = HIDDEN[hidden](mask[0])
    mask[1, ..., 3:140:5] = False
    agree(form | {"attn_mask": mask.to(DEVICE)}, shapes(70, N, 4, 2, 16, batch=2))


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 1, N), (2, 4, 1, N), (2, 1, 1, 1), (1, 1, 1, N), (1, 1, 1, 1)])
def test_masks_of_heads_and_of_all_keys_at_once(shape, alike):
    mask = torch.arange(N) < torch.randint(1, N + 1, (*shape[:3], 1), generator=torch.Generator().manual_seed(0))
    mask = mask[..., : shape[-1]]
    if alike:
        mask = torch.ones_like(mask)
    agree({"causal": True, "attn_mask": mask.to(DEVICE)}, shapes(70, N, 4, 2, 16, batch=2))


def test_every_third_column_of_a_larger_mask():
    mask = (torch.arange(3 * N) < 300).expand(2, 1, 1, 3 * N)[..., ::3]
    agree({"attn_mask": mask.to(DEVICE)}, shapes(70, N, 2, 2, 16, batch=2))


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_hidden_keys_are_not_looked_at(causal):
    q, k, v = (torch.randn(1, 2, 192, 16, device=DEVICE, dtype=torch.float16) for _ in range(3))
    mask = torch.zeros(1, 1, 1, 192, dtype=torch.bool, device=DEVICE)
    mask[..., 64:100] = True
    for x in (k, v):
        x[:, :, :64], x[:, :, 128:] = float("nan"), float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with dispatch.use("triton"):
        o = tilebook.attention(*leaves, causal=causal, attn_mask=mask)
        dq, dk, dv = torch.autograd.grad(o, leaves, torch.randn_like(o))
    assert o.isfinite().all()
    assert dq.isfinite().all()
    for x in (dk, dv):
        assert x[:, :, 64:100].isfinite().all()
        assert not x[:, :, :64].any()
        assert not x[:, :, 100:].any()
