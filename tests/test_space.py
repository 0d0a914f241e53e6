"""What a space says of its configs, with an axis that came after others had been stored."""

import pytest

from tilebook import revocation
from tilebook.op import Config, Space, UsageError

OLD = Space({"BLOCK": (16, 32)}, lambda *_: None, lambda *_: Config(BLOCK=16))
SPACE = Space({**OLD.axes, "CAP": (0, 128, 64)}, OLD.reject, OLD.default, later={"CAP": 0})


def test_every_config_from_before_an_axis_is_still_one_of_the_space():
    configs = list(SPACE.configs())
    assert len(configs) == len(set(configs)) == len(SPACE) == 6
    assert set(OLD.configs()) < set(configs)
    assert all(map(SPACE.contains, configs))


@pytest.mark.parametrize(
    "values", [{"CAP": 64}, {"BLOCK": 16, "CAP": 0}, {"BLOCK": 16, "CAP": 32}, {"BLOCK": 16, "X": 0}]
)
def test_what_is_not_written_as_configs_are_is_not_one_of_the_space(values):
    assert not SPACE.contains(values)


def test_neighbours_lead_from_the_configs_before_an_axis_to_those_after_it_and_back():
    assert set(SPACE.neighbours(Config(BLOCK=16))) == {Config(BLOCK=32), Config(BLOCK=16, CAP=128)}
    assert set(SPACE.neighbours(Config(BLOCK=16, CAP=128))) == {
        Config(BLOCK=16), Config(BLOCK=32, CAP=128), Config(BLOCK=16, CAP=64)
    }  # fmt: skip


def test_stand_ins_for_the_default_come_by_steps_on_every_axis():
    assert list(SPACE.defaults(None, None))[:3] == [Config(BLOCK=16), Config(BLOCK=16, CAP=128), Config(BLOCK=32)]


def test_values_that_configs_leave_out_cannot_be_revoked():
    with pytest.raises(UsageError, match="configs leave MAXNREG out"):
        revocation.make("attention_fwd", None, "MAXNREG=0", None, None, None, "slow")
