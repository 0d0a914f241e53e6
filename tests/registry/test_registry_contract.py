"""What every backend promises; the promises are in the docstring of Registry."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from datetime import timedelta

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from old_registry import make_old, old_verdicts
from registry_samples import (
    A100,
    KERNEL,
    SOFTWARE,
    START,
    broken_trial,
    evidenced,
    miss,
    predicted,
    problem,
    revocation,
    trial,
    verdict,
)
from sqlalchemy import create_engine, text

from tilebook.registry import (
    Environment,
    Registry,
    RegistryError,
    Speedup,
    Trial,
    VerdictStatus,
    canonical,
    serving,
)
from tilebook.registry.backend import Target, make_engine
from tilebook.registry.models import Base
from tilebook.registry.schema import SCHEMA_VERSION, VERSION_TABLE


class TestContract:
    def test_records_read_back_equal(self, registry: Registry) -> None:
        trials = [trial(0), trial(1, device=A100), broken_trial(), trial(2, kernel="ff" * 32)]
        registry.record(trials, evidenced())
        assert registry.trials() == trials
        assert registry.verdicts() == [evidenced()]
        assert registry.trials()[2].failure == "compile_error"
        assert registry.corrupt == 0

    def test_a_reader_sees_what_a_writer_recorded(self, registry: Registry, target: str) -> None:
        registry.record([trial()], verdict())
        with Registry.open(target) as reader:
            assert (reader.trials(), reader.verdicts()) == ([trial()], [verdict()])
            with pytest.raises(RegistryError, match="reading only"):
                reader.record([trial()])

    def test_filters_combine(self, registry: Registry) -> None:
        trials = [trial(0), trial(1, device=A100), trial(2, op="mlp_fwd"), trial(3, problem=problem(7))]
        registry.record(trials)
        assert registry.trials(op="rms_norm_fwd", device=trials[0].device) == [trials[0], trials[3]]
        assert registry.trials(problem=problem(7)) == [trials[3]]
        assert registry.trials(kernel=KERNEL, op="mlp_fwd") == [trials[2]]
        assert registry.trials(kernel="0" * 8) == []
        assert registry.trials(device=replace(A100, sm_count=107)) == []

    def test_recording_a_trial_again_changes_nothing(self, registry: Registry) -> None:
        registry.record([trial(0), trial(0), trial(1)])
        registry.record([trial(1)])
        assert registry.trials() == [trial(0), trial(1)]

    def test_a_verdict_replaces_that_of_its_key_only(self, registry: Registry) -> None:
        registry.record(verdict=verdict())
        registry.record(verdict=verdict(kernel="ee" * 8))
        newer = verdict(environment=Environment({"triton": "3.9.0"}), config={"BLOCK_M": 32})
        registry.record(verdict=newer)
        assert registry.verdicts() == [newer, verdict(kernel="ee" * 8)]

    @pytest.mark.parametrize("status", [VerdictStatus.MEASURED, VerdictStatus.DEFAULT])
    def test_a_prediction_never_replaces_a_measurement(self, registry: Registry, status: VerdictStatus) -> None:
        registry.record(verdict=predicted())
        registry.record(verdict=verdict(status=status))
        registry.record(verdict=predicted(config={"BLOCK_M": 1}))
        assert registry.verdicts() == [verdict(status=status)]

    def test_an_unstorable_record_leaves_no_part_of_its_transaction(self, registry: Registry) -> None:
        with pytest.raises(AttributeError):
            registry.merge([trial()], [verdict(), None])  # type: ignore[list-item]
        assert (registry.trials(), registry.verdicts()) == ([], [])

    def test_an_imported_trial_becomes_local_when_it_is_recorded(self, registry: Registry) -> None:
        registry.merge([trial(0), trial(1)], origin="imported")
        registry.record([trial(1), trial(2)])
        registry.merge([trial(2)], origin="imported")
        assert registry.trials(origin="local") == [trial(1), trial(2)]
        assert len(registry.trials()) == 3

    def test_misses_add_up_and_come_heaviest_first(self, registry: Registry) -> None:
        registry.count_misses([miss(1, calls=5, time_ms=1.0), miss(2, calls=2, time_ms=100.0), miss(3, device=A100)])
        later = START + timedelta(days=1)
        registry.count_misses([miss(1, calls=7, time_ms=2.0, last_seen=later)])
        assert registry.misses(device=miss().device) == [
            miss(2, calls=2, time_ms=100.0),
            miss(1, calls=12, time_ms=2.0, last_seen=later),
        ]
        assert registry.misses(device=A100) == [miss(3, device=A100)]

    def test_extreme_numbers_survive(self, registry: Registry) -> None:
        samples = (0.1 + 0.2, 5e-324, 1.7976931348623157e308, 0.0, 1 / 3)
        record = trial(samples_ms=samples, time_ms=1 / 3, facts={"low": -(2**63), "high": 2**63 - 1, "zero": -0.0})
        registry.record([record])
        assert registry.trials()[0].sha256 == record.sha256

    def test_more_trials_than_a_statement_has_parameters(self, registry: Registry) -> None:
        trials = [trial(number) for number in range(1200)]
        registry.record(trials[:700])
        registry.record(trials)
        assert registry.trials() == trials

    def test_eight_processes_create_and_write_at_once(self, target: str) -> None:
        fork = multiprocessing.get_context("fork")
        barrier = fork.Barrier(8)
        workers = [fork.Process(target=_create_and_write, args=(target, barrier, number)) for number in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0] * 8
        with Registry.open(target) as registry:
            assert len(registry.trials()) == 8
            assert registry.misses()[0].calls == 8

    def test_the_migrated_schema_is_that_of_the_models(self, registry: Registry) -> None:
        engine = make_engine(Target.parse(registry.target), write=False)
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
            assert compare_metadata(context, Base.metadata) == []

    def test_a_newer_schema_is_refused_by_readers_and_writers(self, registry: Registry, target: str) -> None:
        newer = SCHEMA_VERSION + 1
        _execute(target, f"UPDATE {VERSION_TABLE} SET version_num = '{newer:04}'", f"PRAGMA user_version={newer}")
        for write in (False, True):
            with pytest.raises(RegistryError, match="newer"):
                Registry.open(target, write=write)
        with pytest.raises(RegistryError, match="newer"):
            registry.record([trial()])

    def test_a_schema_older_than_the_oldest_readable_is_refused_by_readers(
        self, registry: Registry, target: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tilebook.registry.schema.SCHEMA_VERSION", SCHEMA_VERSION + 1)
        monkeypatch.setattr("tilebook.registry.schema.OLDEST_READABLE", SCHEMA_VERSION + 1)
        with pytest.raises(RegistryError, match=r"older.*opening it for writing"):
            Registry.open(target)

    @pytest.mark.parametrize("version", [1, 2])
    def test_an_older_schema_is_read_as_it_is_and_upgraded_by_a_writer(self, target: str, version: int) -> None:
        make_old(target, old_verdicts(), version)
        readings = []
        for _ in range(2):
            with Registry.open(target) as reader:
                readings.append(reader.verdicts())
                assert (reader.trials(), reader.revocations(), reader.problems) == ([], [], [])
                (mlp,) = reader.verdicts(op="mlp_grads_bwd")
        table = serving.read(mlp.device.name, mlp.device.arch, mlp.device.sm_count, target)
        served = [each for each in table.verdicts("mlp_grads_bwd") if each.layer == "explicit"]
        with Registry.open(target, write=True) as upgraded:
            readings.append(upgraded.verdicts())
            assert upgraded.revoke(revocation())
            upgraded.record([trial()], evidenced())
        with Registry.open(target) as reader:
            assert evidenced() in reader.verdicts()
            readings.append([each for each in reader.verdicts() if each != evidenced()])
            assert (reader.revocations(), reader.problems) == ([revocation()], [])
        assert [len(each) for each in readings] == [4] * 4
        assert readings == [readings[0]] * 4
        again = serving.read(mlp.device.name, mlp.device.arch, mlp.device.sm_count, target)
        assert served == [each for each in again.verdicts("mlp_grads_bwd") if each.layer == "explicit"]
        assert [each.time_ms for each in served[0].finalists] == [each.time_ms for each in mlp.finalists]

    def test_an_upgrade_loses_nothing_of_the_evidence(self, target: str) -> None:
        make_old(target, old_verdicts())
        with Registry.open(target, write=True) as upgraded:
            found = {(each.op, each.problem): each for each in upgraded.verdicts()}
        for old in old_verdicts():
            new, evidence = found[old["op"], old["problem"]], old["evidence"]
            assert (new.implementation, new.config, new.time_ms) == (
                old["implementation"],
                old["config"],
                old["time_ms"],
            )
            assert new.interval == Speedup(old["speedup"], old["speedup_low"], old["speedup_high"])
            assert new.default_time_ms == old["default_time_ms"]
            finalists = {each.key: each for each in new.finalists}
            assert len(finalists) == len(evidence["candidates"])
            for place, each in enumerate(evidence["candidates"]):
                kept = finalists[each["implementation"], canonical(each["config"])]
                assert (kept.time_ms, list(kept.samples_ms)) == (each["time_ms"], each["samples_ms"])
                assert kept.speedup == Speedup(*each["speedup"])
                assert kept.default is (place == 0)
            seconds = [each.again for each in new.finalists if each.again is not None]
            for contest, again in zip(evidence.get("again", []), seconds, strict=True):
                assert [list(again.default_samples_ms), list(again.samples_ms)] == [e["samples_ms"] for e in contest]
            assert new.sources == evidence.get("kernels", {})
            rest = {"candidates", "again", "kernels", "mode"}
            assert new.notes == {name: value for name, value in evidence.items() if name not in rest}

    def test_an_old_row_that_no_tuner_wrote_is_left_out_and_left_behind(self, target: str) -> None:
        good, bad = old_verdicts()[:2]
        make_old(target, [good, {**bad, "evidence": {"candidates": [{}]}}])
        with Registry.open(target) as reader:
            assert (len(reader.verdicts()), reader.corrupt) == (1, 1)
            assert "left out 1 damaged row" in reader.problems[0]
        with Registry.open(target, write=True) as upgraded:
            assert (len(upgraded.verdicts()), upgraded.corrupt) == (1, 0)

    def test_revocations_add_up_and_the_first_of_a_scope_stays(self, registry: Registry, target: str) -> None:
        anything = revocation(kernel=None, arch=None, triton=None, config={}, created_at=START - timedelta(days=1))
        assert [registry.revoke(each) for each in (revocation(), anything)] == [True, True]
        assert not registry.revoke(revocation(reason="said again", created_at=START + timedelta(days=1)))
        with Registry.open(target) as reader:
            assert reader.revocations() == [anything, revocation()]
            with pytest.raises(RegistryError, match="reading only"):
                reader.revoke(revocation(op="mlp_fwd"))

    def test_trust_replaces_distrust_of_the_same_scope_and_never_the_reverse(self, registry: Registry) -> None:
        theirs = revocation(origin="imported", trusted=False, reason="theirs")
        assert [registry.revoke(each) for each in (theirs, revocation(), theirs)] == [True, True, False]
        assert registry.revocations() == [revocation()]

    def test_a_revocation_is_taken_back_by_the_beginning_of_its_scope(self, registry: Registry) -> None:
        registry.merge(revocations=[revocation(), revocation(op="mlp_fwd")])
        with pytest.raises(ValueError, match="2 revocations"):
            registry.unrevoke("")
        assert not registry.unrevoke("0123")
        assert registry.unrevoke(revocation().scope[:8])
        assert registry.revocations() == [revocation(op="mlp_fwd")]

    @pytest.mark.parametrize("change", ["op = 'mlp_fwd'", "config = '[['", "trusted = NOT trusted", "triton = NULL"])
    def test_a_damaged_revocation_is_a_problem_until_it_is_repeated_or_removed(
        self, registry: Registry, target: str, change: str
    ) -> None:
        registry.merge(revocations=[revocation(), revocation(arch="sm_80")])
        damage = f"UPDATE revocation SET {change} WHERE arch = 'sm_90'"
        _execute(target, damage, "UPDATE revocation SET id = id")
        with Registry.open(target) as reader:
            assert (reader.revocations(), reader.corrupt) == ([revocation(arch="sm_80")], 1)
            (line,) = reader.problems
        assert "what it revokes may run again" in line
        assert f"--undo '{revocation().scope[:8]}'" in line
        assert registry.revoke(revocation())
        assert len(registry.revocations()) == 2
        _execute(target, damage, "UPDATE revocation SET id = id")
        assert registry.unrevoke(revocation().scope[:8])
        assert (registry.revocations(), registry.corrupt) == ([revocation(arch="sm_80")], 0)

    def test_a_damaged_row_is_left_out_counted_and_logged(
        self, registry: Registry, target: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        registry.record([trial(0), trial(1)], verdict())
        _execute(target, "UPDATE trial SET time_ms = time_ms * 2 WHERE id = 1", "UPDATE trial SET id = id WHERE id = 1")
        assert registry.trials() == [trial(1)]
        assert registry.corrupt == 1
        assert "1 damaged row" in caplog.text
        _execute(target, "UPDATE verdict SET trusted = NOT trusted", "UPDATE verdict SET id = id")
        assert (registry.verdicts(), registry.corrupt) == ([], 1)
        registry.record(verdict=predicted())
        assert (registry.verdicts(), registry.corrupt) == ([predicted()], 0)

    def test_a_damaged_environment_is_mended_by_the_next_writer(self, registry: Registry, target: str) -> None:
        registry.record([trial(0)])
        _execute(target, "UPDATE environment SET versions = '{}'", "UPDATE device SET id = id")
        assert registry.trials() == []
        registry.record([trial(1)])
        assert registry.trials() == [trial(0), trial(1)]

    def test_a_closed_registry_says_so(self, registry: Registry) -> None:
        registry.close()
        registry.close()
        with pytest.raises(RegistryError, match="closed"):
            registry.trials()


def test_a_password_is_in_no_message() -> None:
    url = "postgresql://somebody:sesame@127.0.0.1:1/none"
    with pytest.raises(RegistryError) as caught:
        Registry.open(url)
    assert "sesame" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["mysql://x/y", "sqlite://", "sqlite:///file:x?mode=ro", "http://x", "", "a b://["])
def test_an_address_that_is_no_registry_is_refused(target: str) -> None:
    with pytest.raises(RegistryError):
        Registry.open(target)


def _create_and_write(target: str, barrier: object, number: int) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    with Registry.open(target, write=True) as registry:
        registry.record([trial(number, environment=SOFTWARE)])
        registry.count_misses([miss()])


def _execute(target: str, statement: str, sqlite_too: str) -> None:
    """Changes a registry behind its back; the second statement is for SQLite's second record of the same fact."""
    if target.startswith("postgresql"):
        engine = create_engine(target.replace("postgresql:", "postgresql+psycopg:"))
    else:
        engine = create_engine(f"sqlite:///{target}")
    with engine.begin() as connection:
        connection.execute(text(statement))
        if connection.dialect.name == "sqlite":
            connection.execute(text(sqlite_too))
    engine.dispose()


def test_a_trial_is_a_value() -> None:
    assert Trial(**{name: getattr(trial(), name) for name in Trial.__dataclass_fields__}) == trial()
