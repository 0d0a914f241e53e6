"""The user's program starts workers, however it is run, and no worker is ever that program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_worker import CpuServer
from fakes import tune
from injected import Pair, make_injected
from toy import Scaling, make_op

import tilebook
from tilebook import op as ops
from tilebook.registry import Failure
from tilebook.tuner.judge.verify import trial_cases
from tilebook.tuner.process.runner import GpuRunner, Limits
from tilebook.tuner.process.worker import Server, failure_of

PROGRAM = """
import os
print("started", flush=True)
from fakes import tune
from tilebook.tuner.process.runner import GpuRunner
runner = GpuRunner(worker="toy_worker")
states, registry = tune(os.environ["REGISTRY"], runner, trials=10)
print(states[0].error, registry.verdicts()[0].status, flush=True)
runner.close()
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", ["script", "piped"])
def test_a_program_without_a_main_guard_can_tune(how, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    paths = os.pathsep.join([str(Path(tilebook.__file__).parents[1]), str(Path(__file__).parent)])
    ran = subprocess.run(
        [sys.executable, str(script) if how == "script" else "-"],
        input=None if how == "script" else PROGRAM,
        env={**os.environ, "PYTHONPATH": paths, "REGISTRY": str(tmp_path / "registry.db")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.stdout.split() == ["started", "default"], ran.stderr


def test_what_a_program_calls_is_timed_and_what_the_op_computes_is_verified():
    calls = []

    def whole(x):
        calls.append("verified")
        return x * 3

    def less(x):
        calls.append("timed")
        return x * 3

    class Running:
        """A clock that runs what it is given."""

        def estimate(self, call):
            return call(x) is None or 1.0

        def capture(self, call, estimate_ms):
            call(x)
            self.sample = lambda: estimate_ms
            return self

        def samples(self, n):
            return [self.sample()] * n

    op, problem = make_op(), Scaling(16, 16)
    op.implementation("own", timed=less)(whole)
    (x,) = problem.inputs("cpu", 0)
    server = Server()
    server._op, server._problem, server._gpu, server._bench = op, problem, torch.device("cpu"), Running()
    server._cases = trial_cases(op, problem, "cpu")
    candidate = {"implementation": "own", "config": {}}
    assert server._attempt({**candidate, "most_ms": None})["failure"] is None
    first = calls.index("timed")
    assert set(calls[:first]) == {"verified"}
    assert set(calls[first:]) == {"timed"}
    calls.clear()
    server._confirm({"candidates": [candidate], "seed": 0, "rounds": 1})
    first = calls.index("timed")
    assert set(calls[:first]) == {"verified"}
    assert set(calls[first:]) == {"timed"}


class CompilationError(Exception):
    """Named as Triton's."""


class CompileTimeAssertionFailure(CompilationError):
    pass


class OutOfMemoryError(RuntimeError):
    """Named as PyTorch's."""


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (CompileTimeAssertionFailure("no"), Failure.COMPILE_ERROR),
        (RuntimeError("PassManager::run failed"), Failure.COMPILE_ERROR),
        (OutOfMemoryError("no"), Failure.OUT_OF_RESOURCES),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (KeyError("what"), None),
    ],
)
def test_what_a_candidate_raises_before_its_kernel_runs_has_a_class(error, failure):
    assert failure_of(error) is failure


def _good(x, n):
    return x * 3, x * 5


def _mutates(x, n):
    x += 1
    return _good(x, n)


def _does_not_compile(x, n):
    raise CompilationError("no")


def _raises(x, n):
    raise KeyError("who knows")


OP = make_injected("isolation", _good, {"mutates": _mutates, "does_not_compile": _does_not_compile, "raises": _raises})


@pytest.fixture(scope="module")
def server():
    made = CpuServer()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(ops._OPS, OP.name, OP)
        made.handle({"do": "prepare", "gpu": 0, "op": OP.name, "problem": Pair(16, 16, 4).key, "mode": "graph"})
    return made


def _named(kind):
    return {"implementation": "triton", "config": {"kind": kind, "n": 0}}


def _confirm(server, *candidates, seed=0):
    return server.handle({"do": "confirm", "candidates": list(candidates), "rounds": 7, "seed": seed})


@pytest.mark.parametrize(
    ("kind", "failure"), [("good", None), ("mutates", "wrong_answer"), ("does_not_compile", "compile_error")]
)
def test_a_worker_names_the_class_of_a_failure(server, kind, failure):
    assert server.handle({"do": "attempt", "most_ms": None, **_named(kind)})["failure"] == failure
    (failed,) = _confirm(server, _named(kind))["failures"]
    assert (failed and failed["failure"]) == failure


def test_a_worker_leaves_unknown_errors_to_whoever_drives_it(server):
    with pytest.raises(KeyError):
        server.handle({"do": "attempt", "most_ms": None, **_named("raises")})


def test_finalists_that_fail_are_named_and_the_others_timed(server):
    reply = _confirm(server, _named("good"), _named("mutates"), {"implementation": "torch", "config": {}})
    assert [failed and failed["failure"] for failed in reply["failures"]] == [None, "wrong_answer", None]
    assert [len(samples) for samples in reply["samples_ms"]] == [7, 0, 7]


def test_a_finalist_is_verified_once_in_a_process(server, monkeypatch):
    _confirm(server, _named("good"), seed=5)
    monkeypatch.setattr("tilebook.tuner.process.worker.verify", lambda *_: pytest.fail("verified again"))
    assert _confirm(server, _named("good"), seed=5)["failures"] == [None]


def test_a_worker_that_cannot_start_is_the_problem_s_error_not_the_run_s(tmp_path):
    states, registry = tune(tmp_path / "registry.db", GpuRunner(worker="no_such_module", limits=Limits(prepare_s=5)))
    assert "no_such_module" in states[0].error
    assert registry.verdicts() == []
