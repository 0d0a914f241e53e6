"""Whose calls are whose in programs that the host bounds, and in those that the GPU does: their own steps tell."""

import random
from types import SimpleNamespace

import pytest
import torch

from tilebook import pace
from tilebook.pace import ENOUGH, SETTLING, TURN, Pace


class Program:
    """A training loop of a host and a GPU, in milliseconds a step of each with PyTorch's calls and with ours.

    The host runs ahead of the GPU until `ahead` ms of work are in store, or waits for it where steps are `synced`.
    """

    def __init__(self, clock, host, gpu, ahead=30.0, synced=False, noise=0.01, spikes=0.0):
        self._clock, self._host, self._gpu, self._ahead, self._synced = clock, host, gpu, ahead, synced
        self._noise, self._spikes, self._source = noise, spikes, random.Random(0)
        self._done = 0.0
        weight = torch.zeros(1, requires_grad=True)
        weight.grad = torch.zeros(1)
        self._optimizer = torch.optim.SGD([weight])

    def run(self, steps, watched, calls=25):
        """Of each step, was it PyTorch's?"""
        found = []
        for _ in range(steps):
            theirs = [each.host_bound() for each in watched for _ in range(calls)]
            which = 0 if all(theirs) else 1
            assert which or not any(not each for each in theirs)
            host, gpu = (cost[which] * self._source.gauss(1.0, self._noise) for cost in (self._host, self._gpu))
            if self._source.random() < self._spikes:
                host += 50.0
            start = self._clock.now
            self._done = max(self._done, start) + gpu
            self._clock.now = max(start + host, self._done - (0.0 if self._synced else self._ahead))
            self._optimizer.step()
            found.append(which == 0)
        return found


@pytest.fixture
def clock(monkeypatch):
    made = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: made.now)
    fresh = pace._Trial()
    monkeypatch.setattr(pace, "_trial", fresh)
    yield made
    if fresh._handle is not None:
        fresh._handle.remove()


DECIDED = 2 * TURN * -(-ENOUGH // (TURN - SETTLING)) + 2

HOST_BOUND = {"host": (27.0, 29.2), "gpu": (25.0, 23.0)}
GPU_BOUND = {"host": (20.0, 23.0), "gpu": (45.0, 41.0)}


@pytest.mark.parametrize("more", [{}, {"synced": True}, {"noise": 0.03}, {"spikes": 0.1}], ids=str)
def test_where_the_gpu_waits_for_the_host_calls_are_pytorchs(clock, more):
    served = Program(clock, **HOST_BOUND, **more).run(400, [Pace()])
    assert all(served[DECIDED:])


@pytest.mark.parametrize("more", [{}, {"synced": True}, {"noise": 0.03}, {"spikes": 0.1}], ids=str)
def test_where_the_host_waits_for_the_gpu_they_are_ours(clock, more):
    served = Program(clock, **GPU_BOUND, **more).run(400, [Pace(), Pace()])
    assert not any(served[DECIDED:])


@pytest.mark.parametrize("share", [0.97, 1.0, 1.03])
def test_ours_serve_only_where_they_are_clearly_ahead(clock, share):
    """Where steps vary by more than what is gained, PyTorch's calls stay."""
    served = Program(clock, (5.0, 6.0), (40.0, 40.0 * share), noise=0.06).run(400, [Pace()])
    assert all(served[DECIDED:])


def test_until_it_is_known_they_take_turns(clock):
    served = Program(clock, **GPU_BOUND).run(4 * TURN, [Pace()])
    assert served[1:] == ([True] * TURN + [False] * TURN + [True] * TURN + [False] * TURN)[: 4 * TURN - 1]


def test_a_kind_of_call_that_comes_later_has_turns_of_its_own(clock):
    first, second = Pace(), None
    program = Program(clock, **GPU_BOUND)
    program.run(200, [first])
    assert pace._trial._handle is None, "nobody is told of steps when nothing is to be found out"
    second = Pace()
    assert second._steps is not first._steps
    assert first.host_bound() is False
    for _ in range(200):
        second.host_bound()
        clock.now += 10.0
        program._optimizer.step()
    assert second._steps.verdict is False
    assert first.host_bound() is False


def test_steps_without_such_calls_say_nothing(clock):
    """An optimizer of another model, or a program that only runs a model forward."""
    watched, program = Pace(), Program(clock, **GPU_BOUND)
    for _ in range(500):
        clock.now += 1.0
        program._optimizer.step()
    assert watched._steps.verdict is None
    assert watched.host_bound()
    assert not any(program.run(400, [watched])[DECIDED:])


@pytest.mark.filterwarnings("error:.*does not know how to trace")
def test_a_compiled_optimizers_steps_count_too(clock):
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.ones(1)
    optimizer, watched = torch.optim.SGD([weight]), Pace()
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(DECIDED):
        clock.now += 1.0 if watched.host_bound() else 0.5
        step()
    assert not watched.host_bound()
    assert weight.item() == pytest.approx(-DECIDED * optimizer.param_groups[0]["lr"])


def _taking_turns(clock, costs, rounds, watched):
    """A program of several optimizers, each of whose steps takes so long with PyTorch's calls and with ours."""
    optimizers = []
    for _ in costs:
        weight = torch.zeros(1, requires_grad=True)
        weight.grad = torch.zeros(1)
        optimizers.append(torch.optim.SGD([weight]))
    source = random.Random(0)
    for _ in range(rounds):
        for optimizer, cost in zip(optimizers, costs, strict=True):
            clock.now += cost[not watched.host_bound()] * source.gauss(1.0, 0.01)
            optimizer.step()


@pytest.mark.parametrize(("ours", "verdict"), [(0.9, True), (1.05, False)])
def test_of_optimizers_that_take_turns_a_step_is_one_of_each(clock, ours, verdict):
    watched = Pace()
    _taking_turns(clock, [(10.0, 10.0 * ours), (40.0, 40.0 * ours), (3.0, 3.0 * ours)], 60, watched)
    assert watched._steps.verdict is verdict


def test_an_optimizer_that_another_takes_the_place_of_is_not_waited_for(clock):
    watched = Pace()
    _taking_turns(clock, [(10.0, 9.0)], 8, watched)
    _taking_turns(clock, [(20.0, 18.0)], 150, watched)
    assert watched._steps.verdict is True
