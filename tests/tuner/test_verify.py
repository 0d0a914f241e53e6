"""Wrong answers of every kind are refused; right ones pass."""

import itertools

import pytest
import torch
from toy import Scaling, make_op

from tilebook.op import Config
from tilebook.tuner.judge.poison import GUARD, HIGH, LOW, Poisoned, bits, written
from tilebook.tuner.judge.verify import (
    Case,
    NotRepeatable,
    NoYardstick,
    Wrong,
    error,
    final_cases,
    trial_cases,
    verify,
)

CONFIG = Config(BLOCK=16, num_warps=1, num_stages=1)
PROBLEM = Scaling(8, 48)


def _verify(function, deterministic=True, repeats=1):
    op = make_op(function, deterministic)
    return verify(op.tunable, CONFIG, trial_cases(op, PROBLEM, "cpu"), repeats)


def _fresh(x):
    y = torch.empty_like(x)
    y.copy_(x.float() * 3)
    return y


def test_right_implementation_passes():
    errors = _verify(None)
    assert len(errors) == 5
    assert all(e.max <= 0.1 for case in errors[:-1] for e in case)  # the last has outliers


def _no_write(x, *, config):
    return torch.empty_like(x)


def _half_write(x, *, config):
    y = torch.empty_like(x)
    y[: len(x) // 2].copy_(x[: len(x) // 2].float() * 3)
    return y


_kept = {}


def _stale(x, *, config):
    """Hands out the buffer of the first call for ever."""
    if x.shape not in _kept:
        _kept[x.shape] = x.float().mul(3).to(x.dtype)
    return _kept[x.shape]


def _accumulate(x, *, config):
    y = torch.empty_like(x)
    y += x * 3
    return y


def _ragged_only(x, *, config):
    y = _fresh(x)
    if len(x) % 8:
        y[-1] = 0
    return y


def _large_only(x, *, config):
    y = _fresh(x)
    if len(x) > 8 and len(x) % 8 == 0:
        y[-1] = 0
    return y


def _past_the_end(x, *, config):
    y = torch.empty_like(x)
    torch.as_strided(y, (y.numel() + 1,), (1,), y.storage_offset())[:] = 7
    y.copy_(x.float() * 3)
    return y


def _before_the_start(x, *, config):
    y = _fresh(x)
    torch.as_strided(y, (1,), (1,), y.storage_offset() - 1)[:] = 7
    return y


def _mutates(x, *, config):
    y = _fresh(x)
    x[0, 0] += 1
    return y


def _reads_outside(x, *, config):
    y = _fresh(x)
    y[0, 0] += torch.as_strided(x, (1,), (1,), x.storage_offset() - 1)[0]
    return y


def _nan_past_the_end(x, *, config):
    """Reads and writes a row too far: what it read there is not a number, and neither is what it wrote."""
    y = torch.empty_like(x)
    longer = (x.shape[0] + 1, x.shape[1])
    from_, to = (torch.as_strided(t, longer, t.stride(), t.storage_offset()) for t in (x, y))
    to.copy_(from_.float() * 3)
    return y


def _copies_past_the_end(x, *, config):
    y = _fresh(x)
    from_, to = (torch.as_strided(t, (1,), (1,), t.storage_offset() + t.numel()) for t in (x, y))
    to.copy_(from_)
    return y


def _past_the_end_of_zeros(x, *, config):
    scratch = torch.zeros(len(x))
    torch.as_strided(scratch, (1,), (1,), scratch.storage_offset() + len(x))[:] = 1
    return _fresh(x)


def _in_the_next_row_far_right(x, *, config):
    scratch = x.new_empty(2, 3 * GUARD)
    torch.as_strided(scratch, (1,), (1,), scratch.storage_offset() + 9 * GUARD - 1)[:] = 1
    return _fresh(x)


def _overflows(x, *, config):
    e = torch.exp(2 * x.float())
    return (_fresh(x) + (e - e)).to(x.dtype)


def _wider(x, *, config):
    return _fresh(x).float()


def _transposed_rows(x, *, config):
    return _fresh(x).flip(0)


def _two_outputs(x, *, config):
    return _fresh(x), _fresh(x)


def _wrong_shape(x, *, config):
    return _fresh(x)[:-1]


def _inaccurate(x, *, config):
    return (_fresh(x).float() * 1.02).to(x.dtype)


def _nan(x, *, config):
    y = _fresh(x)
    y[0, 0] = float("nan")
    return y


@pytest.mark.parametrize(
    "function",
    [
        _no_write,
        _half_write,
        _stale,
        _accumulate,
        _ragged_only,
        _large_only,
        _past_the_end,
        _before_the_start,
        _mutates,
        _reads_outside,
        _nan_past_the_end,
        _copies_past_the_end,
        _past_the_end_of_zeros,
        _in_the_next_row_far_right,
        _overflows,
        _wider,
        _transposed_rows,
        _two_outputs,
        _wrong_shape,
        _inaccurate,
        _nan,
    ],
    ids=lambda f: f.__name__.strip("_"),
)
def test_wrong_implementation_is_refused(function):
    with pytest.raises(Wrong):
        _verify(function)


def test_differing_bits_are_refused_only_where_determinism_is_declared():
    calls = itertools.count()

    def noisy(x, *, config):
        """Every sixth run differs in the last bits: the repeat, after the five cases."""
        return (x.float() * 3 + (1e-2 if next(calls) % 6 == 5 else 0)).to(x.dtype)

    with pytest.raises(NotRepeatable):
        _verify(noisy)
    _verify(noisy, deterministic=False)


def test_repeats_of_what_may_differ_are_judged_all_the_same():
    calls = itertools.count()

    def racy(x, *, config):
        return (x.float() * (4 if next(calls) == 20 else 3)).to(x.dtype)

    with pytest.raises(Wrong):
        _verify(racy, deterministic=False, repeats=50)


def test_results_in_memory_of_an_earlier_result_are_refused():
    kept = {}

    def frugal(x, *, config):
        y = kept.setdefault(x.shape, torch.empty_like(x))
        return y.copy_(x.float() * 3)

    with pytest.raises(Wrong, match="earlier result"):
        _verify(frugal)


def test_what_adds_up_in_cleared_memory_passes():
    def adds(x, *, config):
        y = torch.zeros_like(x)
        y += x * 3
        return y

    _verify(adds)


def test_finalists_meet_new_numbers_that_depend_on_the_seed_of_the_run_alone():
    op = make_op()
    trial, *finals = [[c.inputs[0] for c in cases] for cases in (
        trial_cases(op, PROBLEM, "cpu"),
        final_cases(op, PROBLEM, "cpu", 0),
        final_cases(op, PROBLEM, "cpu", 0),
        final_cases(op, PROBLEM, "cpu", 1),
    )]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(finals[0], finals[1], strict=True))
    assert not any(torch.equal(a, b) for a in finals[0] for b in [*trial, *finals[2]])
    assert max(x.abs().max() for x in finals[0]) > 40


