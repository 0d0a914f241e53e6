"""Choices by what calls are known by, when that changes."""

import pytest
import torch

from tilebook import op as ops
from tilebook.dispatch import Dispatch, memo
from tilebook.dispatch.snapshot import pytorch

OP = ops.get("rms_norm_fwd")


def call(rows):
    return torch.zeros(rows, 8), torch.ones(8), 1e-6


def choice(rows):
    return pytorch(OP, OP.problem.of(*call(rows)))


def test_calls_that_are_known_stay_so_when_keys_are_others():
    here = Dispatch()
    made = {rows: choice(rows) for rows in (1, 2, 3)}
    for rows, each in made.items():
        here._memo.keep(OP, call(rows), each)
    here.keyed_by(lambda op, args: ("other", args[0].shape[0]))
    for _ in range(2):
        assert here.known(OP, call(1)) is made[1]
        assert here.known(OP, call(4)) is None
    assert here.known(OP, call(2)) is made[2]
    assert sorted(map(str, here._memo.values())) == sorted(map(str, made.values()))
    assert here.kinds == 3
    here._memo.keep(OP, call(4), choice(4))
    assert ("other", 4) in here._memo


def test_as_many_are_kept_as_may_be(monkeypatch):
    monkeypatch.setattr(memo.Memo, "MOST", 4)
    here = Dispatch()
    for rows in range(1, 10):
        here._memo.keep(OP, call(rows), choice(rows))
    assert here.kinds == 4
    assert here.known(OP, call(9)) is not None
    assert here.known(OP, call(1)) is None


@pytest.mark.parametrize("other", [(torch.zeros(2, 8), torch.ones(8), 1e-5), (torch.zeros(2, 8), None, 1e-6)])
def test_another_call_is_not_known(other):
    here = Dispatch()
    here._memo.keep(OP, call(2), choice(2))
    assert here.known(OP, call(2)) is not None
    assert here.known(OP, other) is None
