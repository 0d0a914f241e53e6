"""The benchmarks of training steps, tried on the CPU."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def small_models(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("small_models")


def run(program, out, *more):
    """Runs a benchmark to its end, small and on the CPU."""
    command = [
        sys.executable,
        str(BENCHMARKS / program),
        "--device",
        "cpu",
        "--tiny",
        "--rounds",
        "2",
        "--out",
        str(out),
    ]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("forked")
def test_every_model_trains_and_both_have_the_same_losses(tmp_path):
    out = tmp_path / "steps.json"
    run("train_steps.py", out, "--modes", "eager")
    rows = json.loads(out.read_text())["results"]
    assert len(rows) == 7
    for row in rows:
        assert "failed" not in row, row
        assert row["agree"]
        assert len(row["ratio"]) == len(row["noise"]) == 3


@pytest.mark.usefixtures("forked")
def test_no_further_model_begins_once_time_is_over(tmp_path):
    out = tmp_path / "steps.json"
    run("train_steps.py", out, "--modes", "eager", "--seconds", "0")
    assert not out.exists()


class Attending(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_a_compiled_model_of_another_package_keeps_the_function_that_was_put_into_it(small_models):
    """Both copies have one code and could share what was compiled of it."""
    marked = replace(small_models.TILEBOOK, attention=lambda q, k, v: q + 1000)
    x, found = torch.randn(1, 1, 4, 8), []
    copies = {}
    for use in (small_models.PYTORCH, marked):
        model = small_models.Foreign(Attending(), use, lambda y: y)
        copies[use] = torch.compile(model, backend="eager")
    for _ in range(2):
        for use, compiled in copies.items():
            with small_models.attention_by(use):
                found.append(compiled(x).max().item() > 500)
    assert found == [False, True, False, True]


@pytest.mark.long
def test_modules_are_timed_beside_pytorchs(tmp_path):
    out = tmp_path / "modules.json"
    run("modules.py", out, "--only", "post-norm, bf16")
    rows = json.loads(out.read_text())["results"]
    assert [row["case"].split(", ", 1)[0].split()[-1] for row in rows] == ["train", "train", "eval"]
    assert all(set(row["ms"]) == {"pytorch", "tilebook.nn", "TILEBOOK=1"} for row in rows)


@pytest.fixture
def e2e(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pytest.importorskip("transformers")
    return importlib.import_module("e2e")


def first_loss(e2e, case, how):
    run = e2e.Run(case, how, "cpu", tiny=True)
    with run.inside():
        return run.step()


def test_a_mixed_batch_in_one_row_is_the_batch_without_its_padding(e2e):
    case = e2e.CASES["Llama 1B 4 × 64 … 4096"]
    batch = e2e.batch_of(case, 128256, False)
    lengths = batch["attention_mask"].sum(1)
    row = e2e.packed(batch)
    assert lengths.max() == 4096
    assert row["input_ids"].shape == row["position_ids"].shape == (1, lengths.sum())
    assert row["position_ids"][0, lengths[0]] == 0
    losses = {how: first_loss(e2e, case, how) for how in ("pytorch", "attention", "packed")}
    torch.testing.assert_close(losses["packed"], losses["pytorch"], rtol=1e-3, atol=0)
    torch.testing.assert_close(losses["attention"], losses["pytorch"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["Gemma-2-like 2 × 4096", "Whisper-small 16 × 128", "Llama 1B, 256 after 8 × 1024"])
def test_tilebooks_attention_gives_what_plain_pytorch_runs(e2e, name):
    case = e2e.CASES[name]
    theirs, ours = (first_loss(e2e, case, how) for how in ("pytorch", "attention"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
