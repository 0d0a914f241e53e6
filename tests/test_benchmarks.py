"""Programs that measure run to their end without a GPU, so that what a GPU is spent on is not their mistakes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tilebook

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name, out, *arguments):
    command = [sys.executable, str(BENCHMARKS / name), "--dry-run", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


@pytest.mark.long
def test_memory_of_a_matrix_of_scores_grows_with_the_square_and_ours_does_not(tmp_path):
    document, printed = run("attention_memory.py", tmp_path / "memory.json")
    exponents = document["exponent"]
    assert exponents["tilebook"] == pytest.approx(1, abs=0.1)
    assert 1.6 < exponents["eager"] < 2.1
    assert "exponent" in printed


@pytest.mark.long
def test_precisions_are_compared_forward_and_backward(tmp_path):
    document, _ = run("attention_fp32.py", tmp_path / "fp32.json", "--rounds", "2", "--only", "fp32")
    assert {row["op"] for row in document["results"]} == {"attention_fwd", "attention_bwd"}
    for row in document["results"]:
        # Ours too, but where Triton's interpreter and NumPy are at odds.
        assert {"torch", "sdpa"} <= set(row["candidates"])


def test_tables_of_speed_in_the_documentation_are_those_of_the_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gains = importlib.import_module("gains")
    rows = json.loads((BENCHMARKS / "results/nvidia-h200/fa.json").read_text())["results"]
    root = BENCHMARKS.parent
    assert "\n".join(gains.gains_table(rows)) in (root / "docs/speed.md").read_text()
    for direction in ("fwd", "bwd"):
        assert "\n".join(gains.rates_table(rows, direction)) in (root / "docs/kernels/attention.md").read_text()


def test_packs_of_pytorchs_own_function_are_as_long_as_said(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    program = importlib.import_module("varlen_attn")
    for total, longest in ((program.TOKENS, 2048), (program.TOKENS, 8192), (64, 40)):
        found = program.lengths(total, longest)
        assert sum(found) == total
        assert max(found) <= longest
        (q, *_), ends = program.packed(found, 2, 16, "cpu")
        assert (ends[-1], q.shape) == (total, (total, 2, 16))
    monkeypatch.setattr(sys, "argv", ["varlen_attn.py", "--device", "cpu", "--tiny", "--out", str(tmp_path / "out")])
    program.main()
    assert json.loads((tmp_path / "out").read_text())["rows"] == []


@pytest.mark.long
def test_what_a_call_costs_the_host_is_asked_of_every_public_function(tmp_path):
    document, _ = run("host_cost.py", tmp_path / "host.json")
    asked = {name.split()[0] for name in document["results"] if not name.startswith("in PyTorch's place")}
    # Packs have nothing beside them on the CPU.
    offered = {name for name, module in tilebook._MODULE.items() if module.startswith("kernels.")}
    assert asked == offered - {"attention_varlen"}
    for name, row in document["results"].items():
        assert ("forward+backward" in row) == ("decode" not in name)
        assert all(len(each["ratio"]) == 3 for each in row.values())


@pytest.mark.long
def test_a_program_is_watched_without_and_with_probing_and_timed_by_each_registry(tmp_path):
    arguments = "--problems", "2", "--seconds", "1", "--rounds", "2", "--work", str(tmp_path / "work")
    document, printed = run("probing.py", tmp_path / "probing.json", *arguments)
    (watched,) = document["watch"]
    assert watched["spent_s"] == 0.0  # there is no GPU
    assert set(watched["cycle_ms"]) == {"before", "during", "after"}
    assert [set(row["ms"]) for row in document["results"]] == [{"before", "again"}] * watched["problems"]
    assert "gain" in printed
