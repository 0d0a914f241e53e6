"""Timing candidates by CUDA graphs: what memory that takes, and what a capture that fails leaves behind."""

import pytest
import torch

from tilebook.tuner.judge.measure import Bench

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="captures graphs on an NVIDIA GPU"),
]
MIB = 1 << 20


def twice(x):
    return x * 2, x + 1


@pytest.fixture
def bench():
    x = torch.randn(16 * MIB, device="cuda")
    twice(x)
    return Bench((x,), l2_bytes=MIB)


def test_graphs_share_their_memory(bench):
    samplers = [bench.capture(twice, 1.0)]
    before = torch.cuda.memory_reserved()
    samplers += [bench.capture(twice, 1.0) for _ in range(20)]
    assert torch.cuda.memory_reserved() - before <= 64 * MIB
    assert all(sampler.sample() > 0 for sampler in samplers)


def test_a_capture_that_fails_does_not_harm_the_next(bench):
    assert bench.capture(twice, 1.0).sample() > 0
    with pytest.raises(Exception, match=r"captur|not permitted"):
        bench.capture(lambda x: x.sum().item(), 1.0)
    assert bench.capture(twice, 1.0).sample() > 0
