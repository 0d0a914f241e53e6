"""The benchmark of the promise, tried on the CPU: its cells, its yardsticks, and the program from end to end."""

import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tilebook import device as devices
from tilebook import op as ops
from tilebook.kernels.attention.peers import flash4

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_drawn_problems_are_the_same_for_a_seed_and_in_no_suite(benchmark):
    cells = benchmark("cells")
    drawn = cells.drawn(0, 30)
    assert [cell.name for cell in drawn] == [cell.name for cell in cells.drawn(0, 30)]
    assert [cell.name for cell in drawn] != [cell.name for cell in cells.drawn(1, 30)]
    assert len({(cell.kind, cell.label, cell.dtype) for cell in drawn}) == 30
    assert not {cell.name for cell in drawn} & {cell.name for cell in cells.of_suites()}


def test_every_kind_of_call_agrees_with_fp32_whoever_makes_it(benchmark):
    cells, yardsticks, truth = (benchmark(name) for name in ("cells", "yardsticks", "truth"))
    met = set()
    for cell in cells.tiny(cells.of_suites()):
        flags = [bool(v) for name, v in cell.sizes.items() if name in FORM]
        form = (cell.kind, cell.step, cell.sizes.get("vectors"), *flags)
        if form in met:
            continue
        met.add(form)
        given = yardsticks.inputs(cell, "cpu")
        reference = truth.reference(cell, given)
        makers = {**yardsticks.yardsticks(cell, given, "cpu"), "tilebook": lambda cell=cell: yardsticks.ours(cell)}
        for name, make in makers.items():
            try:
                outputs = yardsticks.step(cell, make())(given)
            except Exception:
                assert name != "tilebook", cell.name  # the others are not all made for a CPU
                continue
            assert max(truth.errors(cell, outputs, reference)) < 2e-2, f"{cell.name}: {name}"
    assert {kind for kind, *_ in met} == set(cells.KINDS)
    layer_norms = {(step, vectors) for kind, step, vectors, *_ in met if kind == "layer_norm"}
    assert layer_norms == {(step, vectors) for step in ("forward", "training") for vectors in (0, 1, 2)}


FORM = ("causal", "softcap", "bias", "alibi", "left", "window")


def test_an_output_that_is_wrong_is_seen(benchmark):
    cells, yardsticks, truth, program = (benchmark(n) for n in ("cells", "yardsticks", "truth", "never_slower"))
    cell = next(c for c in cells.tiny(cells.of_suites()) if c.kind == "attention" and c.step == "training")
    given = yardsticks.inputs(cell, "cpu")
    reference = truth.reference(cell, given)
    o, *grads = yardsticks.step(cell, yardsticks.ours(cell))(given)
    fine = truth.errors(cell, (o, *grads), reference)
    broken = truth.errors(cell, (o, grads[0], grads[1] * 1.1, grads[2]), reference)
    assert program._whole(cell, {"errors": {"torch": fine, "tilebook": fine}})["right"]
    assert not program._whole(cell, {"errors": {"torch": fine, "tilebook": broken}})["right"]
    nothing = truth.errors(cell, (o * torch.nan, *grads), reference)
    assert not program._whole(cell, {"errors": {"torch": fine, "tilebook": nothing}})["right"]


def test_a_tenth_of_the_drawn_problems_is_named_as_tune_takes_it(benchmark):
    cells, program = benchmark("cells"), benchmark("never_slower")
    commands = program.tune_a_tenth(cells.drawn(0, 60))
    shapes = [word for command in commands for word in command.split() if "," in word]
    assert len(shapes) == 6
    for command in commands:
        _, _, family, _, dtype, *rest = command.split()
        for label in rest[1::2]:
            ops.families()[family][0].problem.parse(label, dtype)


def test_without_flash4_dispatch_takes_the_package_for_missing(benchmark, monkeypatch):
    program, gpu = benchmark("never_slower"), devices.find("H200")
    monkeypatch.setattr(flash4, "package_version", lambda package: "4.0.0")
    monkeypatch.setattr(flash4, "_installed", functools.cache(flash4._installed.__wrapped__))  # nobody else's answers
    monkeypatch.setitem(sys.modules, "flash_attn.cute", ModuleType("flash_attn.cute"))
    assert flash4.available(gpu)
    program.without_flash4()
    assert not flash4.available(gpu)
    with pytest.raises(ImportError):
        importlib.import_module("flash_attn.cute")


def test_a_class_says_its_mean_its_worst_and_where(benchmark):
    figures = benchmark("figures")
    rows = [
        {"group": "mlp forward", "name": name, "own": own, "eager": {
            "yardstick": "torch", "ms": {"torch": ms}, "ratio": [0, ratio, 9], "noise": [0, noise, 9]}}
        for name, own, ms, ratio, noise in (("a", True, 0.04, 2.0, 0.5), ("b", False, 0.06, 0.5, 1.0))
    ]  # fmt: skip
    found = figures.classes(rows, "eager")
    assert found["mlp forward"]["mean"] == 1.0
    assert (found["mlp forward"]["worst"], found["mlp forward"]["worst_at"]) == (0.5, "b")
    assert found["mlp forward"]["noise"] == 2.0
    assert (found["mlp forward"]["own"], found["mlp forward"]["below_0.97"]) == (1, 1)
    assert found["all, below 50 µs"]["worst"] == 2.0
    assert found["all, from 50 µs"]["worst"] == 0.5


@pytest.mark.long
def test_the_program_ends_in_time_with_ratios_noise_kernels_and_errors_of_every_cell(tmp_path):
    out, kinds = tmp_path / "figures.json", ("mlp", "norms", "layer_norm")
    arguments = ["--device", "cpu", "--tiny", "--classes", ",".join(kinds), "--suites", "models", "--rounds", "2"]
    command = [sys.executable, str(BENCHMARKS / "never_slower.py"), "--out", str(out), *arguments, "--workers", "1"]
    done = subprocess.run(
        [*command, "--sample", "1", "--seconds", "200"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert document["measured"] == document["asked"] == 6
    assert not document["failed"]
    assert not document["wrong"]
    for row in document["results"]:
        assert row["right"]
        assert row["as in a plain process"]
        for mode in ("graph", "eager"):
            assert len(row[mode]["ratio"]) == len(row[mode]["noise"]) == 3
            assert set(row[mode]["ms"]) == {"torch", "tilebook"}
    assert set(document["classes"]["graph"]) == {f"{k} {s}" for k in kinds for s in ("forward", "training")}
    assert "worst at" in done.stdout
