"""Configs of a kernel against its default one, and numbers that differ by how they are rounded."""

import torch

from tilebook import device as devices
from tilebook import op
from tilebook.tuner.process.compile import CompilePool


def agreeing(each, args, configs, right):
    """How many of the configs fit on this GPU; asserts that these give what `right` is, but for 2 % of the largest."""
    tried = 0
    for config in configs:
        try:
            found = each.tunable(*args, config=config)
        except Exception as broken:
            assert type(broken).__name__ == "OutOfResources", (config, broken)  # noqa: PT017
            continue
        tried += 1
        for mine, other in zip(found, right, strict=True):
            size = other.float().abs().max().item() if other.numel() else 0.0
            torch.testing.assert_close(mine.float(), other.float(), rtol=0, atol=2e-2 * size + 1e-6, msg=str(config))
    return tried


def feasible_agreeing(name, shape, dtype, most):
    """How many feasible configs of an op agree with its default one, of so many at most that the compiler got right."""
    each = op.get(name)
    problem, gpu, space = each.problem.parse(shape, dtype), devices.current(), each.tunable.space
    args = problem.inputs("cuda", 0)
    feasible = space.feasible(problem, gpu)
    with CompilePool(gpu) as pool:  # which refuses what the compiler got wrong, as a tune has it
        some = feasible[:: max(1, len(feasible) // most)]
        compiling = [(config, pool.submit(name, "triton", problem.key, config)) for config in some]
        sound = [config for config, compiled in compiling if compiled.result().failure is None]
    return agreeing(each, args, sound, each.tunable(*args, config=space.default(problem, gpu)))


def assert_rounded_otherwise(mine, right):
    """Single numbers may be a quarter of their spread apart, all together a hundredth."""
    size = right.float().std().item()
    torch.testing.assert_close(mine.float(), right.float(), rtol=2e-2, atol=0.25 * size)
    assert (mine.float() - right.float()).square().mean().sqrt() <= 1e-2 * size
