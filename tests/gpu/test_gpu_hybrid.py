"""Linear attention in layers of models, on the GPU that is here."""

import copy

import pytest
import torch
from torch import nn

import tilebook.nn as ours

pytestmark = pytest.mark.gpu

ROWS = 700


def encoder(dtype):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 512, 0.0, batch_first=True, device="cuda", dtype=dtype)
    return nn.TransformerEncoder(layer, 2)


def drawn(dtype):
    x = torch.randn(3, ROWS, 256, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(dtype)
    return x, torch.arange(ROWS, device="cuda") >= torch.tensor([ROWS, 5, 333], device="cuda")[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_a_hybrid_is_that_of_fp64_on_the_cpu(dtype, causal):
    model, (x, padding) = encoder(dtype), drawn(dtype)
    wide = copy.deepcopy(model).double().cpu()
    for each in (model, wide):
        ours.hybrid(each, exact_every=2, causal=causal)
    seen = ~padding.cpu()
    right = wide(x.double().cpu(), src_key_padding_mask=padding.cpu())[seen]
    bound = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for training in (True, False):
        with torch.set_grad_enabled(training):
            found = model.train(training)(x, src_key_padding_mask=padding).cpu()[seen]
        assert (found.double() - right).square().mean().sqrt() < bound * right.square().mean().sqrt()


def test_a_converted_layer_compiles_to_one_graph():
    torch._dynamo.reset()
    model, (x, padding) = encoder(torch.bfloat16), drawn(torch.bfloat16)
    ours.hybrid(model, feature_map="performer", causal=True)
    layer = model.layers[0]
    compiled = torch.compile(layer, fullgraph=True)
    for run in (compiled, layer):
        run(x, src_key_padding_mask=padding).float().square().mean().backward()
    assert all(each.grad is not None for each in layer.parameters())
    found, right = (run(x, src_key_padding_mask=padding).float() for run in (compiled, layer))
    assert (found - right).abs().mean() < 0.05 * right.abs().mean()
