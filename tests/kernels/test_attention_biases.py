"""Attention under biases and masks that are tensors, alone and beside a causal mask."""

import itertools
import math

import pytest
import torch
from attention_formula import BACKWARD, DEVICE, FORWARD, agree, formula, shapes, tensors

import tilebook
from tilebook import dispatch
from tilebook.kernels.attention import entry, pytorch
from tilebook.kernels.attention.form import form
from tilebook.kernels.attention.peers import cudnn
from tilebook.kernels.attention.peers import torch as theirs


@pytest.mark.parametrize("shape", [(2, 4, 40, 50), (1, 4, 40, 50), (2, 1, 1, 50), (40, 50), (1, 1, 40, 1)])
def test_biases_broadcast_and_have_gradients(shape):
    (bias,) = tensors(shape, dtype=torch.float16)
    agree({"bias": bias}, shapes(40, 50, heads=4, heads_kv=2, batch=2), tolerance=8e-3)


_CUTS = {
    "whole": lambda whole: whole[..., :56],
    "begun within a vector": lambda whole: whole[..., 4:60],
    "by columns": lambda whole: whole[..., :40, :56].mT,
    "every other": lambda whole: whole[..., ::2][..., :56],
    "of one head": lambda whole: whole[:, :1, :, :56],
    "of odd rows": lambda whole: whole.flatten(2)[..., : 40 * 127].unflatten(2, (40, 127))[..., :56],
}


@pytest.mark.parametrize("cut", _CUTS)
def test_rows_of_whole_vectors_are_loaded_as_such_wherever_they_lie(cut):
    (whole,) = tensors((2, 4, 56, 128), dtype=torch.float16)
    table = _CUTS[cut](whole)[:, :, :40]
    agree({"bias": table}, shapes(40, table.shape[-1], heads=4, heads_kv=2, batch=2), tolerance=8e-3)
    agree({"attn_mask": table > -0.3}, shapes(40, table.shape[-1], heads=4, heads_kv=2, batch=2))


@pytest.mark.parametrize("shape", [(2, 1, 1, 50), (1, 4, 40, 50), (40, 50)])
def test_boolean_masks_broadcast(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    agree({"attn_mask": mask}, shapes(40, 50, heads=4, heads_kv=2, batch=2))


def test_float_masks_and_masks_beside_biases():
    q, k, v, bias = tensors(*shapes(30, 40), (30, 40), dtype=torch.float16)
    mask = torch.rand(30, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    with dispatch.use("triton"):
        both = tilebook.attention(q, k, v, bias=bias, attn_mask=mask)
        added = tilebook.attention(q, k, v, attn_mask=bias.masked_fill(~mask, -math.inf))
    assert torch.equal(both, added)
    truth, _ = formula(q.double(), k.double(), v.double(), bias=bias.double(), attn_mask=mask)
    torch.testing.assert_close(both.double(), truth, rtol=1e-2, atol=4e-3)


_FOLDED = list(itertools.product((1, 2), (1, 4), (False, True), (False, True), ("mask", "bias", "dbias")))


@pytest.mark.parametrize(("n_q", "n_k"), [(9, 9), (7, 12), (12, 7)])
def test_a_causal_mask_and_another_are_one_to_pytorch(n_q, n_k):
    for batch, heads, rows, columns, kind in _FOLDED:
        shape = batch, heads, n_q if rows else 1, n_k if columns else 1
        q, k, v, do, bias = tensors((2, 4, n_q, 8), *[(2, 2, n_k, 8)] * 2, (2, 4, n_q, 8), shape, dtype=torch.float32)
        leaves = [q, k, v] if kind != "dbias" else [q, k, v, bias]
        options = {"attn_mask": bias > 0} if kind == "mask" else {"bias": bias}
        for each in leaves:
            each.requires_grad_()
        one = pytorch.causally(bias > 0 if kind == "mask" else bias, n_q, n_k)
        assert one.shape == (batch, heads, n_q, n_k)
        o = pytorch.sdpa(q, k, v, False, None, one)
        truth, lse = formula(q, k, v, **options, causal=True)
        right = truth, *torch.autograd.grad(truth, leaves, do)
        for got, want in zip((o, *torch.autograd.grad(o, leaves, do)), right, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        its, extra = form(right=0, bias=kind), (bias > 0 if kind == "mask" else bias)
        with torch.no_grad():
            o, found = FORWARD.implementations["torch"](q, k, v, its, 8**-0.5, extra)
            grads = BACKWARD.implementations["torch"](do, q, k, v, o, found, its, 8**-0.5, extra)
        for got, want in zip((o, found, *grads), (truth, lse, *right[1:]), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_under_a_causal_mask_and_a_bias_gradients_are_differentiated_again():
    q, k, v, bias = tensors(*shapes(9, 9), (9, 9), dtype=torch.float64 if DEVICE == "cpu" else torch.float32)

    def twice(attend):
        x = q.detach().requires_grad_()
        (first,) = torch.autograd.grad(attend(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    ours = twice(lambda x: tilebook.attention(x, k, v, causal=True, bias=bias))
    right = twice(lambda x: formula(x, k, v, causal=True, bias=bias)[0])
    torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_where_cudnn_serves_a_mask_its_kernel_alone_is_timed(causal, monkeypatch):
    (q, k, v), (bias,) = tensors(*shapes(8, 8)), tensors((1, 1, 8, 8))
    its, o, lse = form(right=0 if causal else -1, bias="bias"), q, torch.zeros(q.shape[:3])
    calls = []
    for (op, *given), tensors_before in (((FORWARD, q, k, v), 3), ((BACKWARD, q, q, k, v, o, lse), 6)):
        monkeypatch.setattr(theirs, "_masked", lambda *args: None)
        assert len(op.implementations["torch"].to_time(*given, its, 0.5, bias)) == (2 if op is FORWARD else 3)
        monkeypatch.setattr(theirs, "_masked", lambda *args: cudnn)
        alone = theirs._alone(None, lambda *args: calls.append(args), tensors_before // 6, tensors_before)
        alone(*given, its, 0.5, bias)
        *same, found, scale, mask = calls[-1]
        assert all(a is b for a, b in zip(same, given, strict=True))
        assert (found.causal, found.bias, scale) == (False, "bias", 0.5)
        assert mask is bias if not causal else torch.equal(mask, pytorch.causally(bias, 8, 8))


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_small_gradients_beside_a_bias_are_our_kernels_whoever_is_ahead(monkeypatch, bound, native, biased):
    """PyTorch's are launches behind launches that make its mask, which costs the host most."""
    q, k, v, o, dy = (torch.randn(1, 2, 8, 16) for _ in range(5))
    lse, bias = torch.zeros(1, 2, 8), torch.randn(1, 2, 8, 8)
    ran = []

    class Chosen:
        def __init__(self, name):
            self.name, self.native = name, native

        def __call__(self, *args):
            ran.append(self.name)
            return q, k, v

    monkeypatch.setattr(entry.dispatch, "lookup", lambda op, args: Chosen("ahead"))
    monkeypatch.setattr(entry.dispatch, "own", lambda choice: Chosen("ours"))
    monkeypatch.setattr(entry, "_host_bound", lambda q, k: bound)
    told = form(right=0, bias="bias") if biased else form(right=0)
    tensors = q, k, v, bias if biased else None, None, None
    entry._backward(dy, tensors, (o, lse), (told, 0.25), (True, True, True, False, False, False))
    assert ran == ["ours" if bound and native and biased else "ahead"]
