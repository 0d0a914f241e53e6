"""A program that probes settles what no verdict is on: the faster serves, within a budget, numbers always right."""

import threading
import warnings
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from dispatch_samples import GPU
from probing_samples import Large

from tilebook import op as ops
from tilebook.dispatch import Dispatch, Snapshot, probing
from tilebook.dispatch.probing import SHARE
from tilebook.registry import Registry
from tilebook.registry.searched import observed


def test_the_faster_one_serves_from_then_on_and_is_kept_with_its_evidence(program):
    it = program(80e-6)
    assert it.serves == ("torch", "fallback")
    it.run(8000)
    assert it.serves == ("triton", "exact")
    it.op.ran.clear()
    it.run(50)
    assert set(it.op.ran) == {"triton"}
    (found,) = it.kept()
    assert (found.origin, found.trusted, found.mode, observed(found)) == ("observed", True, "eager", True)
    assert found.config == {"TILE": 2}
    assert found.interval.low > 1.01
    assert found.interval.value == pytest.approx(100 / 80, rel=0.05)
    assert {each.implementation for each in found.finalists} == {"triton", "torch"}
    assert len(found.winner.samples_ms) == found.notes["observed"]["rounds"] == 8
    assert found.environment.versions["torch"] == str(torch.__version__)


def test_pytorchs_own_serves_where_nothing_is_faster_and_is_not_asked_again(program):
    it = program({1: 125e-6, 2: 130e-6})
    it.run(8000)
    (found,) = it.kept()
    assert (found.implementation, found.time_ms) == ("torch", pytest.approx(0.1, rel=0.05))
    slower = next(each for each in found.finalists if each.implementation == "triton")
    assert slower.speedup.high < 1
    assert found.notes["observed"]["rounds"] == len(slower.samples_ms) == 8  # it is soon clear
    assert it.serves == ("torch", "exact")
    it.fresh()
    it.op.ran.clear()
    it.run(500)
    assert set(it.op.ran) == {"torch"}


def test_a_gain_that_is_not_shown_is_none(program):
    it = program(99.5e-6)
    it.run(20000)
    (found,) = it.kept()
    assert found.implementation == "torch"
    assert found.notes["observed"]["looks"] in (1, 2, 3, 4)


def candidates(it):
    """What is tried, in order."""
    it.call()
    return [candidate[3]["TILE"] for candidate in it.compiled]


def test_what_is_tried_are_winners_of_the_nearest_problems_then_our_default(program, monkeypatch):
    assert candidates(program(50e-6)) == [2, 1]
    assert candidates(program(50e-6, known=())) == [1]
    monkeypatch.setattr(Large, "EXACT", frozenset({"n"}))  # no verdict on another size serves
    it = program(50e-6)
    assert candidates(it) == [2, 1]
    assert candidates(program(50e-6, known=(64 << 9,))) == [1]  # far away
    monkeypatch.setattr(probing, "CANDIDATES", 1)
    assert candidates(program(50e-6)) == [2]


def test_what_ships_has_something_to_try_for_problems_that_are_like_none_of_it():
    snapshot = Snapshot(GPU)
    for name, label, dtype in (
        ("attention_fwd", "B3,H24,Hkv8,S1337,D96,causal", "fp16"),
        ("attention_bwd", "B3,H24,Hkv8,S1337,D96", "bf16"),
        ("rms_norm_fwd", "M32768,N2880", "bf16"),
    ):
        op = ops.get(name)
        assert snapshot.contenders(op, op.problem.parse(label, dtype), 3), name


def test_the_best_of_several_candidates_wins(program):
    it = program({1: 60e-6, 2: 80e-6})
    with Registry.open(it.path, write=True) as registry:
        registry.merge((), [it.verdict(112, config={"TILE": 1})])
    it.here.reload()
    it.run(12000)
    (found,) = it.kept()
    assert found.config == {"TILE": 1}


WRONG = {
    "always": lambda it: True,
    "in every third run": lambda it: it.op.ran.count("triton") % 3 == 0,
    "from its second run on": lambda it: it.op.ran.count("triton") > 1,
}


