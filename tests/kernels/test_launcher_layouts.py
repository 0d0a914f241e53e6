"""A launcher gives for every layout of its tensors what it gives for contiguous ones, whoever calls it."""

import functools

import pytest
import torch

from tilebook import device as devices
from tilebook import op as ops

FAMILIES = ("decode", "glu", "layer_norm", "mlp", "rms_norm", "rope")
OPS = [each for each in ops.ops().values() if each.family in FAMILIES]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")


def spread(x):
    """The same numbers, every other element of a tensor whose others must not be read."""
    if not x.is_floating_point():
        return torch.stack([x, torch.full_like(x, 1 << 20)], -1)[..., 0]
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


def first_repeated(x):
    """A tensor whose rows, or whose elements if it is a vector, are one and the same in memory."""
    return x[:1].expand(x.shape)


def turned(x):
    """The same numbers, with the last axis the slowest in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


@functools.cache
def plain(op, problem):
    """What the launcher gives for contiguous tensors."""
    return op.tunable(*problem.inputs("cpu", 0), config=op.tunable.space.default(problem, devices.find("H200")))


def cases():
    for op in OPS:
        for problem in op.problem.examples()[:6:2]:
            for at, x in enumerate(problem.inputs("meta", 0)):
                if isinstance(x, torch.Tensor):
                    yield pytest.param(op, problem, at, id=f"{op.name}-{problem.label}-{at}")


@pytest.mark.sampled(16, by="op")
@interpreted
@pytest.mark.parametrize("laid", [spread, first_repeated, turned])
@pytest.mark.parametrize(("op", "problem", "at"), list(cases()))
def test_a_launcher_minds_the_layout_of_each_of_its_tensors(op, problem, at, laid):
    args = list(problem.inputs("cpu", 0))
    args[at] = laid(args[at])
    config = op.tunable.space.default(problem, devices.find("H200"))
    found, expected = op.tunable(*args, config=config), plain(op, problem)
    if laid is first_repeated:  # which are other numbers
        args[at] = args[at].contiguous()
        expected = op.tunable(*args, config=config)
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)
