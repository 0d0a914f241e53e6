"""What is probed is asked about at each call, and left to PyTorch's own function once it is known to be its."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from dispatch_samples import GPU, doubling, on_gpu
from probing_samples import Large

import tilebook
from tilebook import call, dispatch, left
from tilebook.dispatch import Dispatch, probing
from tilebook.dispatch.snapshot import pytorch
from tilebook.registry import Registry


@dataclass(frozen=True)
class Backward(Large):
    """Of the gradients."""


@pytest.fixture
def both(program):
    """A program whose problem has a backward pass, which a near verdict has ours ahead in, too."""
    it = program(50e-6)
    back = doubling(lambda x, config: (2 * x,), fused=True)
    back.name, back.problem, it.op.backward = "doubling_bwd", Backward, back
    with Registry.open(it.path, write=True) as registry:
        registry.merge((), [it.verdict(96, op=back.name, problem=Backward("fp32", 96), kernel=back.digest)])
    it.here.reload()
    it.prober._began -= 1000.0
    return it


def test_a_call_is_not_left_whole_while_its_backward_pass_is_looked_at(both, monkeypatch):
    for name in ("backward_of", "backward_probed"):
        monkeypatch.setattr(dispatch, name, getattr(both.here, name))
    x, plain = on_gpu(torch.zeros(64)), torch.zeros(64)
    wanted = torch.zeros(64, requires_grad=True)
    choice = both.here.lookup(both.op, (x,))
    assert call.native(choice, (plain,))  # nothing has compiled yet
    assert call.native(choice, (wanted,))
    both.prober.tick()
    assert not call.native(choice, (plain,))
    both.run(200)
    choice = both.here.lookup(both.op, (x,))
    assert choice.source == "exact"
    choice = pytorch(both.op, both.problem, GPU)  # as if it were PyTorch's that is ahead
    choice.kept = True
    assert call.native(choice, (plain,))
    assert not call.native(choice, (wanted,))
    with torch.no_grad():
        assert call.native(choice, (wanted,))
    state = both.prober.states["doubling_bwd", Backward("fp32", 64).key, GPU.identity]
    both.prober.end(state)
    assert call.native(choice, (wanted,))


def test_calls_with_gradients_are_not_remembered_as_pytorchs_while_they_are_looked_at(both, monkeypatch):
    monkeypatch.setattr(left, "_here", both.here)
    for name in ("backward_of", "backward_probed"):
        monkeypatch.setattr(dispatch, name, getattr(both.here, name))
    looked_at = both.here.lookup(both.op, (on_gpu(torch.zeros(64)),))
    choice = pytorch(both.op, both.problem, GPU)
    choice.kept = True
    assert left.known(choice, 1e12, (0.0, 0.0))[:3] == (True, True, False)
    both.prober.tick()
    assert left.known(choice, 1e12, (0.0, 0.0))[:3] == (True, False, False)
    with torch.no_grad():
        assert left.known(choice, 1e12, (0.0, 0.0))[:3] == (True, False, False)
    assert looked_at.probed
    assert not left.unsettled("kind", looked_at)
    both.here.prober = None
    assert left.known(choice, 1e12, (0.0, 0.0))[:3] == (True, True, False)


def test_a_program_may_ask_for_it_for_a_block_or_from_then_on(monkeypatch, gpu):
    monkeypatch.setattr(probing, "here", Dispatch())
    with tilebook.probe():
        first = probing.here.prober
        with tilebook.probe():
            assert probing.here.prober is first
        assert probing.here.prober is first
    assert probing.here.prober is None
    tilebook.probe()
    assert probing.here.prober not in (None, first)
    probing.stop()
    assert probing.here.prober is None


@pytest.mark.usefixtures("forked")
@pytest.mark.sampled(2)
@pytest.mark.parametrize(("told", "on"), [("1", True), ("0", False)])
def test_the_environment_may_ask_for_it(told, on):
    text = "from tilebook import dispatch; print(dispatch.here.prober is not None)"
    environment = {**os.environ, "TILEBOOK_PROBE": told}
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(on)


def test_what_probe_returns_says_whether_it_is_on_and_can_do_anything():
    with tilebook.probe() as probing:
        assert repr(probing).startswith("<tilebook probing, on")
        assert ("there is no GPU here" in repr(probing)) is not torch.cuda.is_available()
    assert repr(probing).startswith("<tilebook probing, ended")
