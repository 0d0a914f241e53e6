"""What the tables of `show`, and those that a tune ends with, say to somebody who reads them for the first time."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_samples import OP, Run, key, today
from registry_samples import predicted

from tilebook.registry import Finalist, Registry, Speedup, Verdict
from tilebook.report.rows import default_stays, over_pytorch, row, table, tuned


def beside(**others: float) -> Verdict:
    """A verdict of today's kernel at 0.1 ms, twice as fast as the default, with others' times."""
    made = today()
    more = [Finalist(name, {}, time_ms=ms, speedup=Speedup(0.2 / ms, 0.1, 9.0)) for name, ms in others.items()]
    winner = replace(made.winner, default=False)
    default = Finalist("triton", {"ROWS": 1, "num_warps": 4}, time_ms=0.2, default=True)
    return replace(made, finalists=(winner, default, *more), default_time_ms=0.2, interval=Speedup(2.0, 1.9, 2.1))


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"torch": 0.3}, 3.0),
        ({"torch": 0.3, "cudnn": 0.15}, 1.5),
        ({"torch": 0.3, "inductor": 0.11, "flash_attention_4": 0.12}, 3.0),
        ({"inductor": 0.11}, None),
    ],
    ids=str,
)
def test_over_pytorch_is_over_the_fastest_kernel_of_pytorch_s_own(others: dict[str, float], expected: float) -> None:
    told = over_pytorch(row(beside(**others), "user"))
    assert told == (None if expected is None else pytest.approx(expected))


def test_over_pytorch_of_pytorch_s_own_kernel_is_one() -> None:
    made = beside(torch=0.3)
    won = replace(made, finalists=(Finalist("cudnn", {}, time_ms=0.1), *made.finalists[1:]))
    assert over_pytorch(row(won, "user")) == 1.0


@pytest.fixture
def shown(run: Run, tmp_path: Path) -> Path:
    path = tmp_path / "data" / "tilebook" / "registry.db"
    with Registry.open(path, write=True) as registry:
        registry.merge(verdicts=[replace(beside(torch=0.3), problem=key(f"M{rows},N256")) for rows in (1, 2, 4)])
    return path


@pytest.mark.usefixtures("shown")
def test_show_has_a_line_for_each_problem_and_all_has_the_rest(run: Run) -> None:
    lines = run("show").stdout.splitlines()
    heads = lines[1].split("  ")
    assert [each.strip() for each in heads if each.strip()] == [
        "problem", "winner", "ms", "over default", "over PyTorch", "layer"
    ]  # fmt: skip
    rows = [line.split() for line in lines if line.startswith(OP.name)]
    assert [each[1:] for each in rows] == [
        [f"M{rows},N256", "bf16", "triton", "0.1", "2.000", "3.000", "user"] for rows in (1, 2, 4)
    ]
    assert len(lines) == 8
    assert "show --all" in lines[-1]
    whole = run("show", "--all").stdout
    assert "[1.900, 2.100]" in whole
    assert "torch 0.3" in whole
    assert len(whole.splitlines()) > 12


@pytest.mark.usefixtures("shown")
def test_json_is_the_same_with_and_without_all(run: Run) -> None:
    told = run("show", "--format", "json").stdout
    assert told == run("show", "--format", "json", "--all").stdout
    assert {"speedup", "default_time_ms", "others", "config"} <= set(json.loads(told)[0])


def _predicted(best_ms: float) -> Verdict:
    made = predicted()
    default, other = {"ROWS": 1, "num_warps": 4}, {"ROWS": 2, "num_warps": 4}
    found = Finalist("triton", default, predicted_ms=2.0, default=True), Finalist("triton", other, predicted_ms=best_ms)
    return replace(made, finalists=found, notes={"predicted_default_ms": 2.0})


def test_a_tune_s_table_says_why_the_default_stays() -> None:
    stream = io.StringIO()
    table([row(_predicted(1.9), "user")], stream, tuned=True)
    told = stream.getvalue()
    assert "default stays" in told
    assert "best ~1.053" in told
    assert "no more than 1.2 times its speed" in " ".join(told.split())
    assert default_stays(_predicted(1.9)) == "since the best is predicted to be 1.05x as fast, and 1.2x is wanted"
    assert default_stays(_predicted(2.5)) == "nothing is predicted to be faster"


class _State:
    """What of a problem's state the rows ask for."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__ |= {"verdict": None, "skipped": False, "unreached": "", "op": OP.name, "label": "M1", **fields}
        self.dtype = "bf16"


def test_what_a_tune_has_not_searched_took_nothing_now() -> None:
    stream = io.StringIO()
    made = replace(beside(), notes={"tried": 7, "seconds": {"total": 3.0}})
    states: Any = [_State(verdict=replace(made, origin="shipped"), skipped=True)]
    (its,) = tuned(states, "user", "NVIDIA H200")
    assert its["layer"] == "shipped"
    table([its], stream, tuned=True)
    assert "what it took" not in stream.getvalue()
    assert stream.getvalue().startswith("verdicts for ")
    assert "nothing was searched: all of these have verdicts; --force searches" in stream.getvalue()


def test_a_tune_that_made_nothing_does_not_say_to_tune_first() -> None:
    stream = io.StringIO()
    table([], stream, tuned=True)
    assert stream.getvalue() == ""


def test_doctor_says_why_verdicts_do_not_serve(run: Run, tmp_path: Path) -> None:
    with Registry.open(tmp_path / "data" / "tilebook" / "registry.db", write=True) as registry:
        registry.merge(
            verdicts=[
                today("M1,N256"),
                today("M2,N256", trusted=False),
                today("M4,N256", kernel="ab" * 32),
                *(predicted(problem=key(f"M{rows},N256"), kernel=OP.digest, op=OP.name) for rows in (8, 16)),
            ]
        )
    told = json.loads(run("doctor", "--no-run", "--format", "json", status=None).stdout)
    (its,) = [each["text"] for each in told if each["about"] == "registry, user"]
    assert its.startswith(
        "1 verdicts serve, of 5 (2 predicted: they serve only where PyTorch has no kernel of its own; "
    )
    assert "1 not trusted: tilebook verify measures them here" in its
    assert "1 of kernels as they were" in its