def test_where_pytorch_overflows_there_is_no_case():
    op = make_op()
    op.implementation("torch")(lambda x: (x * 3) / (x.abs() < 20))
    assert len(trial_cases(op, PROBLEM, "cpu")) == 4
    with pytest.raises(NoYardstick):
        Case.make(op, PROBLEM, "cpu", 0, numbers="outliers")


@pytest.mark.parametrize(("off", "right"), [(1e-6, True), (1e-3, False)])
def test_where_the_truth_is_zero_what_rounding_leaves_of_sums_passes_and_no_more(off, right):
    op = make_op(lambda x, *, config: torch.full_like(x, off))
    op.reference = op.implementation("torch")(torch.zeros_like)
    case = Case.make(op, PROBLEM, "cpu", 0)
    if right:
        verify(op.tunable, CONFIG, [case])
    else:
        with pytest.raises(Wrong):
            verify(op.tunable, CONFIG, [case])


@pytest.mark.parametrize(("rows", "off", "right"), [(1, 5e-8, True), (1, 1e-5, False), (48, 1e-5, False)])
def test_of_few_numbers_pytorch_may_be_exact_by_luck(rows, off, right):
    def means(x):
        return x.double().view(rows, -1).mean(-1).float()

    op = make_op(lambda x, *, config: means(x) + off)
    op.reference = op.implementation("torch")(means)
    case = Case.make(op, PROBLEM, "cpu", 0)
    if right:
        verify(op.tunable, CONFIG, [case])
    else:
        with pytest.raises(Wrong):
            verify(op.tunable, CONFIG, [case])


