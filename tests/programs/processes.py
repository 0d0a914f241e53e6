"""Programs by their processes: without Triton, forked, spawned, at their end; what is registered with PyTorch."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import tilebook
from programs.compare import assert_no_worse, cotangent, fresh
from programs.families import FAMILIES, families
from programs.isolated import TESTS, run

WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
import tilebook
{body}
print("served")
"""

CPU_CALLS = """
from programs.families import FAMILIES
for name, family in FAMILIES.items():
    inputs = family.leaves("cpu")
    o = family.ours(*inputs)
    torch.testing.assert_close(o, family.plain(*inputs), rtol=1e-3, atol=1e-3, msg=lambda text: name + text)
    if family.trained:
        o.sum().backward()
"""


def python(program):
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.sampled(2)
@pytest.mark.parametrize("packages", ["triton", "optuna click rich alembic matplotlib"])
def test_calls_on_the_cpu_work_where_a_package_is_not_installed(packages):
    assert "served" in python(WITHOUT.format(packages=packages.split(), body=CPU_CALLS))


def test_the_import_is_light():
    """Of a program that imports tilebook and calls nothing."""
    found = python(
        "import sys, tilebook; print(sorted(m for m in ('triton', 'optuna', 'sqlalchemy') if m in sys.modules))"
    )
    assert found.strip() == "[]"


def test_names_that_are_not_there_are_attribute_errors():
    for name in ("attend", "__wrapped__", "_repr_html_"):
        with pytest.raises(AttributeError):
            getattr(tilebook, name)
    assert {"attention", "mlp", "rms_norm"} <= set(dir(tilebook))


def _calls(names, device):
    for name in names:
        family = FAMILIES[name]
        assert_no_worse(family.ours, family.plain, family.leaves(device), what=name)


def two(context, device):
    """Two processes of this context side by side."""
    context = multiprocessing.get_context(context)
    halves = ("attention", "softcap", "mlp"), ("varlen", "rms_norm", "decode")
    processes = [context.Process(target=_calls, args=(names, device)) for names in halves]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0]


def forked_after_calls(device):
    for name in ("attention", "mlp"):  # of the parent, on the CPU, so that the children may use a GPU
        FAMILIES[name].ours(*FAMILIES[name].leaves("cpu"))
    two("fork", device)

    batches = list(DataLoader(range(8), batch_size=2, num_workers=2, collate_fn=attended))
    assert [batch.shape for batch in batches] == [(2, 2, 8, 16)] * 4


def attended(numbers):
    """A sample that a worker makes by a call."""
    x = torch.ones(len(numbers), 2, 8, 16)
    return tilebook.attention(x, x, x)


@pytest.mark.usefixtures("forked")
def test_forked_processes_and_workers_of_a_data_loader_are_served(device):
    run("programs.processes", "forked_after_calls", device=device)


@pytest.mark.long
def test_spawned_processes_are_served(device):
    run("programs.processes", "two", context="spawn", device=device, seconds=300)


def quits(device):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for family in FAMILIES.values():
            inputs = family.leaves(device)
            o = family.ours(*inputs)
            if family.trained:
                o.sum().backward()


def test_a_program_ends_quietly_after_calls_of_every_family(device):
    run("programs.processes", "quits", device=device)


class Recorder(TorchDispatchMode):
    """The arguments with which ops of ours are called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if getattr(func, "namespace", "") == "tilebook":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def registered():
    """Ops of ours in PyTorch's dispatcher."""
    for family in FAMILIES.values():  # whatever is registered late
        family.ours(*family.leaves("cpu"))
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tilebook::")}


def recorded(family, device):
    inputs = fresh(family.leaves(device))
    # What PyTorch's own functions serve would not be called as an op of ours.
    with tilebook.dispatch.use("triton") if device == "cuda" else contextlib.nullcontext(), Recorder() as recorder:
        o = family.ours(*inputs)
        if family.trained:
            torch.autograd.grad(o, inputs[: family.trained], cotangent(o))
    return {(str(func), str([_kind(x) for x in args])): (func, args, kwargs) for func, args, kwargs in recorder.calls}


def _kind(x):
    return (tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x


def _own(x, trained):
    if not isinstance(x, torch.Tensor):
        return type(x)(_own(each, trained) for each in x) if isinstance(x, (list, tuple)) else x
    return x.detach().clone().requires_grad_(trained and x.is_floating_point() and x.dtype != torch.float32)


@families()
def test_what_is_registered_passes_pytorchs_own_check(device, family):
    if not registered():
        pytest.skip("nothing is registered with PyTorch")
    family = FAMILIES[family]
    calls = recorded(family, device)
    if device == "cuda":
        assert calls, "no op of ours was called under a mode that watches"
    # What serves a trace may be another kernel than what serves an eager call, and round otherwise.
    near = {"rtol": 0.04, "atol": 0.02} if device == "cuda" else {}
    for func, args, kwargs in calls.values():
        opcheck(func, _own(args, False), kwargs, **near)
        backward = "bwd" in str(func) or "backward" in str(func)
        if family.trained and not backward:
            opcheck(func, _own(args[: family.trained], True) + _own(args[family.trained :], False), kwargs, **near)
