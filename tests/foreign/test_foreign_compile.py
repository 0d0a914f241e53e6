"""Without a GPU a recorded kernel is compiled for any, and a predicted verdict is stored."""

import json
import os
import subprocess
import sys
from pathlib import Path

import others
import pytest
import torch
from click.testing import CliRunner
from served import GPU

from tilebook.cli import main
from tilebook.errors import UsageError
from tilebook.foreign import record
from tilebook.foreign.record import Recording
from tilebook.registry import Registry
from tilebook.tuner.process.compiler import compile_here

pytestmark = pytest.mark.usefixtures("forked_here")

HERE = Path(__file__).parent
RECORDS = HERE / "records"  # see make_records.py
PRODUCT, GLA = "matmul_autotuned:matmul_kernel", "fla.ops.common.chunk_h:chunk_fwd_kernel_h"


def asked(record, gpu, registry, *options):
    command = ["tune", "--recorded", record, "--gpu", gpu, "--registry", registry, "--workers", "1", *options]
    return [*map(str, command), "--format", "json"]


def compiled(place, gpu, registry, *options):
    """The rows of a tune of a record for a GPU that is not here."""
    done = CliRunner().invoke(main, asked(place, gpu, registry, *options), catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def elsewhere(file):
    """Tunes in a process of its own, where the kernels of a record, which names no folder, are found.

    What is imported here other tests find: models of transformers are others where fla is.
    """
    place = {"product": HERE.parents[1] / "examples", "simple_gla": Path(sys.prefix) / "beside"}[file]
    if not place.exists():
        pytest.skip("fla-core is not there: `make setup` puts it beside")
    paths = [str(place), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def run(record, gpu, registry, *options):
        command = [sys.executable, "-m", "tilebook", *asked(record, gpu, registry, *options)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.sampled(4, by="file")
@pytest.mark.parametrize("gpu", ["A100", "H100", "B200", "MI300X"])
@pytest.mark.parametrize("file", ["product", "simple_gla"])
def test_a_committed_record_is_compiled_for_a_gpu_that_is_not_here(gpu, file, tmp_path, elsewhere):
    wanted, trials = {"product": (PRODUCT, 2), "simple_gla": (GLA, 1)}[file]
    content = json.loads((RECORDS / f"{file}.json").read_text())
    content["kernels"] = [each for each in content["kernels"] if f"{each['module']}:{each['name']}" == wanted]
    (tmp_path / "record.json").write_text(json.dumps(content))
    (row,) = elsewhere(tmp_path / "record.json", gpu, tmp_path / "registry.db", "--trials", trials)
    assert (row["status"], row["op"]) == ("predicted", wanted)
    assert row["predicted_ms"] > 0
    assert row["tried"] == trials
    with Registry.open(tmp_path / "registry.db") as registry:
        (verdict,) = registry.verdicts()
    assert (verdict.op, verdict.status.value, gpu in verdict.device.name) == (wanted, "predicted", True)
    assert all(each.code for each in verdict.finalists)


def test_committed_records_hold_no_contents_and_no_folder_of_anybody():
    for file in RECORDS.iterdir():
        assert file.stat().st_size < 20_000
        for entry in record.read(file):
            assert entry.path == ""
            for problem in entry.problems.values():
                assert {type(value) for call in problem.calls for value in call.values.values()} <= {
                    int, float, bool, str, type(None), dict,
                }  # fmt: skip


def test_a_kernel_that_cannot_be_imported_without_a_gpu_is_left_for_the_process_that_has_one():
    left = compile_here(GPU, "no_such_module:kernel", "triton", "{}", {})
    assert (left.failure, left.binaries) == (None, ())
    assert "cannot be imported" in left.reason
    with pytest.raises(UsageError):
        compile_here(GPU, "no_such_op", "triton", "{}", {})


def test_all_recorded_calls_of_a_key_are_compiled_ahead(tmp_path, monkeypatch):
    recording, x = Recording(tmp_path / "record"), torch.empty(64, 2)
    for rows in (64, 50):  # Triton makes another kernel of what 16 divides
        args = (x[:rows], x[:rows], rows, 2)
        recording.note(others.columns_kernel, args, {"grid": (rows, 2), "warmup": False})
    recording.write()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    compiled(tmp_path / "record", "H100", tmp_path / "registry.db", "--trials", "1")
    assert len(list((tmp_path / "cache").rglob("columns_kernel.cubin"))) == 2
