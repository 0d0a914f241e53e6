"""Kernels of others on a GPU: recorded, tuned, served; faults that only a GPU has become no verdict."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kernels_of_others as others
import pytest
import torch
from plain_of_others import SPACES

from tilebook.registry import Registry

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(*command, **variables):
    path = os.pathsep.join(each for each in (str(ROOT), os.environ.get("PYTHONPATH", "")) if each)
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tuned(program, folder, *command, **variables):
    """Records a program, tunes the record by this command, and returns the rows and the registry."""
    run(*program, TILEBOOK_TRITON=f"record:{folder / 'record'}", **variables)
    registry = folder / "registry.db"
    options = ("tune", "--recorded", folder / "record", "--registry", registry, "--workers", 4, "--format", "json")
    return json.loads(run(*command, *options)), registry


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """What is tuned with less patience: a config hangs until its process is killed."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "spaces.json").write_text(json.dumps(SPACES))
    variables = {"TILEBOOK_SPACES": str(folder / "spaces.json")}
    return tuned([HERE / "kernels_of_others.py"], folder, HERE / "impatient.py", **variables)


def test_each_kernel_of_a_program_has_a_measured_verdict(program):
    rows, _ = program
    names = {"scale_kernel", "add_kernel", "total_kernel", "tiles_kernel", "plain_kernel"}
    assert {row["op"].partition(":")[2] for row in rows} == names
    assert {row["status"] for row in rows} <= {"measured", "default"}


def test_no_faulty_config_is_in_a_verdict_and_no_right_one_is_refused(program):
    _, path = program
    with Registry.open(path) as registry:
        verdicts, trials = registry.verdicts(), registry.trials()
    assert all(config.get("FAULT", 0) == 0 for verdict in verdicts for _, config in verdict.ranking())
    failed = [trial for trial in trials if trial.failure not in (None, "slow", "duplicate_binary")]
    refused = {trial.config.get("FAULT", 0): f"{trial.failure}: {trial.reason}" for trial in failed}
    assert set(refused) == set(others.FAULTS.values()), refused
    expected = {"silent": ("wrong_answer",), "race": ("wrong_answer", "not_repeatable"), "ragged": ("wrong_answer",)}
    expected |= {"outside": ("wrote outside",), "damage": ("changed its input",), "hang": ("run_timeout",)}
    expected |= {"beyond": ("run_error", "worker_died")}
    for name, words in expected.items():
        assert any(word in refused[others.FAULTS[name]] for word in words), refused


def test_a_second_program_is_served_and_searches_nothing(program):
    rows, registry = program
    spaces = str(registry.parent / "spaces.json")
    told = run(
        HERE / "kernels_of_others.py", TILEBOOK_TRITON="serve", TILEBOOK_REGISTRY=str(registry), TILEBOOK_SPACES=spaces
    )
    *searching, plain = map(str.split, told.splitlines())
    assert [line[2] for line in searching] == ["served"] * 4
    (row,) = (row for row in rows if row["op"].endswith(plain[0]))
    assert int(plain[1]) == row["config"]["BLOCK"]


def test_the_examples_product_runs_its_verdict(tmp_path):
    command = [ROOT / "examples" / "matmul_autotuned.py", "--size", "1024"]
    (row,), registry = tuned(command, tmp_path, "-m", "tilebook.cli")
    told = run(*command, TILEBOOK_REGISTRY=str(registry))
    for axis in ("TILE_M", "TILE_N", "TILE_K", "num_warps", "num_stages"):
        assert f"{axis}: {row['config'][axis]}," in told
    assert float(told.split()[-1]) < 0.5