def test_poisoned_allocations_keep_shape_strides_and_alignment():
    with Poisoned() as guard:
        made = torch.empty_strided((4, 6), (1, 4), dtype=torch.bfloat16)
        counts = torch.empty(5, dtype=torch.int32)
    assert made.stride() == (1, 4)
    assert made.isnan().all()
    assert made.data_ptr() % 16 == 0
    assert (counts == 0x2A).all()
    assert guard.guards_intact()


def test_error_counts_nan_as_infinite_unless_the_truth_has_it():
    nan = torch.tensor([float("nan"), 1.0])
    assert error(nan, torch.tensor([1.0, 1.0])).max == float("inf")
    assert error(nan, nan).max == 0.0
    assert error(torch.tensor([1.5]), torch.tensor([1.0])).rms == pytest.approx(0.5)


def test_what_loses_a_nan_is_seen_beside_large_numbers():
    def largest(x, *, config):
        y = torch.empty_like(x)
        return y.copy_(torch.fmax(y.float(), x.float() * 3))  # what the output held before is mixed in

    with pytest.raises(NotRepeatable):
        _verify(largest)


def test_a_read_past_the_end_that_loses_a_nan_is_seen():
    def beyond(x, *, config):
        whole = torch.as_strided(x, (x.numel() + 1,), (1,))
        return (
            torch.fmin(whole[1:], whole[:-1]).where(torch.arange(x.numel()) >= x.numel() - 1, whole[:-1]) * 3
        ).view_as(x)

    with pytest.raises((NotRepeatable, Wrong)):
        _verify(beyond, repeats=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int8, torch.bool])
@pytest.mark.parametrize("kind", [HIGH, LOW])
def test_what_nobody_writes_is_the_same_beside_any_poison(dtype, kind):
    found = []
    for guard in (Poisoned(), Poisoned(kind)):
        with guard:
            made = torch.empty(6, dtype=dtype)
        made[:3] = 1
        guard.settle([made])
        assert guard.guards_intact()
        found.append(bits(made).clone())
    assert torch.equal(*found)
    if dtype is not torch.bool:
        assert written(made).tolist() == [True] * 3 + [False] * 3


def test_what_is_added_outside_is_seen():
    def adds(x, *, config):
        sums = torch.empty(8, device=x.device)
        torch.as_strided(sums, (1,), (1,), sums.storage_offset() + 8).add_(0.5)
        return x * 3

    with pytest.raises(Wrong, match="outside"):
        _verify(adds)


def test_a_write_far_outside_is_seen():
    def far(x, *, config):
        y = torch.empty_like(x)
        torch.as_strided(y, (1,), (1,), y.storage_offset() + y.numel() + 30_000)[:] = 0.0
        return y.copy_(x.float() * 3)

    with pytest.raises(Wrong, match="outside"):
        _verify(far)


def test_large_integers_and_fp64_are_compared_to_their_last_digit():
    large = torch.tensor([1 << 30, (1 << 30) + 1], dtype=torch.int32)
    assert error(large, large).max == 0.0
    assert error(large, large.flip(0)).max == 1.0
    huge = torch.tensor([(1 << 60) + 1])
    assert error(huge, huge - 1).max == 1.0
    one = torch.ones(2, dtype=torch.float64)
    assert error(one, one + 1e-12).max == pytest.approx(1e-12, rel=1e-3)
