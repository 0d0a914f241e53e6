"""Norms of sums, and of what lies transposed, called again and again: launched, recorded, repeated."""

import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import dispatch

pytestmark = pytest.mark.gpu


def _leaf(*shape, dtype, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def _step(norm, tensors, dys):
    results = norm(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    return *results, *torch.autograd.grad(
        results, tensors, [dy.to(y.dtype) for y, dy in zip(results, dys, strict=False)]
    )


def _near(found, theirs, truth):
    for mine, other, right in zip(found, theirs, truth, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        allowed = (other.double() - right).abs().max().item() + 1e-6 * right.abs().max().item()
        assert (mine.double() - right).abs().max().item() <= 2 * allowed


def _added(norm):
    def run(x, residual, *vectors):
        h = x + residual
        return norm(h, *vectors), h

    return run


def _layer(x, *vectors):
    return F.layer_norm(x, x.shape[-1:], *vectors)


def _rms(x, *vectors):
    return F.rms_norm(x, x.shape[-1:], *vectors, eps=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [768, 4096])
@pytest.mark.parametrize(
    ("ours", "theirs", "vectors"),
    [(tilebook.add_layer_norm, _added(_layer), 2), (tilebook.add_rms_norm, _added(_rms), 1)],
    ids=["layer", "rms"],
)
def test_norms_of_sums(ours, theirs, vectors, width, dtype):
    tensors = [_leaf(8, 123, width, dtype=dtype, seed=seed).requires_grad_() for seed in range(2)]
    tensors += [_leaf(width, dtype=dtype, seed=seed).requires_grad_() for seed in range(2, 2 + vectors)]
    dys = [_leaf(8, 123, width, dtype=dtype, seed=seed) for seed in (5, 6)]
    pytorch = _step(theirs, tensors, dys)
    truth = _step(theirs, [x.detach().double().requires_grad_() for x in tensors], dys)
    with dispatch.use("triton"):
        for _ in range(4):
            _near(_step(ours, tensors, dys), pytorch, truth)
    _near(_step(ours, tensors, dys), pytorch, truth)  # whoever serves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(128, 384, 196), (3, 384, 197), (2, 4096, 50), (5, 96, 14, 14)], ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs", "vectors"),
    [(tilebook.layer_norm, _layer, 2), (tilebook.rms_norm, _rms, 1)],
    ids=["layer", "rms"],
)
def test_norms_of_what_lies_transposed(ours, theirs, vectors, shape, dtype):
    x = _leaf(*shape, dtype=dtype, seed=0).movedim(1, -1).requires_grad_()
    tensors = [x, *(_leaf(shape[1], dtype=dtype, seed=seed).requires_grad_() for seed in range(1, 1 + vectors))]
    dys = [_leaf(*x.shape, dtype=dtype, seed=7)]
    pytorch = _step(theirs, tensors, dys)
    truth = _step(theirs, [each.detach().double().requires_grad_() for each in tensors], dys)
    with dispatch.use("triton"):
        for _ in range(4):
            found = _step(ours, tensors, dys)
            _near(found, pytorch, truth)
    assert [each.stride() for each in found[:2]] == [each.stride() for each in pytorch[:2]]


def test_no_copy_is_made_of_what_lies_transposed():
    x = _leaf(64, 384, 196, dtype=torch.float32, seed=0).transpose(1, 2)
    with dispatch.use("triton"), torch.no_grad():
        tilebook.layer_norm(x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = tilebook.layer_norm(x)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * y.numel() * y.itemsize
