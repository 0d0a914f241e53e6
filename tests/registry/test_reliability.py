"""The programs of `benchmarks/reliability`, small, so that they stay of the package as it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tilebook

ROOT = Path(tilebook.__file__).parents[1]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what they try has no GPU in it")


def ran(*arguments, status=0):
    """What a program wrote."""
    command = [sys.executable, str(ROOT / "benchmarks" / "reliability" / arguments[0]), *map(str, arguments[1:])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status, done.stderr[-2000:]
    return json.loads(Path(arguments[-1]).read_text())


def test_kills_lose_nothing(tmp_path):
    found = ran("kills.py", "--kills", 4, "--migrations", 1, "--out", tmp_path / "kills.json")
    assert found["faults"] == []
    assert found["environment"]["python"]


@pytest.mark.long
def test_a_crowd_is_served(tmp_path):
    found = ran("crowd.py", "--writers", 1, "--readers", 1, "--minutes", 0.02, "--out", tmp_path / "crowd.json")
    assert found["errors"] == []
    assert found["trials_there"] == found["trials_stored"] > 16
    assert found["reads"] > 0


def test_records_go_in_and_out_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "reliability"))
    import scale

    made, first, second = (tmp_path / f"{name}.jsonl" for name in ("made", "first", "second"))
    registry, other = str(tmp_path / "registry.db"), str(tmp_path / "other.db")
    scale.make_file(made, 60, 2, 2, 0)
    assert scale.importing(registry, str(made))["records"] == 60
    assert scale.exporting(registry, str(first))["records"] == 60
    assert scale.importing(other, str(first))["records"] == 60
    scale.exporting(other, str(second))
    assert second.read_bytes() == first.read_bytes()
    assert scale.showing(registry, "attention_fwd")["records"] > 0
