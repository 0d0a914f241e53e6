"""Launchers of the ops that stand in PyTorch's: they allocate and launch, and so can be repeated without Python."""

import pytest

from tilebook import enabling, launch
from tilebook.replay import _Watch


def _ops():
    found = {}
    for standing in enabling._STANDINGS:
        each = standing.op()
        found[each.name] = each
    return [each for each in found.values() if each.tunable is not None]


@pytest.mark.parametrize("op", _ops(), ids=lambda op: op.name)
def test_a_launcher_only_allocates_and_launches(op):
    for problem in op.problem.examples()[:6]:
        if not op.tunable.supports(problem):
            continue
        args, launched = problem.inputs("cpu", 0), []
        config = op.tunable.space.default(problem, _gpu())
        watch = _Watch()
        with watch, launch.intercepted(lambda *given, seen=launched: seen.append(given)):
            op.tunable(*args, config=config)
        assert watch.faithful, problem.label
        assert launched


def _gpu():
    from tilebook import device

    return device.find("NVIDIA H200")
