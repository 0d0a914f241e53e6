import pytest
import torch

from tilebook import device as devices
from tilebook import dispatch
from tilebook.dispatch import Choice, Dispatch

GPU = devices.find("H200")


class InTriton(Dispatch):
    """Chooses the default of our kernel for whatever it takes, as if a verdict had it ahead."""

    native = False

    def choose(self, op, problem, device):
        ours = op.tunable
        if self.native or not ours.supports(problem):
            return Choice(op.implementations["torch"], None, "exact", problem, GPU)
        return Choice(ours, ours.space.default(problem, GPU), "exact", problem, GPU)

    def _settled(self, choice):
        return True


@pytest.fixture
def forced():
    """Calls are taken as if their tensors were on a GPU."""
    with dispatch.use("torch"):
        yield


@pytest.fixture
def here(monkeypatch):
    """Tensors that say they are on a GPU, where kernels run in Triton's interpreter."""
    here = InTriton()
    for name in ("run", "lookup", "known", "choose", "backward_of"):
        monkeypatch.setattr(dispatch, name, getattr(here, name))
    monkeypatch.setattr(dispatch, "here", here)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(devices, "current", lambda index=0: GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr("tilebook.dispatch.choice.record", lambda run, args: (run(*args), None))
    monkeypatch.setattr("tilebook.left._here", here)
    monkeypatch.setattr("tilebook.left._capturing", lambda: False)
    # No call is so small that the host takes longest.
    monkeypatch.setattr("tilebook.kernels.norms.HOST_BOUND", 0.0)
    monkeypatch.setattr("tilebook.kernels.cross_entropy.HOST_BOUND", 0.0)
    monkeypatch.setattr("tilebook.kernels.attention.BOUNDS", (0.0, 0.0))
    monkeypatch.setattr("tilebook.kernels.glu.HOST_BOUND", 0.0)
    monkeypatch.setattr("tilebook.kernels.glu.BOUNDS", (0.0, 0.0))
    monkeypatch.setattr("tilebook.kernels.linear_cross_entropy.LOSS_BOUND", 0)
    return here
