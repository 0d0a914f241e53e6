"""Configs of every space compile for four architectures with the real compilers, or are refused with a reason.

A sample, the same every time; `benchmarks/compile_spaces.py` does them all.
"""

import random

import pytest

from tilebook import device as devices
from tilebook import op as ops
from tilebook.tuner.compile import CompilePool

TARGETS = ["NVIDIA A100", "NVIDIA H200", "NVIDIA B200", "AMD Instinct MI300X"]
SAMPLED = 2
OPS = [op for op in ops.ops().values() if op.reference.__module__.startswith("tilebook.")]  # not other tests' toys
REFUSALS = {"compile_error", "out_of_resources", "spills"}


def problem_of(op):
    """The last problem of the op's suites: the longest of its kind."""
    return [problem for suite in op.problem.suites().values() for problem in suite][-1]


@pytest.mark.parametrize("name", TARGETS)
def test_defaults_compile_and_samples_compile_or_say_why_not(name):
    gpu = devices.find(name)
    with CompilePool(gpu, workers=1) as pool:
        pending = []
        for op in OPS:
            problem, space = problem_of(op), op.tunable.space
            feasible = space.feasible(problem, gpu)
            default = space.default(problem, gpu)
            for config in [default, *random.Random(op.name).sample(feasible, SAMPLED)]:
                future = pool.submit(op.name, op.tunable.name, problem.key, config)
                pending.append((op, config, config == default, future))
        for op, config, is_default, future in pending:
            compiled = future.result()
            told = f"{op.name} {config} for {gpu.name}: {compiled.failure} {compiled.reason}"
            assert compiled.failure is None or (compiled.failure in REFUSALS and compiled.reason), told
            assert compiled.failure is None or not is_default, told
            assert all(each.registers > 0 for each in compiled.binaries), told
