"""What nobody has verified is compiled by the newer of Triton's two ptxas, where the older makes wrong code of it."""

import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tilebook import assembler, launch
from tilebook import device as devices
from tilebook import op as ops
from tilebook.dispatch.choice import Choice
from tilebook.dispatch.settling import Probe
from tilebook.dispatch.snapshot import Snapshot

knobs = pytest.importorskip("triton.knobs")
nvidia = knobs.nvidia


compiler = pytest.importorskip("triton.backends.nvidia.compiler")
HOPPER, BLACKWELL = 90, 100


def taken(arch=HOPPER):
    """Where the ptxas is that Triton would compile by now."""
    return compiler.get_ptxas(arch).path


def make_tool(path, version):
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Gives Triton two assemblers, of these versions."""

    def give(usual, other):
        for name, version in (("ptxas", usual), ("ptxas_blackwell", other)):
            path = make_tool(tmp_path / f"{name}-{version}", version)
            monkeypatch.setattr(type(nvidia).__dict__[name], "default_path", path)
        forget()

    def forget():
        assembler._shipped.cache_clear()
        assembler._ask_here.cache_clear()

    # As Triton 3.6 does; newer ones take the other for Hopper too.
    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: nvidia.ptxas_blackwell if arch >= 100 else nvidia.ptxas)
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    yield give
    forget()


def test_the_newer_is_taken_where_the_usual_one_is_not_sound(tools):
    tools("12.8", "12.9")
    usual, newer = nvidia.ptxas.path, nvidia.ptxas_blackwell.path
    assert assembler._newer().path == newer
    with assembler.newer():
        assert taken() == newer
        with assembler.newer():
            pass
        assert taken() == taken(BLACKWELL) == newer
        assert taken(80) == usual
        assert "TRITON_PTXAS_PATH" not in os.environ
    assert taken() == usual


def test_whatever_happens_in_the_block_the_usual_one_is_back(tools):
    tools("12.8", "12.9")
    with contextlib.suppress(KeyError), assembler.newer():
        raise KeyError
    assert taken() == nvidia.ptxas.path


def test_another_thread_compiles_by_the_usual_one_meanwhile(tools):
    tools("12.8", "12.9")
    with assembler.newer(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(taken).result() == nvidia.ptxas.path != taken()


def test_a_child_forked_meanwhile_compiles_by_the_usual_one_and_waits_for_nobody(tools):
    tools("12.8", "12.9")
    inside, done = threading.Event(), threading.Event()

    def compile():
        with assembler.newer():
            inside.set()
            done.wait()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(compile)
        inside.wait()
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException), assembler.newer():
                os._exit(0 if taken() == nvidia.ptxas_blackwell.path else 2)
            os._exit(1)
        done.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_is_compiled_in_a_pool_elsewhere_is_compiled_here(tools):
    mode = pytest.importorskip("triton.runtime._async_compile")
    tools("12.8", "12.9")
    with ThreadPoolExecutor(1) as pool, mode.AsyncCompileMode(pool) as chosen:
        with assembler.newer():
            assert mode.active_mode.get() is None
        assert mode.active_mode.get() is chosen


@pytest.mark.parametrize(("usual", "other"), [("12.9", "13.4"), ("12.8", "12.8"), ("13.0", "12.9")])
def test_a_sound_one_stays(tools, usual, other):
    tools(usual, other)
    assert assembler._newer() is None


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("how", ["environment", "knob"])
def test_one_that_somebody_has_chosen_stays_whenever_they_do(tools, tmp_path, monkeypatch, how, late):
    tools("12.8", "12.9")
    mine = make_tool(tmp_path / "mine", "12.8")
    if late:
        with assembler.newer():
            pass
    with contextlib.ExitStack() as undo:
        if how == "environment":
            monkeypatch.setenv("TRITON_PTXAS_PATH", mine)
        else:
            undo.callback(vars(nvidia).pop, "ptxas", None)
            vars(nvidia)["ptxas"] = mine
        assert assembler._newer() is None
        with assembler.newer():
            assert taken() == mine
        assert taken() == mine


@pytest.mark.parametrize("broken", ["not there", "not to be run", "no program"])
def test_where_the_newer_one_cannot_run_the_usual_one_stays(tools, monkeypatch, broken):
    tools("12.8", "12.9")
    path = Path(type(nvidia).__dict__["ptxas_blackwell"].default_path).with_name(broken.replace(" ", "-"))
    if broken != "not there":
        path.write_text("nothing")
        path.chmod(0o755 if broken == "no program" else 0o644)
    monkeypatch.setattr(type(nvidia).__dict__["ptxas_blackwell"], "default_path", str(path))
    assert assembler._newer() is None


@pytest.mark.parametrize(("chosen", "unoptimised"), [(None, False), ("-O1 -v", False), (None, True)])
def test_options_that_the_user_gives_ptxas_come_last_and_so_hold(tools, monkeypatch, chosen, unoptimised):
    tools("12.8", "12.9")
    monkeypatch.setattr(compiler.CUDAOptions, "ptx_options", chosen)
    monkeypatch.setenv("DISABLE_PTXAS_OPT", str(int(unoptimised)))
    with assembler.newer() as options:
        first = "--opt-level 0" if unoptimised else "-O3"
        assert options == {"ptx_options": first + (f" {chosen}" if chosen else "")}


class _Kernel:
    """Notes the options of its launches, and by what it would be compiled."""

    def __getitem__(self, grid):
        return lambda *args, **meta: self.seen.append((meta, taken()))

    def __init__(self):
        self.seen = []


@pytest.mark.parametrize("hopper", [False, True])
def test_what_nobody_has_verified_is_compiled_by_it_and_kept_apart(tools, monkeypatch, hopper):
    tools("12.8", "12.9")
    monkeypatch.setattr(assembler, "_on_hopper", lambda: hopper)
    kernel, usual = _Kernel(), nvidia.ptxas.path
    launch.start(kernel, (1,), (), {"num_warps": 4})
    with assembler.unverified():
        launch.start(kernel, (1,), (), {"num_warps": 4})
    launch.start(kernel, (1,), (), {"num_warps": 4})
    plain = ({"num_warps": 4}, usual)
    other = ({"num_warps": 4, "ptx_options": "-O3"}, nvidia.ptxas_blackwell.path)
    assert kernel.seen == [plain, other if hopper else plain, plain]


@pytest.mark.parametrize("broken", ["not there", "no ptxas"])
@pytest.mark.parametrize("how", ["environment", "knob"])
def test_one_that_triton_passes_over_is_not_chosen(tools, tmp_path, monkeypatch, how, broken):
    tools("12.8", "12.9")
    path = tmp_path / "mine"
    if broken == "no ptxas":
        path.write_text("#!/bin/sh\necho hello\n")
        path.chmod(0o755)
    usual, newer = nvidia.ptxas.path, nvidia.ptxas_blackwell.path
    with contextlib.ExitStack() as undo:
        if how == "environment":
            monkeypatch.setenv("TRITON_PTXAS_PATH", str(path))
        else:
            undo.callback(vars(nvidia).pop, "ptxas", None)
            vars(nvidia)["ptxas"] = str(path)
        assert taken() == usual
        with assembler.newer():
            assert taken() == newer


def noting(op, found):
    """An implementation that notes whether it was called as an unverified one."""

    class Noting(ops.Implementation):
        def __call__(self, *args, config=None):
            found.append(assembler._thread.unverified)
            return args

    return Noting(op, "triton", lambda *args, config: args, op.tunable.space)


@pytest.fixture
def seen():
    """A function that runs a choice made so, and whether it was unverified, call by call."""
    op, found = ops.get("rms_norm_fwd"), []
    ours = noting(op, found)

    def run(*how, **more):
        Choice(ours, ops.Config({"ROWS": 1}), how[0], op.problem.examples()[0], None, "", *how[1:], **more)(
            torch.zeros(1)
        )
        return found[-1]

    return run


def of(status="measured", **versions):
    return SimpleNamespace(measured=status != "predicted", environment={**devices.environment(), **versions})


def test_a_verdict_that_somebody_has_measured_with_this_compiler_has_verified_its_config(seen):
    assert not seen("exact", of())
    assert not seen("exact", of(torch="1.0", cuda="99"))
    assert not seen("exact", of(status="default"))


def test_what_was_predicted_or_measured_with_another_compiler_was_not_verified(seen):
    assert seen("exact", of(status="predicted"))
    assert seen("exact", of(triton="3.1.0"))
    assert seen("exact", of(ptxas="11.0"))
    assert seen("nearest", of())


def test_tensors_that_lie_otherwise_than_those_of_a_verdict_are_another_code(seen):
    assert seen("exact", of(), aligned=False)


def test_what_another_process_has_chosen_is_verified_there_alone():
    op, gpu = ops.get("rms_norm_fwd"), devices.find("H200")
    problem = op.problem.examples()[0]
    config = dict(op.tunable.space.default(problem, gpu))
    told = Snapshot(gpu).told(op, problem, ("triton", config, "exact", op.tunable.digest))
    assert told.source == "exact"
    assert not told.verified


@pytest.mark.parametrize("source", ["exact", "nearest", "default", "forced"])
def test_only_a_verdict_on_the_problem_itself_has_verified_a_config(source):
    op = ops.get("rms_norm_fwd")
    problem = op.problem.examples()[0]
    seen = []
    ours = noting(op, seen)
    Choice(ours, ops.Config({"ROWS": 1}), source, problem)(torch.zeros(1))
    assert seen == [source != "exact"]
    assert not assembler._thread.unverified
    candidate = ours, ops.Config({"ROWS": 1})
    probe = Probe(None, SimpleNamespace(op=op, problem=problem, gpu=None, tried=[candidate]), None)
    probe._choices[candidate](torch.zeros(1))
    assert seen[1:] == [False], "a probe verifies its candidates before they run"


def test_what_a_running_program_has_verified_is_timed_as_it_was_verified():
    from tilebook.device import find
    from tilebook.dispatch.settling import Probe, Settling

    op = ops.get("rms_norm_fwd")
    candidate = op.tunable, ops.Config({"ROWS": 1})
    state = Settling(op, op.problem.examples()[0], find("H200"), [candidate])
    assert Probe(None, state, None)._choices[candidate].verified


COMPILED = """
import sys
from tilebook import assembler, device as devices, op as ops
from tilebook.launch import intercepted
from tilebook.tuner.process import binary
from tilebook.tuner.process.compiler import _Light, _pose_as

