"""What a profile notes of calls: whom they are, who served them, how long they took, and nothing of it changes them."""

import json
import time
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import tilebook
from tilebook import dispatch
from tilebook.profiling import notes, watching
from tilebook.profiling.notes import key_of
from tilebook.profiling.watching import Watching

LOGITS, TARGETS = torch.randn(6, 10), torch.tensor([1, 7, -100, 0, 3, 9])


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def capture_begin(self, pool=None):
        pass

    def capture_end(self):
        pass

    def replay(self):
        pass


@pytest.fixture
def profile(here, tmp_path, monkeypatch):
    """A profile that is under way, of calls as on a GPU; no thread of its own closes its window."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(watching, "stamp", lambda device: time.perf_counter())
    monkeypatch.setattr(notes, "stamp", lambda device: time.perf_counter())
    monkeypatch.setattr(Watching, "_run", lambda self: None)
    monkeypatch.setattr(notes, "_SLICE", 63)  # it is one slice of time all along
    made = Watching(tmp_path, None, None, monkeypatch.setattr)
    made.watch()
    monkeypatch.setattr("tilebook.enabling.our_cross_entropy", tilebook.cross_entropy)  # which it has had before
    yield made
    made.finish()


def written(profile, tmp_path):
    """By op: the rows of the file that it has written."""
    profile.finish()
    (place,) = tmp_path.glob("[0-9]*.json")
    found = json.loads(place.read_text())
    assert found["state"] == "done", found
    return {each["op"]: each for each in found["problems"]}


def loss(x, function=None):
    x = x.clone().requires_grad_()
    y = (function or F.cross_entropy)(x, TARGETS)
    return y.detach(), *torch.autograd.grad(y * 3, x)


def test_calls_of_ours_are_counted_and_timed_forward_and_backward(profile, tmp_path):
    for _ in range(6):
        x = torch.randn(5, 8, requires_grad=True)
        tilebook.rms_norm(x, torch.ones(8)).sum().backward()
    found = written(profile, tmp_path)
    assert set(found) == {"rms_norm_fwd", "rms_norm_bwd"}
    for each in found.values():
        assert (each["served"], each["source"], each["timed"]) == ("triton", "exact", True)
        assert each["time_ms"] > 0
        assert each["calls"] == 3  # from the third on: it is warm then


def test_what_is_left_to_pytorch_is_timed_with_its_gradients_and_has_the_same_numbers(here, profile, tmp_path):
    here.native = True
    expected = loss(LOGITS)
    for _ in range(8):
        assert all(map(torch.equal, loss(LOGITS, tilebook.cross_entropy), expected))
    with torch.no_grad():
        tilebook.cross_entropy(LOGITS, TARGETS)
    found = written(profile, tmp_path)
    assert set(found) == {"cross_entropy_fwd", "cross_entropy_bwd"}
    assert {each["served"] for each in found.values()} == {"torch"}
    assert all(each["timed"] for each in found.values())
    assert found["cross_entropy_bwd"]["calls"] in (found["cross_entropy_fwd"]["calls"] - 1, 5)


def test_in_pytorchs_place_calls_that_are_known_to_be_its_own_are_timed_too(here, profile, tmp_path):
    here.native = True
    expected = loss(LOGITS)
    with tilebook.enabled():
        assert F.cross_entropy.__module__ == "tilebook.enabling"
        for _ in range(8):
            assert all(map(torch.equal, loss(LOGITS), expected))
    assert [each.timed for each in profile.notes._noted.values()] == [8, 8]
    found = written(profile, tmp_path)
    assert found["cross_entropy_fwd"]["calls"] == found["cross_entropy_bwd"]["calls"] >= 4


def test_what_is_left_and_met_again_below_autograd_is_counted_and_timed_there(here, profile, monkeypatch):
    monkeypatch.setattr("tilebook.native._serving._standings", {"aten::_fused_rms_norm": None})
    here.native, x = True, torch.randn(5, 8)
    for _ in range(8):
        tilebook.rms_norm(x)
        tilebook.glu(x)
    assert {key[0]: n for key, n in profile.notes.counts().items()} == {"rms_norm_fwd": 1, "glu_fwd": 8}
    assert [key[0] for key in profile.notes._noted] == ["glu_fwd"]


def test_what_a_mode_sees_is_counted_and_timed(here, profile, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    here.native, expected = True, loss(LOGITS)
    with FlopCounterMode(display=False):
        for _ in range(6):
            assert all(map(torch.equal, loss(LOGITS, tilebook.cross_entropy), expected))
    found = written(profile, tmp_path)
    assert {op: (each["calls"], each["timed"]) for op, each in found.items()} == {
        "cross_entropy_fwd": (3, True),
        "cross_entropy_bwd": (3, True),
    }


def test_outside_of_windows_calls_are_counted_and_not_timed(here, profile, tmp_path):
    here.native = True
    for open_ in (True,) * 4 + (False,) * 20:
        profile.notes.open = open_
        loss(LOGITS, tilebook.cross_entropy)
    (noted,) = (each for key, each in profile.notes._noted.items() if key[0] == "cross_entropy_fwd")
    assert noted.timed == 4
    found = written(profile, tmp_path)
    assert found["cross_entropy_fwd"]["calls"] == found["cross_entropy_bwd"]["calls"] == 21


def test_the_ledger_weighs_misses_by_what_was_measured_gradients_of_left_calls_included(here, profile, monkeypatch):
    choose = here.choose

    def unknown(*args):
        found = choose(*args)
        found.source = "fallback"
        return found

    monkeypatch.setattr(here, "choose", unknown)
    here.native = True
    for _ in range(5):
        loss(LOGITS, tilebook.cross_entropy)
    (guess,) = here.misses()
    assert guess.time_ms < 1e-3
    backward = dispatch.backward_of(next(iter(here._memo.values())))
    backward.source = "fallback"
    profile.finish()
    found = {each.op: each for each in here.misses()}
    assert {op: each.calls for op, each in found.items()} == {"cross_entropy_fwd": 5, "cross_entropy_bwd": 5}
    assert all(each.time_ms == here.measured[each.op, each.problem] > 1e-3 for each in found.values())


def test_calls_of_a_graph_count_with_each_replay_and_are_not_timed(profile):
    x = torch.randn(5, 8)
    for _ in range(2):
        tilebook.rms_norm(x)
    (key,) = profile.notes.counts()
    graph = Graph()
    graph.capture_begin()
    for _ in range(4):
        tilebook.rms_norm(x)
    assert profile.notes._noted[key].timed == 2
    graph.capture_end()
    assert profile.notes.counts()[key] == 2
    for _ in range(3):
        graph.replay()
    assert profile.notes.counts()[key] == 14
    Graph().replay()  # of which nothing is known
    tilebook.rms_norm(x)
    assert profile.notes._noted[key].timed == 3


class Event:
    """Of a GPU that has done all up to `at`."""

    at = 0.0

    def __init__(self, time):
        self.time = time

    def query(self):
        return self.time <= Event.at

    def elapsed_time(self, other):
        return other.time - self.time


def test_samples_in_which_the_gpu_waited_count_only_where_there_are_no_others(profile, monkeypatch):
    choice = dispatch.lookup(*_posed())
    (now,) = clock = [0.0]
    monkeypatch.setattr(notes, "stamp", lambda device: Event(clock[0]))
    for took, waited in ((50, True), (40, True), (7, True), (9, True)):
        start, Event.at = Event(clock[0]), clock[0] if waited else clock[0] - 1
        clock[0] += took
        profile.notes.note(choice, start, None)
        clock[0] += 100
    noted = profile.notes._noted[key_of(choice)]
    Event.at = 1e9
    assert noted.time_ms() == (7, True)
    Event.at = clock[0] - 1
    start = Event(clock[0])
    clock[0] += 11
    profile.notes.note(choice, start, None)
    assert noted.time_ms()[0] != 11, "the GPU has not come so far"
    Event.at = 1e9
    assert noted.time_ms() == (11, False)
    assert now == 0.0


def _posed():
    op = tilebook.op.get("rms_norm_fwd")
    return op, (torch.randn(5, 8), None, 1e-6)


def test_a_call_that_fails_fails_as_ever_and_an_error_of_the_profiles_own_is_nobodys(profile, monkeypatch):
    with pytest.raises(ValueError, match="weight"):
        tilebook.rms_norm(torch.randn(5, 8), torch.ones(7))
    monkeypatch.setattr(profile.notes, "note", None)
    expected = F.rms_norm(torch.ones(5, 8), (8,))
    torch.testing.assert_close(tilebook.rms_norm(torch.ones(5, 8), eps=1e-6), expected, rtol=1e-5, atol=1e-5)
    tilebook.rms_norm(torch.randn(5, 8))


def test_steps_are_the_spans_bounds_where_there_are_some(profile, tmp_path):
    for _ in range(8):
        for rows in (5, 65, 129) * 3:
            tilebook.rms_norm(torch.randn(rows, 8))
        profile.notes.stepped()
    profile.finish()
    (place,) = tmp_path.glob("[0-9]*.json")
    found = json.loads(place.read_text())
    assert [each["calls"] for each in found["problems"]] == [3 * found["steps"]] * 3
    assert 0 < found["steps"] <= 5  # from the third on


def test_a_forked_process_notes_its_own_calls_alone(profile, tmp_path):
    x = torch.randn(5, 8)
    for _ in range(3):
        tilebook.rms_norm(x)
    profile.forked()
    assert profile.notes.counts().total() == 0
    tilebook.rms_norm(x)
    assert profile.notes.counts() == Counter({key_of(next(iter(dispatch.here._memo.values()))): 1})
    assert not list(tmp_path.glob("[0-9]*.json"))
