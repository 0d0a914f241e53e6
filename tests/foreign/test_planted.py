"""Kernels as users have them, through the real worker and session in the interpreter: no faulty config becomes a
verdict, and no honest one is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import corpus
import planted
import pytest
from corpus import sly
from recorded import recording, tune

pytestmark = pytest.mark.usefixtures("forked_here")


def test_there_are_faults_and_honest_configs_enough():
    faults, honest = corpus.planted()
    assert len(corpus.CALLS) >= 12
    assert len(faults) >= 60
    assert honest >= 200


@pytest.mark.sampled(15)
@pytest.mark.parametrize("kernel", corpus.CALLS, ids=lambda name: name.rpartition(":")[2])
def test_planted_faults_are_refused_and_honest_configs_are_not(kernel, tmp_path):
    with recording(tmp_path / "record") as made:
        corpus.CALLS[kernel]("cpu")
    assert made.left_out == {}
    (state,) = tune(tmp_path / "record", tmp_path / "registry.db", planted.rules(tmp_path), attempt_s=4.0)
    assert state.error == ""
    found = planted.found(tmp_path / "registry.db", kernel)
    assert planted.wrongs(kernel, found) == []
    assert found.tried == sum(config.kwargs["FAULT"] == 0 for config in corpus.tuner(kernel).configs)


@pytest.mark.long
def test_every_planted_fault_compiles_for_a_gpu_to_a_code_of_its_own(tmp_path):
    here = Path(__file__).parent
    paths = os.pathsep.join(filter(None, [str(here.parents[1]), str(here), os.environ.get("PYTHONPATH", "")]))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(here / "compile_corpus.py"), str(tmp_path)],
        env={**environment, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert {name.rpartition(":")[2] for name, *_ in rows} >= {name.rpartition(":")[2] for name in corpus.CALLS} | set(
        sly.CALLS
    )
    assert [row for row in rows if row[1] != row[2] or row[3]] == []