@pytest.mark.parametrize("when", WRONG)
def test_a_wrong_candidate_never_serves(program, when):
    it = program(10e-6)
    it.wrong = lambda: WRONG[when](it)
    with pytest.warns(RuntimeWarning, match="triton TILE=2 is not what serves it: (Wrong|NotRepeatable)"):
        it.run(5000)  # every call is compared
    assert it.serves == ("torch", "fallback")
    ran = it.op.ran.count("triton")
    assert ran <= 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        it.run(400, n=65)  # nor on another problem
    assert it.op.ran.count("triton") == ran
    assert it.kept() == []


def test_a_candidate_that_fails_in_a_call_is_dropped_and_the_call_is_right(program):
    it = program(50e-6)
    it.broken = lambda: it.op.ran.count("triton") < 12
    with pytest.warns(RuntimeWarning, match="RuntimeError: no such instruction"):
        it.run(6000)
    assert it.serves[0] == "torch"


def test_a_fault_of_probing_ends_it_and_no_call(program, monkeypatch):
    it = program(50e-6)
    it.broken = lambda: it.op.ran.count("triton") < 12
    monkeypatch.setattr(it.prober, "drop", lambda *told: 1 / 0)
    it.run(6000)
    (state,) = it.prober.states.values()
    assert state.done
    assert it.op.ran.count("triton") == 12
    assert it.serves[0] == "torch"


def test_an_error_of_the_call_itself_is_the_programs(program):
    it = program(50e-6)
    it.run(3990)

    def own(x):
        raise ValueError("no such shape")

    it.own, it.broken = own, lambda: False
    with pytest.raises(ValueError, match="no such shape"):
        it.run(300)


def test_what_does_not_compile_is_no_candidate(program):
    it = program(50e-6)
    it.compiled = None
    future = Future()
    future.set_result(SimpleNamespace(failure="spills", reason="4 bytes"))
    it.prober._compile = lambda *candidate: future
    with pytest.warns(RuntimeWarning, match="4 bytes"):
        it.run(5000)
    assert "triton" not in it.op.ran


def test_nothing_is_run_before_it_has_compiled(program):
    it, future = program(50e-6), Future()
    it.prober._compile = lambda *candidate: future
    it.run(5000)
    assert "triton" not in it.op.ran
    future.set_result(None)
    it.run(6000)
    assert it.serves[0] == "triton"


def test_a_problem_that_goes_wrong_is_left_to_pytorch(program, monkeypatch):
    it = program(50e-6)
    monkeypatch.setattr(it.machine, "room", lambda like, size: False)
    with pytest.warns(RuntimeWarning, match="its calls cannot be compared: MemoryError"):
        it.run(5000)
    assert "triton" not in it.op.ran
    assert it.kept() == []


def test_calls_that_the_host_bounds_are_left_to_pytorch(program):
    it = program(50e-6)
    it.waits_s = 1e-3  # for what comes next, at each call
    it.run(6000)
    (state,) = it.prober.states.values()
    assert (state.done, state.idle) == (True, probing.IDLE)
    assert it.serves == ("torch", "fallback")
    assert it.kept() == []


def test_times_that_have_some_of_the_hosts_do_not_count(program):
    it = program(90e-6)
    for n in range(9000):
        it.waits_s = 1e-3 if n % 3 == 0 else 0.0
        it.run(1)
    (found,) = it.kept()
    assert found.notes["observed"]["idle"] > 0
    assert found.interval.value == pytest.approx(100 / 90, rel=0.03)


def test_no_more_is_spent_than_may_be(program, monkeypatch):
    it = program(150e-6)
    it.call()
    monkeypatch.setattr(probing, "LOOKS", (10**6,))  # it is never clear
    monkeypatch.setattr(probing, "MOST_S", 100.0)
    for calls in range(1, 80):
        it.run(200)
        assert it.prober.spent_s <= SHARE * it.machine.host_s + 1e-3, calls
    (state,) = it.prober.states.values()
    assert not state.done
    assert 0.5 * SHARE * it.machine.host_s < it.prober.spent_s
    ran = it.op.ran.count("triton")
    assert 100 < ran < 4000  # of 16,000 calls


