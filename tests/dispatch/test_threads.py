"""Threads of one program that choose at the same time."""

import threading

import pytest
from dispatch_samples import COMPOSED, COMPOSED_OTHER, GPU, OP, composed

from tilebook.dispatch import Snapshot
from tilebook.op import Problem
from tilebook.registry import serving

NEAR = OP.problem.parse("B4,H16,S3000,D64,causal,window128x0", "bf16")


class Halted:
    """Has another thread do something and stop in its middle until it is let go on."""

    def __init__(self, does):
        self.stopped, self.go_on = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=does)

    def here(self):
        if threading.current_thread() is self.thread:
            self.stopped.set()
            assert self.go_on.wait(60)

    def __enter__(self):
        self.thread.start()
        assert self.stopped.wait(60)

    def __exit__(self, *_):
        self.go_on.set()
        self.thread.join()


@pytest.mark.parametrize("asked", [COMPOSED, NEAR], ids=["exact", "nearest"])
def test_who_chooses_while_another_thread_reads_sees_all_that_there_is(choose, monkeypatch, asked):
    choose(composed())
    snapshot, of_kin = Snapshot(GPU), Problem.kin.fget
    other = Halted(lambda: snapshot.choose(OP, NEAR))

    def kin(problem):
        other.here()
        return of_kin(problem)

    monkeypatch.setattr(Problem, "kin", property(kin))
    with other:
        assert snapshot.choose(OP, asked).config == COMPOSED_OTHER


def test_who_forgets_what_was_read_takes_it_from_nobody(choose, monkeypatch):
    """As `choose` does with every problem while a layer is locked."""
    choose(composed())
    snapshot, of_kin = Snapshot(GPU), Problem.kin.fget

    def kin(problem):
        snapshot._read.clear()
        return of_kin(problem)

    monkeypatch.setattr(Problem, "kin", property(kin))
    assert snapshot.choose(OP, NEAR).config == COMPOSED_OTHER


class Forgotten(dict):
    """Another thread forgets all between two looks."""

    def __contains__(self, key):
        found = super().__contains__(key)
        self.clear()
        return found


def test_what_a_large_layer_has_answered_may_be_forgotten_at_any_time(choose, monkeypatch):
    monkeypatch.setattr(serving, "WHOLE", 1)
    choose(composed(), composed(problem=NEAR))
    snapshot = Snapshot(GPU)
    snapshot._table._answers = Forgotten()
    for _ in range(2):
        assert snapshot.choose(OP, COMPOSED).source == "exact"
