"""Makes the injected ops importable by name, here and in workers, and the tuner's fakes; notices a GPU that stopped."""

import sys
from pathlib import Path

import pytest
import torch

from tilebook import device as devices
from tilebook import dispatch, native
from tilebook.native import build

here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent / "tuner")]

_culprits = []


@pytest.fixture(autouse=True)
def _gpu_answers(request):
    """After an illegal access every call of its process fails: it is an error of its test, and the rest is skipped."""
    if _culprits:
        pytest.skip(f"the GPU no longer answers this process since {_culprits[0]}")
    yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            _culprits.append(request.node.nodeid)
            raise


class Below:
    """The extension at work, with a verdict for ours for every call."""

    def __init__(self):
        self.implementation, self.changes, self._choices = "triton", {}, {}

    def lookup(self, op, args, call=None):
        known = dispatch.key(op, args)
        if known not in self._choices:
            problem, gpu = op.problem.of(*args), devices.current(args[0].get_device())
            ours = op.implementations.get(self.implementation) or op.implementations["triton"]
            config = None if ours.space is None else ours.space.default(problem, gpu)
            if config is not None:
                axes = ours.space.axes
                changes = {name: value for name, value in self.changes.items() if value in axes.get(name, ())}
                config = ours.space.config({**config, **changes})
            self._choices[known] = dispatch.Choice(ours, config, "exact", problem, gpu, kept=True)
        return self._choices[known]

    def known(self, op, args):
        return self._choices.get(dispatch.key(op, args))

    def repeated(self, op=""):
        """Calls by recorded launches since the last look."""
        counted = native._serving.extension().counted()
        return sum(
            n for choice, n in counted if getattr(choice, "plan", None) and choice.implementation.op.name.startswith(op)
        )


@pytest.fixture
def extension(monkeypatch):
    """Built, if it is not there yet."""
    if not native.available():
        try:
            build.build()
        except build.BuildError as broken:
            pytest.skip(str(broken))
        monkeypatch.setattr(native, "_serving", native._Serving())


@pytest.fixture
def below(extension, monkeypatch):
    it = Below()
    monkeypatch.setattr(dispatch, "lookup", it.lookup)
    monkeypatch.setattr(dispatch, "known", it.known)
    native._serving.extension().clear()
    yield it
    native._serving.extension().clear()
