"""Whose calls are whose in programs that the host bounds, in those that the GPU does, and in those in between."""

import itertools
import random

import pytest

from tilebook import pace
from tilebook.pace import RARELY, WINDOW, Pace


@pytest.fixture
def program(monkeypatch):
    """Runs so many calls of one kind, of which a share finds the GPU idle; which of them PyTorch served."""
    source = random.Random(0)

    def run(watched, calls, share):
        looked = []
        monkeypatch.setattr(pace, "idle", lambda: looked.append(1) or source.random() < share)
        return [watched.host_bound() for _ in range(calls)], len(looked)

    return run


def test_pytorch_serves_where_the_gpu_waits(program):
    served, looked = program(Pace(), 5000, 0.9)
    assert all(served)
    assert looked <= 2 * WINDOW + 5000 / RARELY


def test_ours_serve_where_the_host_waits_once_that_is_known(program):
    served, looked = program(Pace(), 5000, 0.1)
    assert served == [True] * (2 * WINDOW - 1) + [False] * (5001 - 2 * WINDOW)
    assert looked <= 2 * WINDOW + 5000 / RARELY


def test_the_first_calls_of_a_program_say_nothing(program):
    watched = Pace()
    program(watched, WINDOW, 1.0)
    served, _ = program(watched, 5000, 0.0)
    assert sum(served) < WINDOW


def test_what_ours_would_make_the_gpu_wait_for_is_pytorchs_for_good(program):
    watched = Pace()
    program(watched, 3 * WINDOW, 0.1)
    served, _ = program(watched, WINDOW * RARELY, 0.8)
    assert served[0] is False
    assert served[-1] is True
    served, looked = program(watched, 5000, 0.0)
    assert all(served)
    assert not looked


def test_a_program_that_becomes_the_gpus_is_noticed(program):
    watched = Pace()
    program(watched, 1000, 0.9)
    served, _ = program(watched, 3 * WINDOW * RARELY, 0.0)
    assert served[0] is True
    assert served[-1] is False


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_it_changes_its_mind_twice_at_most(program, share):
    served, _ = program(Pace(), 50_000, share)
    assert sum(a != b for a, b in itertools.pairwise(served)) <= 2
