"""Where Dynamo gives up a frame, it looks at each function that is called from there: at none that PyTorch calls."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
from test_native_serving import Choice, _answer, serving  # noqa: F401

import tilebook
from tilebook import dispatch
from tilebook.kernels.attention import drop_in, learned
from tilebook.kernels.glu.entry import GLU
from tilebook.pace import Pace
from tilebook.profiling.watching import Watching

PACKAGE = str(Path(tilebook.__file__).parent)


def _given_up(call, given):
    for _ in range(2):
        torch._dynamo.graph_break()  # in a loop, from which nothing goes on
        (found,) = map(call, [given])  # as C calls it
    return found


@pytest.fixture
def looked_at(monkeypatch):
    """Calls something from a frame that Dynamo has given up, with the package's functions that it then looked at."""
    from torch._dynamo import convert_frame

    seen, real = Counter(), convert_frame.ConvertFrame.__call__

    def noting(self, frame, *args, **options):
        seen[frame.f_code.co_filename, frame.f_code.co_name] += 1
        return real(self, frame, *args, **options)

    monkeypatch.setattr(convert_frame.ConvertFrame, "__call__", noting)

    def run(call, given=None):
        found = []
        for _ in range(2):  # what is reset is not forgotten
            torch._dynamo.reset()
            seen.clear()
            torch.compile(_given_up, backend="eager")(call, given)
            assert (__file__, "_given_up") in seen
            found += [name for file, name in seen if file.startswith(PACKAGE)]
        torch._dynamo.reset()
        return found

    return run


def _trained(x, weight, eps):
    torch.ops.tilebook.rms_norm_fwd(x, weight, eps)[0].sum().backward()


@pytest.mark.parametrize("kind", ["forward", "backward", "autocast"])
def test_an_ops_functions(looked_at, kind):
    tilebook.rms_norm, tilebook.mlp  # noqa: B018  their ops are registered
    x, weight = torch.randn(4, 64, requires_grad=kind == "backward"), torch.randn(64)
    if kind == "autocast":
        layers = torch.randn(8, 64), torch.randn(8), torch.randn(64, 8), torch.randn(64)
        op, last = partial(torch.ops.tilebook.mlp_fwd, x, *layers, "relu"), False
    else:
        op, last = partial(_trained if kind == "backward" else torch.ops.tilebook.rms_norm_fwd, x, weight), 1e-6
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        assert looked_at(op, last) == []


def _graphs():
    """What makes a graph of each function of autograd that is ours, as they are called on a GPU."""
    x, gate, bias = (torch.randn(4, 8, requires_grad=True) for _ in range(3))
    q, k, v = (torch.randn(1, 1, 8, 8, requires_grad=True) for _ in range(3))
    learnt = torch.zeros(1, 1, 8, 8, requires_grad=True)
    yield lambda _: GLU.direct(None, (x, gate), ("silu",))[0]
    yield lambda _: learned.loaded(bias, bias.clone)
    yield lambda _: learned.attention(q, k, v, learnt, None)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_functions_of_autograd(looked_at, monkeypatch, kind, index):
    monkeypatch.setattr(learned, "_forward", lambda q, k, v, *_, **__: (q + k + v, q.sum(-1), q, q))
    monkeypatch.setattr(learned, "_backward", lambda do, q, k, v, bias, *_, **__: (do, do, do, do))
    make = list(_graphs())[index]
    made = make(None)
    found = looked_at(make if kind == "forward" else lambda _: made.sum().backward(retain_graph=True))
    assert not {"forward", "backward"} & set(found)


def test_what_a_profile_puts_around(looked_at, tmp_path, monkeypatch):
    watching, told = Watching(tmp_path, None, None), []
    monkeypatch.setattr(
        watching, "notes", type("Notes", (), {"times": lambda *_: True, "note": lambda *given: told.append(given)})
    )
    answer = watching._answer(lambda *_: (None, None, None))
    assert looked_at(partial(answer, None, "aten::relu"), ()) == []
    monkeypatch.setattr(dispatch, "backward_of", lambda _: None)
    monkeypatch.setattr("tilebook.profiling.watching.key_of", lambda _: None)
    y = torch.randn(3, requires_grad=True).exp()
    watching._follow(Choice(), (y,), 0, None)
    assert looked_at(lambda _: y.sum().backward(retain_graph=True)) == []


def test_what_the_extension_asks(looked_at, serving, monkeypatch):  # noqa: F811
    assert looked_at(lambda _: _answer(serving, monkeypatch, Choice())) == []
    pace = Pace()
    pace.host_bound()
    assert looked_at(lambda _: pace.host_bound()) == []
    q = torch.randn(1, 2, 16, 16)
    assert looked_at(lambda _: drop_in.under_note(q, q, q, torch.ones(16, 16, dtype=torch.bool), None, False)) == []
