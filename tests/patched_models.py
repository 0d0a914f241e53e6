"""Modules before and after they are patched."""

import torch

import tilebook


def step(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()])]


def assert_changed_and_right(model, what, dtype, how):
    """Patched, each module is changed to `what`, and the model gives the same numbers, eager or compiled."""
    model, x = model.to(dtype), torch.randn(3, 5, 16, dtype=dtype)
    right = step(model, x)
    torch._dynamo.reset()
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if how == "compiled" else model
    with tilebook.patched(model) as report:
        assert (report.changed, report.left) == (what, {})
        for got, wanted in zip(step(called, x), right, strict=True):
            size = wanted.float().abs().max().item()
            torch.testing.assert_close(got, wanted, rtol=0.03, atol=16 * torch.finfo(dtype).eps * size)
    assert not any("forward" in each.__dict__ for each in model.modules())
