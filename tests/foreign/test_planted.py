"""Kernels as users have them, through the real worker and session in the interpreter: no faulty config becomes a
verdict, and no honest one is refused."""

import corpus
import planted
import pytest
from recorded import recording, tune

pytestmark = pytest.mark.usefixtures("forked_here")


def test_there_are_faults_and_honest_configs_enough():
    faults, honest = corpus.planted()
    assert len(corpus.CALLS) >= 12
    assert len(faults) >= 60
    assert honest >= 200


@pytest.mark.sampled(15)
@pytest.mark.parametrize("kernel", corpus.CALLS, ids=lambda name: name.rpartition(":")[2])
def test_planted_faults_are_refused_and_honest_configs_are_not(kernel, tmp_path):
    with recording(tmp_path / "record") as made:
        corpus.CALLS[kernel]("cpu")
    assert made.left_out == {}
    (state,) = tune(tmp_path / "record", tmp_path / "registry.db", planted.rules(tmp_path), attempt_s=4.0)
    assert state.error == ""
    found = planted.found(tmp_path / "registry.db", kernel)
    assert planted.wrongs(kernel, found) == []
    assert found.tried == sum(config.kwargs["FAULT"] == 0 for config in corpus.tuner(kernel).configs)
