"""Candidates compiled for GPUs that are not here: what is read off them, and every way to fail."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import nullcontext
from pathlib import Path

import pytest
from toy_op import ToyProblem

from tilebook import op as ops
from tilebook.device import find
from tilebook.op import UsageError
from tilebook.tuner.process.child import ChildNotStarted
from tilebook.tuner.process.compile import Compiled, CompilePool
from tilebook.tuner.process.compiler import MAX_SPILLS

pytestmark = pytest.mark.usefixtures("forked")

pytest.importorskip("triton")

Compile = Callable[..., Compiled]


def problem(n: int = 512) -> str:
    return ToyProblem(n=n, dtype="bf16").key


def config(kind: str, **axes: int) -> dict[str, int | str | bool]:
    return {"kind": kind, "block": 128, "warps": 4, "stages": 3, "unused": 0, **axes}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("triton")
        patch.setenv("TRITON_CACHE_DIR", str(path))
        yield path


@pytest.fixture(scope="module")
def h200(cache: Path) -> Iterator[CompilePool]:
    with CompilePool(find("H200"), workers=2, modules=["toy_op"]) as pool:
        yield pool


@pytest.fixture
def compile_one(h200: CompilePool) -> Compile:
    def run(kind: str, n: int = 512, **axes: int) -> Compiled:
        return h200.submit("toy", "ours", problem(n), config(kind, **axes)).result(180)

    return run


@pytest.mark.parametrize("name", ["A100", "H200", "B200", "MI300X"])
def test_compiles_for_a_gpu_that_is_not_here(name: str, h200: CompilePool) -> None:
    device = find(name)
    with nullcontext(h200) if name == "H200" else CompilePool(device, workers=1, modules=["toy_op"]) as pool:
        scale = pool.submit("toy", "ours", problem(), config("scale"))
        matmul = pool.submit("toy", "ours", problem(), config("matmul", block=64, stages=2))
        persistent = pool.submit("toy", "ours", problem(), config("persistent"))
        assert (scale.result(180).failure, scale.result().reason) == (None, "")
        (kernel,) = scale.result().binaries
        assert kernel.name == "scale_kernel"
        assert (kernel.grid, kernel.shared, kernel.spills, kernel.warps) == (512 * 512 // 128, 0, 0, 4)
        assert 1 <= kernel.registers <= 255
        (kernel,) = matmul.result(180).binaries
        assert kernel.grid == 64
        assert kernel.stages == 2
        # At least one stage of two 64 × 64 bf16 tiles, at most three of them.
        assert 2 * 64 * 64 <= kernel.shared <= 3 * 2 * 2 * 64 * 64
        assert kernel.registers > scale.result().binaries[0].registers
        assert persistent.result(180).binaries[0].grid == device.sm_count
        assert matmul.result().seconds > 0


@pytest.mark.long
def test_spills_are_recorded_and_many_are_a_failure(compile_one: Compile) -> None:
    compiled = compile_one("matmul", block=256, stages=2)
    assert compiled.failure == "spills"
    assert compiled.binaries[0].spills > MAX_SPILLS
    assert "matmul_kernel" in compiled.reason


def test_too_much_shared_memory_is_found_before_code_is_generated(compile_one: Compile) -> None:
    compiled = compile_one("matmul", block=256, stages=5)
    assert compiled.failure == "out_of_resources"
    assert "> 232448 B" in compiled.reason


def test_too_many_registers_for_one_program(cache: Path) -> None:
    small = dataclasses.replace(find("H200"), name="small", registers_per_sm=1024)
    with CompilePool(small, workers=1, modules=["toy_op"]) as pool:
        compiled = pool.submit("toy", "ours", problem(), config("scale")).result(180)
    assert compiled.failure == "out_of_resources"
    assert "registers > 1024" in compiled.reason


@pytest.mark.parametrize(
    ("kind", "n", "reason"),
    [
        ("broken", 512, "no_such_function"),
        ("odd", 512, "power of 2"),
        ("raise", 512, "the launcher objects"),
        ("nothing", 512, "no kernel"),
        ("scale", 13, "inputs on the meta device: ValueError: thirteen rows"),
    ],
)
def test_what_does_not_compile_says_why_in_one_line(compile_one: Compile, kind: str, n: int, reason: str) -> None:
    compiled = compile_one(kind, n)
    assert compiled.failure == "compile_error"
    assert reason in compiled.reason
    assert "\n" not in compiled.reason
    assert compiled.fingerprint == ""


def test_a_failed_compiler_pass_is_explained_by_what_it_wrote_to_stderr(compile_one: Compile) -> None:
    compiled = compile_one("failed pass")
    assert (compiled.failure, compiled.reason) == ("compile_error", "operand #0 does not dominate this use")


def test_a_crash_costs_one_candidate(h200: CompilePool) -> None:
    crash = h200.submit("toy", "ours", problem(), config("crash"))
    others = [h200.submit("toy", "ours", problem(), config("scale", warps=warps)) for warps in (1, 2, 8)]
    assert crash.result(180).failure == "worker_died"
    assert "SIGABRT" in crash.result().reason
    assert [other.result(180).failure for other in others] == [None] * 3


def test_a_hang_is_killed_after_the_limit(cache: Path) -> None:
    with CompilePool(find("H200"), workers=1, timeout_s=3, modules=["toy_op"]) as pool:
        hang = pool.submit("toy", "ours", problem(), config("hang"))
        after = pool.submit("toy", "ours", problem(), config("scale"))
        assert hang.result(180).failure == "compile_timeout"
        assert "3 s" in hang.result().reason
        assert 3 <= hang.result().seconds < 60
        assert after.result(180).failure is None


def test_names_that_do_not_exist_are_usage_errors(h200: CompilePool) -> None:
    with pytest.raises(UsageError, match="no op 'nonsense'"):
        h200.submit("nonsense", "ours", problem(), {}).result(180)
    with pytest.raises(UsageError, match="no implementation 'theirs'"):
        h200.submit("toy", "theirs", problem(), {}).result(180)


def test_a_pool_whose_processes_cannot_start_says_so() -> None:
    with (
        CompilePool(find("H200"), workers=1, modules=["no_such_module"]) as pool,
        pytest.raises(ChildNotStarted, match="no_such_module"),
    ):
        pool.submit("toy", "ours", problem(), config("scale")).result(180)


def test_the_fingerprint_tells_same_from_different(compile_one: Compile) -> None:
    base = compile_one("scale").fingerprint
    assert compile_one("scale", unused=1).fingerprint == base, "a constexpr that changes nothing"
    assert compile_one("scale", block=256).fingerprint != base, "another tile"
    assert compile_one("scale", 1024).fingerprint != base, "another grid"
    assert compile_one("other factor").fingerprint != base, "the same code called with another number"
    assert compile_one("scale", warps=8).fingerprint != base


def test_results_survive_json(compile_one: Compile) -> None:
    for compiled in (compile_one("scale"), compile_one("broken")):
        again = Compiled.from_json(json.loads(json.dumps(compiled.to_json())))
        assert again == compiled
        assert again.fingerprint == compiled.fingerprint


def test_a_second_compile_is_a_load_from_the_cache(compile_one: Compile) -> None:
    first = compile_one("matmul", block=128, stages=2)
    again = compile_one("matmul", block=128, stages=2)
    assert again.binaries == first.binaries
    assert again.seconds < 0.2


@pytest.mark.long
def test_the_first_candidate_of_a_process_does_not_wait_while_libraries_load(cache: Path) -> None:
    program = """
        import json, sys
        from tilebook.tuner.process import compiler
        def serve(handle):
            before = set(sys.modules)
            reply = handle(json.loads(sys.argv[2]))
            assert reply["failure"] is None, reply
            print(len(set(sys.modules) - before), "sympy" in sys.modules)
        compiler.serve = serve
        compiler._main(sys.argv[1])
    """
    order = {"device": dataclasses.asdict(find("H200")), "modules": []}
    rms_norm = ops.get("rms_norm_fwd")
    shape = rms_norm.problem.parse("M64,N256", "bf16")
    candidate = {"op": rms_norm.name, "implementation": rms_norm.tunable.name, "problem": shape.key}
    request = {**candidate, "config": dict(rms_norm.tunable.space.default(shape, find("H200")))}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", textwrap.dedent(program), json.dumps(order), json.dumps(request)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    loaded, compiler = done.stdout.split()
    assert int(loaded) < 20, "modules that were loaded on the first candidate's time"
    assert compiler == "False", "PyTorch's compiler, which nobody needs, delays the first candidate by seconds"


def test_pending_counts_and_close_cancels(cache: Path) -> None:
    pool = CompilePool(find("H200"), workers=1, modules=["toy_op"])
    futures = [pool.submit("toy", "ours", problem(), config("hang")) for _ in range(3)]
    assert pool.pending == 3
    threading.Timer(0.5, pool.close).start()
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(30)
    deadline = time.monotonic() + 10
    while pool.pending and time.monotonic() < deadline:
        time.sleep(0.02)
    assert pool.pending == 0


@pytest.mark.gpu
def test_a_machine_with_the_gpu_loads_what_was_compiled_without_it(cache: Path) -> None:
    from tilebook.device import current

    def kernels() -> set[str]:
        return {entry.name for entry in cache.iterdir() if any(entry.glob("*.cubin"))}

    wanted = config("matmul", block=64, stages=4)
    with CompilePool(current(), workers=1, modules=["toy_op"]) as pool:
        assert pool.submit("toy", "ours", problem(), wanted).result(180).failure is None
    before = kernels()
    assert before
    program = """
        import json, sys, torch, toy_op
        from tilebook.op import Config
        x = torch.empty(512, 512, dtype=torch.bfloat16, device="cuda")
        toy_op.run(x, config=Config(json.loads(sys.argv[1])))
        torch.cuda.synchronize()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), json.dumps(wanted)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True)
    assert kernels() == before, "the real driver's cache keys differ from ours"
