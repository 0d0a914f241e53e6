"""PyTorch's kernels, run from Python in the extension's place where they are timed: the same numbers, counted once."""

import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tilebook import op as ops
from tilebook.dispatch.snapshot import pytorch
from tilebook.profiling import notes
from tilebook.profiling.watching import Watching

OPS = (
    "aten::native_layer_norm",
    "aten::native_layer_norm_backward",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
)


@pytest.fixture
def served(extension):
    yield from extension(SimpleNamespace(launch=lambda *_: 1, launches=[]), OPS)


@pytest.fixture
def profile(served, tmp_path, monkeypatch):
    """One of calls that dispatch leaves to PyTorch, all of which the extension asks about."""
    monkeypatch.setattr(notes, "stamp", lambda device: time.perf_counter())
    monkeypatch.setattr(Watching, "_run", lambda self: None)
    made, op = Watching(tmp_path, None, None), ops.get("layer_norm_fwd")
    made.choices = {name: pytorch(op, op.problem.parse(f"M{8 + i},N8", "fp32")) for i, name in enumerate(OPS)}
    for name, choice in made.choices.items():
        answer = made._answer(lambda serving, name, args, choice=choice: (None, False, choice))
        served.answers[name] = lambda args, name=name, answer=answer: answer(None, name, args)
    served.extension.ask(True)
    made._asking = True
    return made


def steps():
    torch.manual_seed(0)
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    q = torch.randn(2, 2, 4, 8)
    y = F.layer_norm(x, (8,), weight)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        more = F.layer_norm(x, (8,)), F.scaled_dot_product_attention(q, q, q, scale=0.3)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight)), *more]


def test_a_call_that_is_left_is_pytorchs_and_is_timed(served, profile):
    found = steps()
    served.extension.stop()
    expected = steps()
    assert all(map(torch.equal, found, expected))
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    counts = [(choice.calls, profile.notes._noted[notes.key_of(choice)].timed) for choice in profile.choices.values()]
    assert counts == [(2, 2), (1, 1), (1, 1)]


def test_outside_of_a_window_it_is_the_extensions(served, profile):
    profile.notes.open = profile._asking = False
    expected = steps()
    assert not profile.notes._noted
    assert [choice.calls for choice in profile.choices.values()] == [0, 0, 0]
    profile.notes.open = True
    profile.notes.capturing = 1
    assert all(map(torch.equal, steps(), expected))
    assert not profile.notes._noted


def test_an_error_is_pytorchs_own(served, profile):
    with pytest.raises(RuntimeError, match="normalized_shape"):
        torch.native_layer_norm(torch.randn(6, 8), (7,), None, None, 1e-5)
