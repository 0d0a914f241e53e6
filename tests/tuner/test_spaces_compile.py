"""Configs of every space compile for four architectures with the real compilers, or are refused with a reason.

Defaults for all four, a sample of each kernel's space for one; `benchmarks/compile_spaces.py` does them all.
"""

import random

import pytest

from tilebook import device as devices
from tilebook import op as ops
from tilebook.tuner.process.compile import CompilePool

pytestmark = pytest.mark.usefixtures("forked")

TARGETS = ["NVIDIA A100", "NVIDIA H200", "NVIDIA B200", "AMD Instinct MI300X"]
OPS = [op for op in ops.ops().values() if op.reference.__module__.startswith("tilebook.")]  # not other tests' toys
_PARTS = 12
"""Of all ops, each a test, of which a sample has one for each target."""
REFUSALS = {"compile_error", "out_of_resources", "spills"}


def compilable(op, gpu):
    """What of ours has a space on this GPU, each with the longest problem of the op's suites that it can run."""
    problems = [problem for suite in op.problem.suites().values() for problem in suite]
    for each in op.tunables:
        running = [problem for problem in problems if not each.external and each.can_run(problem, gpu)]
        if running:
            yield each, running[-1]


@pytest.mark.sampled(12, by="name")
@pytest.mark.parametrize("part", range(_PARTS))
@pytest.mark.parametrize("name", TARGETS)
def test_defaults_compile_and_samples_compile_or_say_why_not(name, part):
    gpu = devices.find(name)
    with CompilePool(gpu, workers=1) as pool:
        pending = []
        for place, op in list(enumerate(OPS))[(part + TARGETS.index(name)) % _PARTS :: _PARTS]:
            for each, problem in compilable(op, gpu):
                default = each.space.default(problem, gpu)
                sampled = each is not op.tunable or place % len(TARGETS) == TARGETS.index(name)  # others run on few
                samples = random.Random(op.name).sample(each.space.feasible(problem, gpu), 1) if sampled else []
                for config in [default, *samples]:
                    future = pool.submit(op.name, each.name, problem.key, config)
                    pending.append((op, each, config, config == default, future))
        for op, implementation, config, is_default, future in pending:
            compiled = future.result()
            told = f"{op.name} {implementation.name} {config} for {gpu.name}: {compiled.failure} {compiled.reason}"
            assert compiled.failure is None or (compiled.failure in REFUSALS and compiled.reason), told
            assert compiled.failure is None or not is_default, told
            assert all(each.registers > 0 for each in compiled.binaries), told