gpu = devices.find("H200")
_pose_as(gpu)
op = ops.get("gated_delta_rule_bwd")
problem = op.problem.parse("B1,H2,S70,D40,decay,initial", "bf16")
wrong = {}

def compile(kernel, grid, args, meta):
    with assembler.unverified():
        assert assembler.wanted() == (sys.argv[1] == "12.8"), "the wrong one of Triton's assemblers"
    for name in ("usual", "newer"):
        if name == "usual" or sys.argv[1] == "12.8":
            with assembler.newer() if name == "newer" else assembler.unverified() as options:
                code = kernel.warmup(*args, grid=grid, **meta, **(options or {})).asm["cubin"]
            found = binary.unset_registers(binary._told("nvdisasm", code, "-c"))
            wrong.setdefault(name, []).extend([kernel.__name__] if found else [])

with devices.posing_as(gpu), _Light(), intercepted(compile):
    op.tunable(*problem.inputs("meta", 0), config=op.tunable.space.default(problem, gpu))
print(wrong)
"""


@pytest.mark.usefixtures("forked")
def test_a_default_that_the_usual_one_spoils_is_right_by_the_newer():
    # Triton's own: what is chosen by the environment or by tests is another's.
    version = nvidia.ptxas.version
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "TRITON_PTXAS_PATH")}
    command = [sys.executable, "-c", COMPILED, version]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert not done.returncode, done.stderr
    wrong = {"usual": ["return_kernel"], "newer": []} if version == "12.8" else {"usual": []}
    assert done.stdout.strip() == str(wrong)
