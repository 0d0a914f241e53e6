"""What dispatch asks of a large registry: by index, and no more than bears on the question."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from registry_samples import A100, H200, KERNEL, predicted, problem, verdict
from sqlalchemy import text

from tilebook.registry import Registry, Verdict, lookup, near, schema, serving
from tilebook.registry.backend import make_engine
from tilebook.registry.lookup import Question
from tilebook.registry.models import VerdictRow
from tilebook.registry.target import APPLICATION_ID, Target

OP = "rms_norm_fwd"


def distance(key: str) -> Any:
    return lambda other: abs(math.log2(json.loads(key)["rows"] / json.loads(other)["rows"]))


def question(rows: int, most: int = 1, **changes: Any) -> Question:
    asked = {"op": OP, "kernel": KERNEL, "problem": problem(rows), "most": most, "reach": 8.0, **changes}
    return Question(**asked, distance=distance(problem(rows)))


def ask(registry: Registry, asked: Question) -> tuple[int | None, list[int]]:
    """The rows of the exact verdict's problem, and of the near ones'."""
    with registry.asking() as execute:
        found = lookup.answer(execute, "explicit", H200, asked)
    exact = None if found.exact is None else json.loads(found.exact.problem)["rows"]
    return exact, [json.loads(each.problem)["rows"] for _, each in found.near]


def test_the_exact_verdict_is_the_answer_else_the_nearest(registry: Registry) -> None:
    mine = [verdict(problem=problem(rows)) for rows in (64, 256, 4096)]
    theirs = [verdict(problem=problem(100), device=A100), verdict(problem=problem(100), kernel="ab" * 8)]
    claim = verdict(problem=problem(110), trusted=False, origin="imported")
    registry.merge(verdicts=[*mine, *theirs, claim])
    assert ask(registry, question(256)) == (256, [])
    assert ask(registry, question(100)) == (None, [64])
    assert ask(registry, question(100, 5)) == (None, [64, 256, 4096])
    assert ask(registry, question(110, 2)) == (110, [64, 256])
    assert ask(registry, question(100, reach=1.0)) == (None, [64])
    assert ask(registry, question(100, 0)) == (None, [])
    assert ask(registry, question(256, kernel="cd" * 8)) == (None, [])


def test_the_nearest_are_told_beside_the_verdict_itself_where_they_are_wanted(registry: Registry) -> None:
    registry.merge(verdicts=[verdict(problem=problem(rows)) for rows in (64, 256, 4096)])
    assert ask(registry, question(256, 2)) == (256, [])
    assert ask(registry, question(256, 2, beside=True)) == (256, [64, 4096])
    assert ask(registry, question(256, 0, beside=True)) == (256, [])


def test_an_answer_says_up_to_which_distance_it_is_complete(registry: Registry) -> None:
    registry.merge(verdicts=[verdict(problem=problem(rows)) for rows in (64, 128, 512, 4096)])
    with registry.asking() as execute:
        told = [lookup.answer(execute, "explicit", H200, question(256, most, beside=True)) for most in range(6)]
    assert [len(each.near) for each in told] == [0, 2, 2, 3, 4, 4]
    assert [each.complete for each in told] == [0.0, 1.0, 1.0, 2.0, 4.0, math.inf]
    assert lookup.Answer().complete == math.inf


def test_what_serves_no_more_has_no_position(registry: Registry) -> None:
    registry.record(verdict=verdict())
    assert ask(registry, question(100)) == (None, [128])
    registry.merge(verdicts=[verdict(trusted=False)])
    assert ask(registry, question(100)) == (None, [])
    registry.merge(verdicts=[predicted()])
    assert ask(registry, question(100)) == (None, [128])


def test_a_large_layer_answers_as_a_small_one(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEBOOK_REGISTRY", target)
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", Path("/nowhere/registry.db"))
    with Registry.open(target, write=True) as registry:
        registry.merge(verdicts=[verdict(problem=problem(rows)) for rows in (8, 64, 512)])
    answers = []
    for whole in (2, 3):
        monkeypatch.setattr(serving, "WHOLE", whole)
        table = serving.read(H200.name, H200.arch, H200.sm_count)
        assert table.large(OP) is (whole == 2)
        assert len(table.small(OP)) == (0 if whole == 2 else 3)
        answers.append(
            (table.verdicts(OP), table.find(question(64)).exact, len(table.some(OP, KERNEL)), table.problems)
        )
    assert answers[0][2:] == (2, [])
    assert answers[1][2:] == (3, [])
    assert answers[0][:2] == answers[1][:2]


def test_a_position_without_a_verdict_is_passed_over(path: Path) -> None:
    with Registry.open(path, write=True) as registry:
        registry.merge(verdicts=[verdict(problem=problem(64)), verdict(problem=problem(128))])
        with sqlite3.connect(path) as database:  # which asks for no foreign keys
            database.execute("UPDATE position SET verdict_id = 999 WHERE verdict_id = 1")

        def far(other: str) -> float:
            return distance(problem(100))(other) if other else math.inf

        with registry.asking() as execute:
            found = lookup.answer(execute, "explicit", H200, replace(question(100, 9), distance=far))
    assert [json.loads(each.problem)["rows"] for _, each in found.near] == [128]


class Counted:
    """Counts what is asked and what comes back; of SQLite it keeps how."""

    def __init__(self, execute: lookup.Execute, sqlite: bool) -> None:
        self._execute, self._sqlite = execute, sqlite
        self.statements = self.rows = 0
        self.plans: set[str] = set()

    def __call__(self, statement: str, values: Sequence[Any]) -> Sequence[Sequence[Any]]:
        if self._sqlite:
            self.plans.update(str(row[3]) for row in self._execute(f"EXPLAIN QUERY PLAN {statement}", values))
        found = self._execute(statement, values)
        self.statements, self.rows = self.statements + 1, self.rows + len(found)
        return found


def fill(target: str, many: int) -> None:
    """Puts rows beside the only verdict, alike but for their problems; digests, which nobody asks for, are its own."""
    keys = [problem(3 * number + 2) for number in range(many)]
    with make_engine(Target.parse(target), write=True).begin() as connection:
        rows = [{"id": 10 + n, "key": key, **near.position_columns(key)} for n, key in enumerate(keys)]
        connection.execute(text(f"INSERT INTO problem (id, op, key) VALUES (:id, '{OP}', :key)"), rows)
        columns = [each.name for each in VerdictRow.__table__.columns if each.name not in ("id", "problem_id")]
        same = ", ".join(columns)
        one = f"SELECT p.id, p.id, {', '.join(f'v.{name}' for name in columns)} FROM problem AS p, verdict AS v"
        connection.execute(text(f"INSERT INTO verdict (id, problem_id, {same}) {one} WHERE v.id < 10 AND p.id >= 10"))
        where = "SELECT :id, device_id, kernel_id, :form, :spot FROM position WHERE verdict_id < 10"
        connection.execute(text(f"INSERT INTO position {where}"), rows)


def test_of_many_verdicts_damaged_ones_too_few_rows_are_read_and_by_index(registry: Registry) -> None:
    sqlite = ":" not in registry.target
    registry.record(verdict=verdict(problem=problem(3_001)))
    fill(registry.target, 20_000 if sqlite else 2_000)
    for rows, exact in ((3_001, True), (3_003, False), (1 << 20, False)):
        with registry.asking() as execute:
            counted = Counted(execute, sqlite)
            assert lookup.holds_more(counted, OP, H200, 128)
            found = lookup.answer(counted, "explicit", H200, question(rows, reach=30.0))
        assert (found.exact is not None) is exact
        assert found.damaged <= 20
        assert counted.statements <= (5 if exact else 120)
        assert counted.rows <= (5 if exact else 120 + 4 * near.LEAF)
        assert {plan for plan in counted.plans if plan.startswith("SCAN")} <= {"SCAN found", "SCAN CONSTANT ROW"}
        assert not [plan for plan in counted.plans if "TEMP B-TREE" in plan]


def test_a_registry_without_positions_gets_them_from_a_writer(target: str) -> None:
    kept = _without_positions(target)
    with Registry.open(target) as reader:
        assert reader.verdicts() == kept
    table = serving.read(H200.name, H200.arch, H200.sm_count, target)
    assert len([each for each in table.verdicts(OP) if each.layer == "explicit"]) == len(kept)
    with Registry.open(target, write=True) as upgraded:
        assert upgraded.verdicts() == kept
        assert ask(upgraded, question(100, 9)) == (None, [64, 512])


def _without_positions(target: str) -> list[Verdict]:
    """A registry of the schema before: three verdicts, of which two may be served."""
    made = [verdict(problem=problem(64)), verdict(problem=problem(512)), verdict(problem=problem(99), trusted=False)]
    with Registry.open(target, write=True) as registry:
        registry.merge(verdicts=made)
    parsed = Target.parse(target)
    with make_engine(parsed, write=True).begin() as connection:
        connection.execute(text("DROP TABLE position"))
        connection.execute(text("ALTER TABLE revocation DROP COLUMN made"))
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0003'"))
        if parsed.path is not None:
            connection.exec_driver_sql("PRAGMA user_version=3")
    if parsed.path is not None:
        with sqlite3.connect(parsed.path) as database:
            assert database.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    return sorted(made, key=lambda each: each.problem)
