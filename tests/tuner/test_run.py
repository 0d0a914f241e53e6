"""Which GPUs a run measures on, and what it prints."""

import dataclasses
import io
import re
from typing import Any, ClassVar

import pytest
import torch
from fakes import GPU, FakePool, FakeRunner, tune
from test_session import valley
from toy import Scaling, make_op

from tilebook import device as devices
from tilebook.op import UsageError
from tilebook.report import rows
from tilebook.report.live import view
from tilebook.report.rows import row, table
from tilebook.tuner import explore
from tilebook.tuner import run as runs
from tilebook.tuner.model import Prediction
from tilebook.tuner.progress import Run
from tilebook.tuner.run import _target


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(devices, "present", lambda: True)
    monkeypatch.setattr(devices, "current", lambda index=0: GPU)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_gpus_are_chosen_by_number_or_all_and_one_is_the_default(two_gpus):
    assert _target(None, None) == (GPU, [0])
    assert _target(None, "all") == (GPU, [0, 1])
    assert _target(None, "1") == (GPU, [1])
    assert _target("H200", "1,0") == (GPU, [0, 1])


@pytest.mark.parametrize(
    ("gpu", "gpus", "says"),
    [
        (None, "first", "neither 'all' nor numbers"),
        (None, "", "neither 'all' nor numbers"),
        (None, "0,2", "there is no GPU 2, only 0 to 1"),
        (None, "-1", "there is no GPU -1"),
        ("A100", "all", "the GPUs here are NVIDIA H200"),
    ],
)
def test_wrong_gpus_are_refused_in_one_line(two_gpus, gpu, gpus, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        _target(gpu, gpus)


def test_gpus_of_different_models_are_refused(two_gpus, monkeypatch):
    other = dataclasses.replace(GPU, sm_count=114)
    monkeypatch.setattr(devices, "current", lambda index=0: (GPU, other)[index])
    with pytest.raises(UsageError, match=r"one model, not NVIDIA H200 \(sm_90, 114 SMs\), NVIDIA H200 \(sm_90, 132 SM"):
        _target(None, "all")
    assert _target(None, "1") == (other, [1])


def test_gpus_without_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(devices, "present", lambda: False)
    with pytest.raises(UsageError, match="no GPU here"):
        _target("H200", "all")


class Started(FakeRunner):
    """As `GpuRunner`: made from an index and a mode, and started."""

    made: ClassVar[list[Any]] = []

    def __init__(self, index, mode) -> None:
        super().__init__(valley, seed=index)
        self.mode = mode
        self.made.append(self)

    def start(self) -> None: ...


def test_a_run_has_a_runner_for_each_gpu_and_each_gets_its_share(two_gpus, monkeypatch, tmp_path):
    class Pool(FakePool):
        def __init__(self, device, workers) -> None:
            super().__init__()

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731
        start = lambda self: None  # noqa: E731

    monkeypatch.setattr(runs, "GpuRunner", Started)
    monkeypatch.setattr(runs, "CompilePool", Pool)
    monkeypatch.setattr(Started, "made", [])
    op = make_op()
    problems = [(op, Scaling(64 << n, 64)) for n in range(3)]
    outcome = runs.tune_problems(problems, gpus="all", mode="eager", trials=6, registry=str(tmp_path / "registry.db"))
    assert [runner.mode for runner in Started.made] == ["eager", "eager"]
    assert {state.gpu for state in outcome.states} <= {0, 1}
    assert [each["mode"] for each in rows.tuned(outcome.states, outcome.layer, outcome.gpu.name)] == ["eager"] * 3
    assert not any(state.error for state in outcome.states)


@pytest.fixture
def tuned(tmp_path):
    states, registry = tune(tmp_path / "registry.db", FakeRunner(valley))
    return states[0], row(registry.verdicts()[0], "explicit")


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_says_what_won_by_how_much_and_what_it_took(tuned, width, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    state, each = tuned
    table([each], out, tuned=True)
    lines = out.getvalue().splitlines()
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    for wanted in ("scaling_fwd", "BLOCK=128", f"{each['speedup']:.3f}", f"[{each['speedup_low']:.3f}", "torch"):
        assert wanted in text, text
    numbers = (each["time_ms"], each["default_time_ms"], each["others"]["torch"])
    for wanted in (*(f"{number:.4g}" for number in numbers), str(state.tried), "busy"):
        assert wanted in text, text


def test_a_finished_problem_is_one_line_on_stderr(tmp_path, capsys):
    run = Run(1, True)
    with view(run):
        tune(tmp_path / "registry.db", FakeRunner(valley), run=run)
    (said,) = capsys.readouterr().err.splitlines()
    assert re.match(r"\[1/1\] scaling_fwd M64,H64: 4\.\d+x \[4\.\d+, 4\.\d+\] over the default: triton BLOCK=128", said)
    assert re.search(r"\d+ tried, \d+ s, GPU \d+% busy$", said)


@pytest.mark.parametrize(("default_ms", "stays"), [(1.1, True), (1.5, False)])
def test_a_prediction_says_whether_the_default_stays_and_what_is_served_before_it(
    tmp_path, capsys, monkeypatch, default_ms, stays
):
    times = iter([default_ms])  # the default is the first
    monkeypatch.setattr(
        explore, "predict", lambda *_: Prediction(next(times, 1.0), occupancy=1.0, waves=1.0, bound="memory")
    )
    run = Run(1, False)
    with view(run):
        _, registry = tune(tmp_path / "registry.db", None, run=run)
    assert (
        "predicted: the default stays, since the best is predicted to be 1.10x as fast" in capsys.readouterr().err
    ) is stays
    out = io.StringIO()
    table([row(registry.verdicts()[0], "user")], out, tuned=True)
    assert ("default stays" in out.getvalue()) is stays
    assert "What was measured, in any layer, is served before what is predicted" in out.getvalue()
