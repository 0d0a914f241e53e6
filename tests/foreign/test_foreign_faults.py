"""Other people's kernels through the real worker and session, in the interpreter: no faulty config wins."""

import json

import others
import pytest
import torch
from recorded import recording, tune

from tilebook.errors import TuningError, UsageError
from tilebook.foreign import record
from tilebook.foreign.offered import offered
from tilebook.registry import Registry
from tilebook.tuner.judge.verify import trial_cases


class Tuned:
    """What a tune has left, by kernel."""

    def __init__(self, states, path):
        self.errors = {state.op.partition(":")[2]: state.error for state in states}
        with Registry.open(path) as registry:
            self._trials, verdicts = registry.trials(), registry.verdicts()
        self.verdicts = {verdict.op.partition(":")[2]: verdict for verdict in verdicts}

    def refused(self, kernel):
        """Of the configs that failed, by what is planted in them, the failure and the reason."""
        its = (trial for trial in self._trials if trial.op == f"others:{kernel}" and trial.failure is not None)
        return {trial.config["FAULT"]: (trial.failure, trial.reason) for trial in its}

    def served(self, kernel):
        return {(config["BLOCK"], config["FAULT"]) for _, config in self.verdicts[kernel].ranking()}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    with recording(folder / "record"):
        for kernel in ("scale_kernel", "first_is_wrong", "half_are_wrong", "wrong_but_told"):
            others.scaled(getattr(others, kernel), torch.randn(100))
        others.columns(torch.randn(64, 2))
        others.columns(torch.randn(50, 2))
        others.add_(torch.randn(3, 80, dtype=torch.float16)[:, :50], torch.randn(3, 50, dtype=torch.float16))
        others.total(torch.randn(200))
        others.pick(torch.randn(40), torch.arange(40))
    rules = folder / "rules.json"
    rules.write_text(json.dumps({"others:pick_*": {"index": {"below": 40}}}))
    return Tuned(tune(folder / "record", folder / "registry.db", rules, attempt_s=3.0), folder / "registry.db")


def test_six_planted_faults_are_refused_and_the_right_configs_accepted(tuned):
    refused = tuned.refused("scale_kernel")
    assert set(refused) == set(others.FAULTS)
    assert refused[others.HANG][0] == "run_timeout"
    assert refused[others.RACE][0] in ("not_repeatable", "wrong_answer", "slow")  # a busy machine may find it slow
    for fault, reason in {
        others.SILENT: "max error",
        others.RAGGED: "max error",
        others.OUTSIDE: "outside its tensors",
        others.DAMAGE: "changed its input",
    }.items():
        assert refused[fault][0] == "wrong_answer"
        assert reason in refused[fault][1]
    assert tuned.served("scale_kernel") <= {(16, 0), (32, 0), (64, 0)}
    assert tuned.verdicts["scale_kernel"].config["BLOCK"] == 64


@pytest.mark.parametrize("kernel", ["add_kernel", "total_kernel", "pick_kernel"])
def test_kernels_that_write_in_place_add_in_any_order_and_read_indices_are_tuned(tuned, kernel):
    assert tuned.refused(kernel) == {}
    assert tuned.verdicts[kernel].config["BLOCK"] == 64


def test_a_config_that_is_wrong_at_another_recorded_size_of_the_same_key_is_refused(tuned):
    failure, reason = tuned.refused("columns_kernel")[others.RAGGED]
    assert failure == "wrong_answer"
    assert "call 2" in reason
    assert tuned.served("columns_kernel") <= {(16, 0), (32, 0), (64, 0)}


def test_a_first_config_that_is_wrong_is_no_baseline(tuned):
    default = next(each for each in tuned.verdicts["first_is_wrong"].finalists if each.default)
    assert (default.config["BLOCK"], default.config["FAULT"]) == (16, 0)
    assert others.RAGGED in tuned.refused("first_is_wrong")


def test_where_configs_do_not_agree_there_is_no_verdict(tuned):
    assert "do not agree" in tuned.errors["half_are_wrong"]
    assert "half_are_wrong" not in tuned.verdicts


def test_a_reference_tells_what_most_configs_do_not(tuned):
    assert tuned.served("wrong_but_told") == {(16, 0)}


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"x": {"fill": float("inf")}}, "are no numbers"),
        ({"index": {"values": [[1] * 40]}, "y": {"role": "in"}}, "no outputs"),
    ],
)
def test_inputs_that_tell_nothing_are_no_truth(rules, words, tmp_path):
    with recording(tmp_path / "record"):
        others.pick(torch.randn(40), torch.arange(40))
    (tmp_path / "rules.json").write_text(json.dumps({"*": rules}))
    with offered(tmp_path / "record", tmp_path / "rules.json") as offer:
        ((op, problem),) = offer.problems
        with pytest.raises(TuningError, match=words):
            trial_cases(op, problem, "cpu")


def test_a_kernel_that_does_nothing_on_zeros_asks_for_rules(tmp_path):
    with recording(tmp_path / "record"):
        others.some(torch.randn(40), torch.tensor([40]))
    with offered(tmp_path / "record") as offer:
        ((op, problem),) = offer.problems
        with pytest.raises(TuningError, match=r"writes nothing .* rules may be wanted for length"):
            trial_cases(op, problem, "cpu")


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', '{"a": {"x": {"normall": 1}}}', '{"a": {"x": {"role": "all"}}}'])
def test_rules_that_nobody_understands_are_refused(text, tmp_path):
    (tmp_path / "rules.json").write_text(text)
    with pytest.raises(UsageError, match="rule"):
        record.rules(tmp_path / "rules.json")


def test_nothing_else_failed(tuned):
    assert {kernel for kernel, error in tuned.errors.items() if error} == {"half_are_wrong"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kernel", "fault"), [("ends_second", 7), ("hangs_second", others.HANG)])
def test_a_config_that_ends_its_process_has_no_vote_and_the_rest_is_tuned(kernel, fault, tmp_path, forked):
    with recording(tmp_path / "record"):
        others.doubled(getattr(others, kernel), torch.randn(100))
    states = tune(tmp_path / "record", tmp_path / "registry.db", attempt_s=3.0, prepare_s=6.0)
    tuned = Tuned(states, tmp_path / "registry.db")
    assert tuned.errors == {kernel: ""}
    assert (64, 0) in tuned.served(kernel) <= {(16, 0), (32, 0), (64, 0)}
    assert tuned.refused(kernel)[fault][0] in ("run_timeout", "run_error", "worker_died")


def test_integers_without_a_rule_are_told_of(tmp_path):
    with recording(tmp_path / "record"):
        others.pick(torch.randn(40), torch.arange(40))
        others.doubled(others.ends_second, torch.randn(100))
    with offered(tmp_path / "record") as offer:
        assert "others:pick_kernel (index); --rules says more" in offer.warning()
    (tmp_path / "rules.json").write_text(json.dumps({"others:*": {"index": {"below": 40}}}))
    with offered(tmp_path / "record", tmp_path / "rules.json") as offer:
        assert offer.warning() == ""
