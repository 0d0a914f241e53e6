"""The programs that tune on a GPU again and again, with stand-ins for it: what they count is what happened."""

import importlib.util
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fakes import ENVIRONMENT, GPU, FakePool, tune
from test_session_statistics import NoisyRunner, rough
from toy import make_op

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "benchmarks/results/nvidia-h200/sweeps/attention_fwd-B4-H16-S2048-D64-bf16.jsonl"


def program(name):
    spec = importlib.util.spec_from_file_location(f"{name}_program", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


agreement, resume = program("agreement"), program("resume")
sys.path.append(str(ROOT / "benchmarks"))  # where it imports another program from
time_to_best = program("time_to_best")


def noisy_tunes(runs, budget_s=3600.0):
    op, seeds = make_op(), iter(range(100))
    problem = op.problem(64, 64)
    found = agreement.tunes(
        op,
        problem,
        GPU,
        ENVIRONMENT,
        lambda: agreement.Bench(FakePool(), NoisyRunner(rough, next(seeds))),
        range(runs),
        budget_s,
    )
    return op, problem, list(found)


def test_agreement_tunes_anew_each_time_and_compares_every_pair():
    result = agreement.document(*noisy_tunes(4))
    assert [run["seed"] for run in result["runs"]] == [0, 1, 2, 3]
    assert all(run["status"] == "measured" and run["tried"] > 16 and run["tied"] for run in result["runs"])
    assert (result["next"]["pairs"], result["all"]["pairs"]) == (3, 6)
    assert result["all"]["agree"] == sum(pair["agree"] for pair in result["pairs"])
    assert json.loads(json.dumps(result))["op"] == "scaling_fwd"
    assert "4 runs" in agreement.summary(result)


def outcome(seed, chosen, *tied):
    """A run that names config `chosen`, with a tie set."""
    first, *rest = ({"implementation": "triton", "config": {"BLOCK": block}} for block in (chosen, *tied))
    return {"seed": seed, "winner": first, "tied": rest}


def test_two_runs_agree_by_winner_or_where_each_winner_is_in_the_others_tie_set():
    def compared(one, other):
        return agreement.compared(outcome(0, *one), outcome(1, *other))

    assert compared((16, 16), (16, 16, 32)) == {"same": True, "agree": True, "either": True}
    assert compared((16, 16, 32), (32, 16, 32)) == {"same": False, "agree": True, "either": True}
    assert compared((16, 16), (32, 16, 32)) == {"same": False, "agree": False, "either": True}
    assert compared((16, 16), (32, 32)) == {"same": False, "agree": False, "either": False}


@pytest.mark.parametrize(("apart", "enough"), [(0, True), (1, True), (2, False)])
def test_nineteen_of_twenty_pairs_of_one_run_and_the_next_must_agree(apart, enough):
    op = make_op()
    # The last winners differ, each from the one before it.
    runs = [outcome(seed, 16 + max(0, seed - 20 + apart), 0) for seed in range(21)]
    shuffled = runs[1::2] + runs[::2]  # as they come from two GPUs
    result = agreement.document(op, op.problem(64, 64), shuffled)
    assert [run["seed"] for run in result["runs"]] == list(range(21))
    assert result["next"] == {"pairs": 20, "agree": 20 - apart}
    assert agreement.reached(result) == enough


def test_one_run_shows_nothing():
    op = make_op()
    assert not agreement.reached(agreement.document(op, op.problem(64, 64), [outcome(0, 16, 16)]))


def test_no_run_begins_without_time_to_end():
    assert len(noisy_tunes(50, budget_s=0.0)[2]) == 1


def test_agreement_over_a_recorded_sweep(tmp_path, monkeypatch, capsys):
    out = tmp_path / "agreement.json"
    monkeypatch.setattr(sys, "argv", ["agreement.py", "--sweep", str(SWEEP), "--runs", "3", "--out", str(out)])
    assert agreement.main() == 0
    result = json.loads(out.read_text())
    assert result["next"] == {"pairs": 2, "agree": 2}
    assert "3 runs" in capsys.readouterr().out


@pytest.mark.long
def test_processes_side_by_side_share_the_seeds_and_come_to_the_same(tmp_path, monkeypatch):
    def made(name, *options):
        out = tmp_path / f"{name}.json"
        command = ["agreement.py", "--sweep", str(SWEEP), "--runs", "3", "--out", str(out), *options]
        monkeypatch.setattr(sys, "argv", command)
        assert agreement.main() == 0
        return json.loads(out.read_text())

    monkeypatch.setattr(agreement.os, "cpu_count", lambda: 2)
    one, two = made("one"), made("two", "--gpus", "all")
    for run in (*one["runs"], *two["runs"]):
        assert run.pop("seconds") > 0
    assert two.pop("gpus") == 2
    assert one == two


def test_each_gpu_gets_its_share_of_runs_and_compilers_and_none_more_than_there_are():
    asked = []

    def command(gpu, seeds, workers, path):
        asked.append((gpu, list(seeds), workers))
        written = json.dumps({"runs": [{"seed": seed} for seed in seeds]})
        return [sys.executable, "-c", f"open({str(path)!r}, 'w').write({written!r})"]

    _, outcomes = agreement.side_by_side([0, 2, 3, 5], 6, 60, command)
    assert asked == [(0, [0, 4], 15), (2, [1, 5], 15), (3, [2], 15), (5, [3], 15)]
    assert sorted(each["seed"] for each in outcomes) == list(range(6))
    asked.clear()
    agreement.side_by_side([0, 1, 2], 2, 5, command)
    assert asked == [(0, [0], 2), (1, [1], 2)]


def test_a_gpu_whose_process_fails_is_named():
    def command(gpu, seeds, workers, path):
        return [sys.executable, "-c", "" if gpu else f"open({str(path)!r}, 'w').write('{{}}')"]

    with pytest.raises(RuntimeError, match="GPU 1"):
        agreement.side_by_side([0, 1], 2, 2, command)


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_tune_is_started_again_and_what_was_stored_is_compared(tmp_path, monkeypatch):
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), *filter(None, sys.path)]))

    def command(path):
        # Nothing has to be compiled again: what is killed gets on four times as fast as the run that nobody kills.
        seconds = "0.12" if path.stem == "undisturbed" else "0.03"
        return [sys.executable, str(here / "killing.py"), "--into", str(path), "0", seconds]

    result = resume.resumed(command, tmp_path, 2, 1)
    assert [kill["status"] for kill in result["kills"]] == [-9] * 2
    for kill in result["kills"]:
        assert 0 < kill["seen_before"] <= kill["stored_after"] <= result["resumed"]["trials"]
    assert (result["lost"], result["interrupted"], result["measured_twice"]) == (0, 2, 0)
    assert result["winner_in_tie_set"]
    assert resume.good(result)
    assert "0 trials lost" in resume.summary(result)
    assert not resume.good({**result, "interrupted": 1}), "a kill after the verdict shows nothing"


