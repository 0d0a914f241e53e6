"""What nobody has verified is compiled by the newer of Triton's two ptxas, where the older makes wrong code of it."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tilebook import assembler, launch
from tilebook import op as ops
from tilebook.dispatch.choice import Choice
from tilebook.dispatch.settling import Probe

knobs = pytest.importorskip("triton.knobs")
nvidia = knobs.nvidia


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Gives Triton two assemblers, of these versions."""

    def give(usual, other):
        for name, version in (("ptxas", usual), ("ptxas_blackwell", other)):
            path = tmp_path / f"{name}-{version}"
            path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
            path.chmod(0o755)
            monkeypatch.setattr(type(nvidia).__dict__[name], "default_path", str(path))
        assembler._newer.cache_clear()

    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    yield give
    assembler._newer.cache_clear()


def test_the_newer_is_taken_where_the_usual_one_is_not_sound(tools):
    tools("12.8", "12.9")
    assert assembler._newer() == nvidia.ptxas_blackwell.path
    usual = nvidia.ptxas.path
    with assembler.newer():
        assert nvidia.ptxas.path == nvidia.ptxas_blackwell.path
        with assembler.newer():
            pass
        assert nvidia.ptxas.path == nvidia.ptxas_blackwell.path
        assert "TRITON_PTXAS_PATH" not in os.environ
    assert nvidia.ptxas.path == usual


@pytest.mark.parametrize(("usual", "other"), [("12.9", "13.4"), ("12.8", "12.8"), ("13.0", "12.9")])
def test_a_sound_one_stays(tools, usual, other):
    tools(usual, other)
    assert assembler._newer() is None


def test_one_that_somebody_has_chosen_stays(tools, monkeypatch):
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/somewhere/ptxas")
    tools("12.8", "12.9")
    assert assembler._newer() is None


class _Kernel:
    """Notes the options of its launches, and by what it would be compiled."""

    def __getitem__(self, grid):
        return lambda *args, **meta: self.seen.append((meta, nvidia.ptxas.path))

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


@pytest.mark.parametrize("source", ["exact", "nearest", "default", "forced"])
def test_only_a_verdict_on_the_problem_itself_has_verified_a_config(source):
    op = ops.get("rms_norm_fwd")
    problem = op.problem.examples()[0]
    seen = []

    class Noting(ops.Implementation):
        def __call__(self, *args, config=None):
            seen.append(assembler._thread.unverified)
            return args

    ours = Noting(op, "triton", lambda *args, config: args, op.tunable.space)
    Choice(ours, ops.Config({"ROWS": 1}), source, problem)(torch.zeros(1))
    assert seen == [source != "exact"]
    assert not assembler._thread.unverified
    candidate = ours, ops.Config({"ROWS": 1})
    probe = Probe(None, SimpleNamespace(op=op, problem=problem, gpu=None, tried=[candidate]), None)
    probe._choices[candidate](torch.zeros(1))
    assert seen[1:] == [False], "a probe verifies its candidates before they run"


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


def test_a_default_that_the_usual_one_spoils_is_right_by_the_newer():
    # Triton's own: what is chosen by the environment or by tests is another's.
    version = nvidia.ptxas.version
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "TRITON_PTXAS_PATH")}
    command = [sys.executable, "-c", COMPILED, version]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert not done.returncode, done.stderr
    wrong = {"usual": ["return_kernel"], "newer": []} if version == "12.8" else {"usual": []}
    assert done.stdout.strip() == str(wrong)
