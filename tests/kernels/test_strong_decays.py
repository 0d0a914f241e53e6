"""Decays that leave a millionth of what was before: gradients as small, which are no difference of large numbers."""

import pytest
import torch

import tilebook
from tilebook import dispatch

STRONG = -13.8
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")


def linear_state(q, k, v, given, decays):
    return tilebook.gated_linear_attention(q, k, v, decays, initial_state=given, return_state=True)[1]


def memory(q, k, v, given, decays):
    return tilebook.mlstm(q, k, v, given, decays, return_state=True)[1][0]


FAMILIES = {  # what is asked of, and the shape of what it is given besides
    "linear attention": (linear_state, (1, 2, 16, 16)),
    "mLSTM": (memory, (1, 2, 40)),
}


@pytest.mark.parametrize("route", ["torch", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_as_small_as_what_passes(family, route):
    """The last state asks what tokens leave, most of all the last."""
    state, shape = FAMILIES[family]
    source = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*each, generator=source) for each in (*[(1, 2, 40, 16)] * 3, shape)]
    tensors.append(torch.full((1, 2, 40), STRONG))

    def gradient(tensors):
        tensors = [x.requires_grad_() for x in tensors]
        found = state(*tensors)
        return torch.autograd.grad(found, tensors[-1], torch.ones_like(found))[0]

    with dispatch.use(route):
        found = gradient([x.clone() for x in tensors])
    right = gradient([x.double() for x in tensors])
    assert (found - right).square().mean().sqrt() <= 1e-4 * right.square().mean().sqrt()
