"""Without a GPU a recorded kernel is compiled for any, and a predicted verdict is stored."""

import json

import matmul_autotuned as example
import others
import pytest
import torch
import triton
from click.testing import CliRunner
from served import GPU

from tilebook.cli import main
from tilebook.errors import UsageError
from tilebook.foreign.record import Recording
from tilebook.tuner.process.compiler import compile_here

pytestmark = pytest.mark.usefixtures("forked_here")


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Of a call that nobody has made: what it would have been called with."""
    folder = tmp_path_factory.mktemp("record")
    recording, kernel = Recording(folder), example.matmul_kernel
    a, b, c = (torch.empty(512, 512, dtype=torch.float16) for _ in range(3))
    args = (a, b, c, 512, 512, 512, *a.stride(), *b.stride(), *c.stride())
    tiles = lambda meta: (triton.cdiv(512, meta["TILE_M"]) * triton.cdiv(512, meta["TILE_N"]),)  # noqa: E731
    recording.note(kernel, args, {"grid": tiles, "warmup": False})
    assert recording.left_out == {}
    recording.write()
    return folder


@pytest.mark.sampled(4)
@pytest.mark.parametrize("gpu", ["A100", "H100", "B200", "MI300X"])
def test_a_product_is_compiled_for_a_gpu_that_is_not_here(gpu, record, tmp_path):
    command = ["tune", "--recorded", record, "--gpu", gpu, "--registry", tmp_path / "registry.db", "--trials", 2]
    done = CliRunner().invoke(main, [*map(str, command), "--workers", "1", "--format", "json"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["status"], row["op"]) == ("predicted", "matmul_autotuned:matmul_kernel")
    assert row["predicted_ms"] > 0
    assert row["tried"] == 2


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
    command = ["tune", "--recorded", tmp_path / "record", "--gpu", "H100", "--registry", tmp_path / "registry.db"]
    done = CliRunner().invoke(main, [*map(str, command), "--trials", "1", "--workers", "1"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert len(list((tmp_path / "cache").rglob("columns_kernel.cubin"))) == 2
