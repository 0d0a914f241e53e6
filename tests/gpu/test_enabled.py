"""Programs that people have, run as they are with tilebook on: they give plain PyTorch's numbers."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from programs.hf_compiled import compiled
from programs.hf_models import CASES
from torch import nn

import tilebook

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_compiled_models_have_no_more_graphs_than_without_tilebook(name, kind):
    plain = compiled(name, kind, "cuda")
    with tilebook.enabled():
        assert compiled(name, kind, "cuda") == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("rows", [8, 20_000], ids=["short", "long"])
def test_norms_under_autocast_are_pytorchs(rows, cast, dtype):
    x = torch.randn(rows, 384, device="cuda", dtype=dtype).requires_grad_()
    weight, bias = (torch.randn(384, device="cuda", dtype=dtype).requires_grad_() for _ in range(2))

    def found():
        with torch.autocast("cuda", torch.bfloat16, enabled=cast):
            values = [F.layer_norm(x, (384,), weight, bias), F.rms_norm(x, (384,), weight, 1e-6)]
        loss = sum(y.float().square().sum() for y in values)
        return [*[y.detach() for y in values], *torch.autograd.grad(loss, (x, weight, bias))]

    right = found()
    with tilebook.enabled():
        for _ in range(4):
            for got, wanted in zip(found(), right, strict=True):
                assert got.dtype == wanted.dtype
                size = wanted.abs().max().item()
                torch.testing.assert_close(got, wanted, rtol=0.03, atol=2 * torch.finfo(dtype).eps * size)


class _Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x):
        return self.layer(x).float().square().mean()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_trained_model_converges_as_pytorchs_does(compiled):
    losses = []
    for on in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = _Encoder().cuda()
        called = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        x = torch.randn(64, 197, 384, device="cuda")
        with tilebook.enabled() if on else contextlib.nullcontext():
            for _ in range(20):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = called(x)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
