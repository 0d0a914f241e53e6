"""Models and scripts while tilebook stands in PyTorch's places: their numbers, their traces, and what is compiled."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilebook


class Model(nn.Module):
    """What PyTorch's modules make of the functions in these places."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm, self.bare = nn.RMSNorm(32, eps=1e-6), nn.RMSNorm(32)

    def forward(self, x):
        x = self.layer(x)
        return self.bare(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))


def step(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_models_numbers_are_pytorchs(how):
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 9, 32)
    right = step(model, x)
    torch._dynamo.reset()
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if how == "compiled" else model
    with tilebook.enabled():
        for _ in range(2):
            for got, wanted in zip(step(called, x), right, strict=True):
                torch.testing.assert_close(got, wanted)
    for got, wanted in zip(step(called, x), right, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_script_that_is_traced_warns_of_nothing_more_than_pytorchs():
    q, shows = torch.randn(2, 4, 8, 16), torch.ones(8, 8, dtype=torch.bool).tril()
    calls = {
        "booleans": lambda q: F.scaled_dot_product_attention(q, q, q, shows),
        "numbers": lambda q: F.scaled_dot_product_attention(q, q, q, shows.float(), scale=0.3),
        "one column": lambda q: F.scaled_dot_product_attention(q, q, q, shows[:, :1]),
        "causal": lambda q: F.scaled_dot_product_attention(q[0], q[0], q[0], is_causal=True),
        "layer_norm": lambda q: F.layer_norm(q, q.shape[-1:]),
        "rms_norm": lambda q: F.rms_norm(q, q.shape[-1:]),
        "cross_entropy": lambda q: F.cross_entropy(q[0, 0], torch.zeros(8, dtype=torch.long)),
    }
    with warnings.catch_warnings(), tilebook.enabled():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        for name, call in calls.items():
            torch.testing.assert_close(torch.jit.trace(call, q)(q), call(q), msg=name)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "scaled_dot_product_attention", "cross_entropy"])
def test_a_function_that_a_program_compiles_by_itself_is_compiled(name):
    x, compiled = torch.randn(5, 16), []
    args = {"scaled_dot_product_attention": (x, x, x), "cross_entropy": (x, torch.arange(5))}.get(name, (x, (16,)))

    def backend(module, example_inputs):
        compiled.append(module)
        return module.forward

    torch._dynamo.reset()
    with tilebook.enabled():
        found = torch.compile(getattr(F, name), backend=backend, fullgraph=True)(*args)
    torch.testing.assert_close(found, getattr(F, name)(*args))
    assert len(compiled) == 1


def test_programs_are_scripted_traced_and_exported_with_it_on():
    model, x = Model().eval(), torch.randn(2, 9, 32)
    right = model(x)
    with tilebook.enabled():
        norms = nn.Sequential(nn.LayerNorm(32), nn.RMSNorm(32, eps=1e-6))
        torch.testing.assert_close(torch.jit.script(norms)(x), norms(x))
        torch.testing.assert_close(torch.jit.trace(norms, x)(x), norms(x))
        torch.testing.assert_close(torch.fx.symbolic_trace(norms)(x), norms(x))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), right)
        batched = torch.func.vmap(norms)(x)
        torch.testing.assert_close(batched, norms(x))

        def attend(q):
            return F.scaled_dot_product_attention(q, q, q)

        torch.testing.assert_close(torch.jit.script(_Attends())(x), attend(x))
        loss, target = nn.CrossEntropyLoss(label_smoothing=0.1), torch.arange(9)
        wanted = loss(x[0], target)
        torch.testing.assert_close(torch.jit.script(loss)(x[0], target), wanted)
        torch.testing.assert_close(torch.jit.trace(loss, (x[0], target))(x[0], target), wanted)
        torch.testing.assert_close(torch.fx.symbolic_trace(loss)(x[0], target), wanted)
        torch.testing.assert_close(torch.export.export(loss, (x[0], target)).module()(x[0], target), wanted)
        torch.testing.assert_close(torch.func.vmap(loss)(x, target.expand(2, 9))[0], wanted)


class _Attends(nn.Module):
    def forward(self, q):
        return F.scaled_dot_product_attention(q, q, q)
