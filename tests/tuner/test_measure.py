"""Eager samples, as far as they can be taken without a GPU."""

import pytest
import torch

from tilebook.tuner.judge import measure
from tilebook.tuner.judge.measure import Bench, interleave

MB = 1 << 20


@pytest.fixture
def clock(monkeypatch):
    """Every timed piece of work takes 4 ms."""

    def timed(work):
        work()
        return 4.0

    monkeypatch.setattr(measure, "timed_ms", timed)


class Call:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, x: torch.Tensor, factor: float) -> None:
        assert factor == 2.0
        assert not torch.is_grad_enabled()
        self.seen.append(x.data_ptr())


def test_an_eager_sample_is_back_to_back_calls_over_rotated_inputs(clock):
    x = torch.zeros(MB, dtype=torch.uint8)
    bench, call = Bench((x, 2.0), l2_bytes=2 * MB, mode="eager"), Call()
    assert len(bench.inputs) == 6  # three times the L2
    assert bench.estimate(call) == 4.0
    call.seen.clear()
    sampler = bench.capture(call, 0.05)
    assert sampler.launches == 20
    assert sampler.samples(2) == [4.0 / 20] * 2
    own = [inputs[0].data_ptr() for inputs in bench.inputs]
    assert call.seen == [own[n % 6] for n in range(40)]
    assert x.data_ptr() not in own


def test_calls_longer_than_a_sample_are_taken_one_by_one_and_still_rotated(clock):
    bench, call = Bench((torch.zeros(MB, dtype=torch.uint8), 2.0), l2_bytes=MB, mode="eager"), Call()
    sampler = bench.capture(call, 30.0)
    assert sampler.launches == 1
    sampler.samples(3)
    assert len(set(call.seen)) == 3


def test_each_round_samples_everybody_once_in_a_new_order(clock):
    order: list[str] = []

    def sampler(name):
        return measure.Sampler(lambda: order.append(name), 2)

    series = interleave([sampler(name) for name in "abc"], rounds=20, seed=1)
    assert series == [[2.0] * 20] * 3
    rounds = ["".join(order[at : at + 3]) for at in range(0, 60, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 3