def test_a_problem_that_has_spent_its_own_ends(program, monkeypatch):
    it = program(130e-6)
    it.call()
    monkeypatch.setattr(probing, "MOST_S", 0.03)
    monkeypatch.setattr(probing, "LOOKS", (1000,))
    it.run(20000)
    (state,) = it.prober.states.values()
    assert state.done
    assert 0.5 * probing.MOST_S < state.spent_s < probing.MOST_S + 1e-4
    assert it.serves[0] == "torch"


def test_what_a_process_pays_once_is_the_programs_and_not_the_first_problems(program, monkeypatch):
    it = program(130e-6)
    it.prober._began -= 1000.0
    verify = it.prober.verify

    def loading(*args):
        it.machine.host_s += 0.5
        verify(*args)

    monkeypatch.setattr(it.prober, "verify", loading)
    it.run(20000)
    (state,) = it.prober.states.values()
    assert len(it.kept()) == 1
    assert state.spent_s < probing.MOST_S < 0.5 < it.prober.spent_s


def test_nothing_is_tried_while_a_graph_is_captured(program):
    it = program(50e-6)
    it.prober._began -= 1000.0
    it.call()
    it.prober.tick()
    it.op.ran.clear()
    it.capturing = True
    for _ in range(50):
        it.call()
    assert set(it.op.ran) == {"torch"}
    it.capturing = False
    it.run(100)
    assert "triton" in it.op.ran


def test_what_is_traced_is_told_what_serves_and_never_what_is_compared(program):
    it = program(50e-6)
    it.prober._began -= 1000.0
    it.call()
    it.prober.tick()
    choice = it.here.choose(it.op, it.problem, torch.device("cuda", 0))
    assert (choice.probed, choice.native) == (False, True)


def test_problems_with_a_verdict_and_without_a_kernel_of_pytorchs_are_not_probed(program):
    it = program(50e-6, known=(64,))
    it.run(100)
    assert it.prober.states == {}
    it = program(50e-6)
    it.op.fused = lambda problem: False
    it.run(100)
    assert it.prober.states == {}
    it = program(50e-6)
    it.op.family = "mlp"  # of whose call the op is a part
    it.run(100)
    assert list(it.prober.states.values()) == [None]


def test_where_bits_are_to_repeat_nothing_is_probed(program):
    it = program(50e-6)
    torch.use_deterministic_algorithms(True)
    try:
        it.run(100)
    finally:
        torch.use_deterministic_algorithms(False)
    assert it.prober.states == {}


def test_threads_take_turns_and_none_waits(program):
    it = program(50e-6)
    it.prober._began -= 1000.0
    it.call()
    it.prober.tick()
    failed = []

    def calls():
        try:
            for _ in range(300):
                it.call()
                it.machine.host_s += 1e-3
        except BaseException as broken:
            failed.append(broken)

    threads = [threading.Thread(target=calls) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    assert not failed
    (state,) = it.prober.states.values()
    with state.lock:
        assert state.done


def test_calls_before_it_begins_and_after_it_ends_are_the_usual_ones(program):
    it = program(50e-6)
    it.prober.close()
    it.here.prober = None
    it.run(1000)
    assert "triton" not in it.op.ran
    it.prober = it.fresh()
    it.prober._began -= 1000.0
    it.call()
    it.prober.tick()
    it.run(10)
    assert "triton" in it.op.ran
    it.prober.close()
    it.op.ran.clear()
    it.run(100)
    assert set(it.op.ran) == {"torch"}


def test_what_was_found_outlives_a_reload_and_the_program(program):
    it = program(50e-6)
    it.run(8000)
    it.here.reload()
    assert it.serves == ("triton", "exact")
    it.kept()
    it.here = Dispatch()
    assert it.serves == ("triton", "exact")


def test_a_registry_that_cannot_be_written_is_told_and_what_was_found_serves(program, monkeypatch):
    it = program(50e-6)
    it.run(8000)
    monkeypatch.setattr("tilebook.registry.Layers.writer", lambda self: Registry.open(it.path / "none.db", write=True))
    with pytest.warns(RuntimeWarning, match="what was observed is not kept"):
        it.prober.close()
    assert it.serves == ("triton", "exact")
