"""Other people's kernels through the real worker and session, in the interpreter: no faulty config wins."""

import json

import others
import torch
from recorded import recording, tune

from tilebook.registry import Registry


def test_six_planted_faults_are_refused_and_the_right_configs_accepted(tmp_path, monkeypatch):
    with recording(tmp_path / "record", monkeypatch):
        others.scaled(others.scale_kernel, torch.randn(100))
    (state,) = tune(tmp_path / "record", tmp_path / "registry.db", attempt_s=3.0)
    assert not state.error
    with Registry.open(tmp_path / "registry.db") as registry:
        trials, (verdict,) = registry.trials(), registry.verdicts()
    failures = {trial.config["FAULT"]: trial.failure for trial in trials if trial.failure is not None}
    reasons = {trial.config["FAULT"]: trial.reason for trial in trials if trial.failure is not None}
    assert set(failures) == set(others.FAULTS), reasons
    assert failures[others.HANG] == "run_timeout"
    assert failures[others.RACE] in ("not_repeatable", "wrong_answer")
    assert {failures[each] for each in (others.SILENT, others.OUTSIDE, others.RAGGED, others.DAMAGE)} == {
        "wrong_answer"
    }
    assert "outside its tensors" in reasons[others.OUTSIDE]
    assert "changed its input" in reasons[others.DAMAGE]
    assert all(each.config["FAULT"] == 0 for each in verdict.finalists)
    assert verdict.config["BLOCK"] == 64
    assert {trial.config["BLOCK"] for trial in trials if trial.failure is None} == {16, 32, 64}


def verdicts_of(path):
    with Registry.open(path) as registry:
        return {verdict.op.partition(":")[2]: verdict for verdict in registry.verdicts()}


def test_kernels_that_write_in_place_add_in_any_order_and_read_indices_are_tuned(tmp_path, monkeypatch):
    with recording(tmp_path / "record", monkeypatch):
        wide = torch.randn(3, 80, dtype=torch.float16)[:, :50]
        others.add_(wide, torch.randn(3, 50, dtype=torch.float16))
        others.total(torch.randn(200))
        others.pick(torch.randn(40), torch.arange(40))
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"others:pick_*": {"index": {"below": 40}}}))
    states = tune(tmp_path / "record", tmp_path / "registry.db", rules)
    assert [state.error for state in states] == [""] * 3
    found = verdicts_of(tmp_path / "registry.db")
    assert {name: verdict.config["BLOCK"] for name, verdict in found.items()} == dict.fromkeys(
        ("add_kernel", "total_kernel", "pick_kernel"), 64
    )
    with Registry.open(tmp_path / "registry.db") as registry:
        assert [trial.reason for trial in registry.trials() if trial.failure is not None] == []


def test_a_first_config_that_is_wrong_is_no_baseline_and_where_configs_disagree_there_is_no_verdict(
    tmp_path, monkeypatch
):
    with recording(tmp_path / "record", monkeypatch):
        others.scaled(others.first_is_wrong, torch.randn(100))
        others.scaled(others.half_are_wrong, torch.randn(100))
    states = {state.op: state.error for state in tune(tmp_path / "record", tmp_path / "registry.db")}
    assert "do not agree" in states["others:half_are_wrong"]
    (verdict,) = verdicts_of(tmp_path / "registry.db").values()
    assert {config["FAULT"] for _, config in verdict.ranking()} == {0}
    assert next(dict(each.config) for each in verdict.finalists if each.default)["BLOCK"] == 16
