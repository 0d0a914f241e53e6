"""The performance model: what is worse is never predicted faster."""

from dataclasses import replace

import pytest

from tilebook.device import find
from tilebook.op import Cost
from tilebook.tuner.model import predict
from tilebook.tuner.process.compile import Binary, Compiled

H200 = find("H200")
KERNEL = Binary("k", "h", grid=1320, shared=65_536, registers=128, spills=0, warps=8, stages=3)


def kernel(**changes: int) -> Binary:
    return replace(KERNEL, **changes)  # type: ignore[arg-type]


def time_ms(work: Cost | None = None, gpu: str = "H200", **changes: int) -> float:
    floor = Cost(1e12, 1e8)
    return predict(floor, work or floor, Compiled((kernel(**changes),)), find(gpu)).time_ms


def test_occupancy_and_waves() -> None:
    found = predict(Cost(1e12, 1e8), None, Compiled((KERNEL,)), H200)
    assert found.occupancy == 2 * 8 / 64
    assert found.waves == 1320 / (132 * 2)


def test_more_spills_are_slower() -> None:
    times = [time_ms(spills=spills) for spills in (0, 64, 512, 4096)]
    assert times == sorted(set(times))


def test_more_padding_is_slower() -> None:
    times = [time_ms(Cost(1e12 * padding, 1e8 * padding)) for padding in (1, 1.1, 1.5, 2)]
    assert times == sorted(set(times))


def test_more_traffic_through_l2_is_never_faster() -> None:
    times = [time_ms(Cost(1e12, each)) for each in (1e8, 1e9, 1e10, 1e11)]
    assert times == sorted(times)
    assert times[-1] > times[0]


def test_a_program_too_many_costs_a_whole_round() -> None:
    even, uneven = time_ms(grid=132 * 4), time_ms(grid=132 * 4 + 1)
    assert 1.15 * even < uneven < 1.3 * even


def test_a_faster_gpu_is_faster() -> None:
    assert time_ms(gpu="H200") < time_ms(gpu="A100") < time_ms(gpu="L4")


def test_fewer_loads_in_flight_are_slower_where_loads_bound() -> None:
    through_l2 = Cost(1e9, 1e11)
    assert time_ms(through_l2, stages=3) < time_ms(through_l2, stages=1)


def test_fewer_resident_programs_are_slower() -> None:
    assert time_ms(shared=65_536) < time_ms(shared=200_000)


def test_never_faster_than_the_datasheet() -> None:
    for flops, through in ((1e12, 1e6), (1e6, 1e10), (1e12, 1e10)):
        floor = Cost(flops, through)
        predicted = predict(floor, None, Compiled((KERNEL,)), H200).time_ms
        assert predicted > 1e3 * max(flops / H200.flops, through / H200.bandwidth)


@pytest.mark.parametrize(
    ("flops", "floor", "through_l2", "grid", "bound"),
    [
        (1e13, 1e8, 1e8, 13_200, "compute"),
        (1e9, 1e10, 1e10, 13_200, "memory"),
        (1e9, 1e7, 1e11, 13_200, "l2"),
        (1e6, 1e4, 1e4, 132, "latency"),
        (1e13, 1e8, 1e8, 4, "latency"),
    ],
)
def test_names_what_bounds_it(flops: float, floor: float, through_l2: float, grid: int, bound: str) -> None:
    found = predict(Cost(flops, floor), Cost(flops, through_l2), Compiled((kernel(grid=grid),)), H200)
    assert found.bound == bound


def test_the_work_of_two_kernels_is_shared_and_a_prologue_costs_little_but_a_launch() -> None:
    floor = Cost(1e12, 1e8)
    one = predict(floor, None, Compiled((KERNEL,)), H200)
    with_prologue = predict(floor, None, Compiled((kernel(shared=0, grid=100, warps=4), KERNEL)), H200)
    assert one.time_ms < with_prologue.time_ms < one.time_ms + 0.01
    assert (with_prologue.occupancy, with_prologue.waves, with_prologue.bound) == (one.occupancy, one.waves, one.bound)
    halves = predict(floor, None, Compiled((KERNEL, KERNEL)), H200)
    assert halves.time_ms == pytest.approx(one.time_ms, rel=0.02)


def test_nothing_compiled_is_an_error() -> None:
    with pytest.raises(ValueError, match="no binaries"):
        predict(Cost(1, 1), None, Compiled(failure="compile_error"), H200)
