"""The programs of `benchmarks/papers`, tried on the CPU."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAPERS = Path(__file__).parents[1] / "benchmarks" / "papers"


@pytest.fixture
def papers(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPERS.parent))
    monkeypatch.syspath_prepend(str(PAPERS))
    return importlib.import_module


def run(name, out, *arguments):
    command = [sys.executable, str(PAPERS / name), "--device", "cpu", "--tiny", "--rounds", "2", "--out", str(out)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert out.with_suffix(".png").exists()
    return json.loads(out.read_text()), done.stdout


def test_cct_is_timed_and_learns_in_every_way_and_with_every_fault(tmp_path, papers):
    document, printed = run("cct.py", tmp_path / "cct.json", "--seeds", "1", "--steps", "1")
    faults = papers("faults")
    assert [row["way"] for row in document["accuracy"]] == [*faults.WAYS, *faults.FAULTS]
    for row in document["speed"]:
        assert set(row["step"]["ms"]) == set(row["forward"]["ms"]) == set(faults.WAYS), row
    assert "5325" in printed


def test_cct_is_of_the_size_that_its_authors_give(papers):
    model, plain = papers("cct_model"), papers("faults").PLAIN
    with torch.device("meta"):
        made = model.CCT(model.CCT_7, plain), model.CCT(model.CCT_14, plain)
    sizes = [sum(each.numel() for each in one.parameters()) / 1e6 for one in made]
    assert sizes == pytest.approx([3.76, 22.17], abs=0.005)


def test_ways_of_cct_compute_the_same_and_faults_in_the_forward_pass_do_not(papers):
    model, faults = papers("cct_model"), papers("faults")
    shape, x = model.CCT_7.tiny(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = model.CCT(shape, faults.PLAIN).eval()
    for each in plain.parameters():
        torch.nn.init.normal_(each, std=0.3)
    wanted = plain(x)

    def apart(way):
        other = model.CCT(shape, way.use).eval()
        other.load_state_dict(plain.state_dict())
        return ((other(x) - wanted).norm() / wanted.norm()).item()

    assert max(map(apart, faults.WAYS.values())) < 1e-5
    seen = {name for name, way in faults.FAULTS.items() if apart(way) > 1e-5}
    assert seen == {
        "the scale left out",
        "the scale applied twice",
        "heads and tokens mixed up",
        "64 rows of padding seen as keys",
        "softmax over the queries",
        "tanh GELU",
        "the first bias after GELU",
        "tanh GELU and fp16, its loss not scaled",
    }