def test_how_soon_a_tune_was_at_the_best_of_all_configs(tmp_path, monkeypatch):
    op, began = make_op(), datetime.now(UTC)
    problem = op.problem(64, 64)
    _, registry = tune(tmp_path / "registry.db", NoisyRunner(rough, 0))
    with registry:
        trials, (verdict,) = registry.trials(), registry.verdicts()
    steps = time_to_best.climb(reversed(trials), began, 1e9)
    times = [step["time_ms"] for step in steps]
    assert times == sorted(times, reverse=True)
    assert times[-1] == min(trial.time_ms for trial in trials if trial.time_ms is not None)
    assert [step["tried"] for step in steps] == sorted({step["tried"] for step in steps})
    assert all(step["tflops"] == round(1 / step["time_ms"], 1) for step in steps)

    rows = [
        {"implementation": "triton", "config": dict(verdict.config), "time_ms": 1.0, "seconds": 100.0},
        {"implementation": "triton", "config": {}, "time_ms": None, "seconds": 200.0},
    ]
    together = [{"time_ms": ms, "speedup": [1.0, 0.99, 1.01]} for ms in (2.0, times[-1], times[-1])]
    monkeypatch.setattr(time_to_best, "autotuned", lambda *_: rows)
    monkeypatch.setattr(time_to_best, "against", lambda *_: together)
    for second, step in enumerate(steps, 10):
        step["seconds"] = float(second)
    ours = {"seconds": 50.0, "feasible": {"triton": 2}, "best_so_far": steps}
    result = time_to_best.compared(op, problem, ours, verdict, 300.0)
    soon = next(step for step in steps if step["time_ms"] <= times[-1] / 0.98)
    assert (result["whole"], result["failed"], result["seconds"]) == (True, 1, 200.0)
    assert result["ours_there_after_s"] == soon["seconds"]
    assert result["share_of_its_time"] == soon["seconds"] / 200
    assert result["our_whole_tune_of_its_time"] == 0.25
