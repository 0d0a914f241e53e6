"""Faults that are made to get through a verification, one by one, and honest kernels that are made to be refused."""

import json

import pytest
import torch
from corpus import sly
from recorded import recording

from tilebook.foreign import truth
from tilebook.foreign.offered import offered
from tilebook.op import Answers
from tilebook.tuner.judge.verify import Case, Wrong, final_cases, trial_cases, verify


def judged(kernel, folder):
    """By config, what is said of it when it is tried and then confirmed; "" for nothing."""
    with recording(folder / "record") as made:
        sly.CALLS[kernel]("cpu")
    assert made.left_out == {}
    (folder / "rules.json").write_text(
        json.dumps({name: rule for name, rule in sly.RULES.items() if name.endswith(kernel)})
    )
    with offered(folder / "record", folder / "rules.json") as offer:
        ((op, problem),) = offer.problems
        cases, said = [*trial_cases(op, problem, "cpu"), *final_cases(op, problem, "cpu", 7)], {}
        for config in op.tunable.space.configs():
            try:
                verify(op.tunable, config, cases)
                said[config] = ""
            except Wrong as wrong:
                said[config] = str(wrong)
    return said


@pytest.mark.parametrize("kernel", sly.CALLS)
def test_sly_faults_are_found_and_honest_configs_pass(kernel, tmp_path):
    said = judged(kernel, tmp_path)
    names = {number: name for name, number in sly.SLY.items()}
    missed = {names[config["FAULT"]] for config, wrong in said.items() if config["FAULT"] and not wrong}
    refused = {str(config): wrong for config, wrong in said.items() if not config["FAULT"] and wrong}
    assert (missed, refused) == (set(), {})


@pytest.mark.parametrize(("off", "right"), [(0, True), (1, True), (2, False)])
def test_a_rounded_number_in_int8_may_be_the_next_one(off, right):
    x, whole = torch.randn(4000), torch.randint(-127, 128, (4000,), dtype=torch.int8)
    whole[0] = 127
    other = whole.clone()
    other[7] = whole[7] + (off if whole[7] < 0 else -off)
    steps = truth._steps([x], [whole], multiplies=False)
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
        steps = truth._steps(inputs, [whole], multiplies=False)
        assert truth._agree([whole], [whole.clone()], steps)
        assert not truth._agree([whole], [whole + 1], steps)
