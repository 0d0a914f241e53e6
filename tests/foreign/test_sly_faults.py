"""Faults that are made to get through a verification, one by one, and honest kernels that are made to be refused."""

import pytest
import slyly
import torch
from corpus import sly

from tilebook.foreign import truth
from tilebook.op import Answers
from tilebook.tuner.judge.verify import Case, Wrong


@pytest.mark.parametrize("kernel", sly.CALLS)
def test_sly_faults_are_found_and_honest_configs_pass(kernel, tmp_path):
    assert slyly.judged(kernel, tmp_path, "cpu") == ([], {})


@pytest.mark.parametrize(("off", "right"), [(0, True), (1, True), (2, False)])
def test_a_rounded_number_in_int8_may_be_the_next_one(off, right):
    x, whole = torch.randn(4000), torch.randint(-127, 128, (4000,), dtype=torch.int8)
    whole[0] = 127
    other = whole.clone()
    other[7] = whole[7] + (off if whole[7] < 0 else -off)
    steps = truth._steps([x], [whole], rough=False)
    case = Case._answered(None, "", Answers((x,), (whole,), steps), strict=False)
    assert truth._agree([whole], [other], steps) == right
    if right:
        case.judge([other])
    else:
        with pytest.raises(Wrong):
            case.judge([other])


def test_integers_that_are_no_rounded_numbers_are_exact():
    index = torch.arange(300, dtype=torch.int32) + (1 << 29)
    for dtype, inputs in ((torch.int32, [torch.randn(3)]), (torch.int8, [index])):
        whole = (index % (1 << 30) if dtype is torch.int32 else index % 100).to(dtype)
        steps = truth._steps(inputs, [whole], rough=False)
        assert truth._agree([whole], [whole.clone()], steps)
        assert not truth._agree([whole], [whole + 1], steps)


@pytest.mark.parametrize(("rough", "allowed"), [(True, 2**-10), (False, 2**-13)])
def test_who_has_a_reference_that_is_not_exact_to_the_last_digit_is_not_refused(rough, allowed):
    x = torch.randn(300)
    assert truth._steps([x], [x], rough) == (allowed,)


def test_a_sum_that_nearly_cancels_is_not_refused_and_one_that_cannot_is_judged_sharply():
    x, total = torch.randn(1000), torch.zeros(1)
    assert truth._steps([x], [total], rough=False) == (2**-7,)
    assert truth._steps([-x.abs()], [total], rough=False) == (2**-13,)
    assert truth._steps([x], [x], rough=False) == (2**-13,)
