"""Kernels as users have them, with planted faults, through `tilebook tune --recorded` on a GPU; a process for each
kernel, so that what hangs or reads where it must not is that kernel's alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
FOREIGN = HERE.parent / "foreign"
sys.path.append(str(FOREIGN))

import corpus  # noqa: E402
import planted  # noqa: E402
import slyly  # noqa: E402
from corpus import sly  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def run(*command, **variables):
    paths = [str(HERE.parents[1]), str(FOREIGN), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kernel", corpus.CALLS, ids=lambda name: name.rpartition(":")[2])
def test_planted_faults_are_refused_and_honest_configs_are_not_on_a_gpu(kernel, tmp_path):
    run("-m", "corpus", "cuda", kernel, TILEBOOK_TRITON=f"record:{tmp_path / 'record'}")
    registry = tmp_path / "registry.db"
    options = ("--rules", planted.rules(tmp_path), "--registry", registry, "--workers", 4)
    run(HERE / "impatient.py", "tune", "--recorded", tmp_path / "record", *options)
    assert planted.wrongs(kernel, planted.found(registry, kernel)) == []


@pytest.mark.parametrize("kernel", sly.CALLS)
def test_sly_faults_are_found_and_honest_configs_pass_on_a_gpu(kernel, tmp_path):
    assert slyly.judged(kernel, tmp_path, "cuda") == ([], {})
