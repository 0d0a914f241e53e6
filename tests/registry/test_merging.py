"""Merging: what is left does not depend on the order, and any number of records goes through a few in memory."""

from __future__ import annotations

import io
import itertools
import random
import tracemalloc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from registry_samples import (
    A100,
    H200,
    START,
    evidenced,
    predicted,
    problem,
    revocation,
    seal,
    signed,
    trial,
    verdict,
)

from tilebook.registry import (
    Finalist,
    Registry,
    RegistryError,
    Revocation,
    Speedup,
    Trial,
    Verdict,
    export,
    load,
    reading,
)
from tilebook.registry import lines as exchange_lines
from tilebook.registry import merging as merging_module
from tilebook.registry.exchange import import_rule
from tilebook.registry.sql import Sql
from tilebook.registry.texts import Written

Held = tuple[list[Trial], list[Verdict], list[Revocation]]


def claim(dice: random.Random, device: Any = None) -> Verdict:
    """A verdict on one of few keys, which differs from others on it in little."""
    changes: dict[str, Any] = {
        "problem": problem(dice.randrange(3)),
        "device": device or dice.choice([H200, A100]),
        "origin": dice.choice(["local", "imported", "shipped"]),
        "trusted": dice.random() < 0.5,
        "created_at": START + timedelta(days=dice.randrange(2)),
        "notes": {"tried": dice.randrange(2)},
    }
    if dice.random() < 0.3:
        del changes["notes"]
        return predicted(**changes, config={"n": dice.randrange(2)})
    samples = (0.1,) * dice.randrange(1, 3)
    low = dice.choice([1.0, 1.1])
    return verdict(
        **changes, interval=Speedup(1.2, low, 1.3), finalists=(Finalist("triton", {"n": 1}, 0.1, samples_ms=samples),)
    )


def held(dice: random.Random) -> Held:
    """What a registry may hold: one verdict on each key, one revocation of each scope."""
    verdicts = {each.place: each for each in (claim(dice) for _ in range(dice.randrange(1, 6)))}
    reasons = [
        revocation(
            arch=dice.choice(["sm_80", "sm_90"]),
            reason=dice.choice("ab"),
            trusted=dice.random() < 0.5,
            origin=dice.choice(["local", "imported"]),
            created_at=START + timedelta(days=dice.randrange(2)),
        )
        for _ in range(dice.randrange(3))
    ]
    trials = [trial(dice.randrange(4)) for _ in range(dice.randrange(3))]
    return trials, list(verdicts.values()), list({each.scope: each for each in reasons}.values())


def merged(first: Iterable[Verdict], second: Iterable[Verdict]) -> dict[tuple[object, ...], Verdict]:
    """By the rule alone: the second's verdicts into the first's."""
    left = {each.place: each for each in first}
    for each in second:
        if each.place not in left or import_rule(left[each.place], each).replace:
            left[each.place] = each
    return left


def test_the_rule_is_commutative_associative_and_idempotent() -> None:
    for seed in range(300):
        dice = random.Random(seed)
        one, two, three = (held(dice)[1] for _ in range(3))
        assert merged(one, two) == merged(two, one), seed
        left = merged(merged(one, two).values(), three)
        assert left == merged(one, merged(two, three).values()), seed
        assert merged(left.values(), left.values()) == left, seed


def test_of_any_two_that_differ_exactly_one_stands() -> None:
    dice = random.Random(1)
    claims = {each.sha256: each for each in (claim(dice, H200) for _ in range(60))}.values()
    for one, other in itertools.permutations(claims, 2):
        assert import_rule(one, other).replace is not import_rule(other, one).replace
        assert import_rule(one, other).why == import_rule(other, one).why


def registry_of(path: Path, parts: Sequence[Held]) -> tuple[Any, ...]:
    """All that is left of registries that were merged in this order."""
    with Registry.open(path, write=True) as registry:
        for part in parts:
            registry.merge(*part, rule=import_rule)
        stream = io.StringIO()
        export(registry, stream)
        return registry.verdicts(), registry.revocations(), stream.getvalue()


@pytest.mark.parametrize("seed", range(6))
def test_registries_merge_alike_in_any_order(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    parts = [held(dice) for _ in range(3)]
    orders = itertools.permutations(parts)
    left = [registry_of(tmp_path / f"{number}.db", order) for number, order in enumerate(orders)]
    assert all(each == left[0] for each in left)


@pytest.mark.parametrize("seed", range(3))
def test_exports_merge_alike_in_any_order_and_any_grouping(tmp_path: Path, seed: int) -> None:
    dice, numbers = random.Random(seed), itertools.count()
    texts = [registry_of(tmp_path / f"{next(numbers)}.db", [held(dice)])[2] for _ in range(3)]

    def together(*some: str) -> str:
        with Registry.open(tmp_path / f"{next(numbers)}.db", write=True) as registry:
            for each in some:
                load(registry, io.StringIO(each), allowed=None, trust=True)
            stream = io.StringIO()
            export(registry, stream)
            return stream.getvalue()

    whole = together(*texts)
    assert all(together(*order) == whole for order in itertools.permutations(texts))
    assert reduce(together, texts) == together(texts[0], together(*texts[1:])) == whole
    assert together(whole, whole) == whole


# Any number of records


def many(count: int) -> Iterator[str]:
    """Sealed lines of verdicts that come in no order."""
    for number in range(count):
        yield Written(evidenced(problem=problem(number * 7919 % count + 1))).line.rstrip("\n")


def test_what_was_exported_imports_back_and_exports_the_same(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging_module, "BATCH", 50)
    monkeypatch.setattr(reading, "BATCH", 50)
    count = 157
    text = signed(*many(count), *({"type": "trial", **trial(n).content()} for n in range(600)))
    report = load(registry, io.StringIO(text), allowed=None)
    assert (report.verdicts, report.trials, report.unchanged) == (count, 600, 0)
    first = io.StringIO()
    assert export(registry, first) == count + 600
    with Registry.open(tmp_path / "second.db", write=True) as second:
        load(second, io.StringIO(first.getvalue()), allowed=None)
        again = io.StringIO()
        export(second, again)
        assert again.getvalue() == first.getvalue()
        report = load(second, io.StringIO(first.getvalue()), allowed=None)
        assert (report.verdicts, report.trials, report.unchanged) == (0, 0, count + 600)


def test_an_import_that_fails_in_the_middle_stores_nothing(registry: Registry) -> None:
    registry.record([trial(1)], verdict())
    before = registry.trials(), registry.verdicts()
    bad = seal({"type": "verdict", **verdict().portable(), "mode": "warp"})
    with pytest.raises(RegistryError, match="line 302 of the import"):
        load(registry, io.StringIO(signed(*many(300), bad)), allowed=None)
    with pytest.raises(RegistryError, match="promised 301 records"):
        load(registry, io.StringIO(signed(*many(300), records=301)), allowed=None)
    assert (registry.trials(), registry.verdicts()) == before


def test_of_a_key_that_comes_twice_in_a_file_the_stronger_is_left(registry: Registry) -> None:
    weak, strong = evidenced(interval=Speedup(1.1, 1.0, 1.2)), evidenced(interval=Speedup(1.1, 1.09, 1.11))
    lines = [Written(each).line.rstrip("\n") for each in (strong, weak, strong)]
    report = load(registry, io.StringIO(signed(*lines)), allowed=None, trust=True)
    assert registry.verdicts() == [replace(strong, origin="imported")]
    assert (report.verdicts, len(report.skipped), report.unchanged) == (1, 1, 1)


def test_a_report_does_not_grow_with_the_file(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging_module, "MOST_LINES", 5)
    report = load(registry, io.StringIO(signed(*many(40))), allowed={})
    assert len(report.skipped) == 6
    assert report.skipped[-1] == "and more that are not shown"
    report = load(registry, io.StringIO(signed(*many(40))), allowed=None)
    assert len(list(report.accepted)) == 40
    assert len({id(each) for each in report.accepted}) == 1


def test_few_records_are_in_memory_at_once(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging_module, "BATCH", 16)
    monkeypatch.setattr(reading, "BATCH", 16)
    alive: weakref.WeakSet[Written] = weakref.WeakSet()
    most = 0

    def seen(records: Iterable[Written]) -> Iterator[Written]:
        nonlocal most
        for each in records:
            alive.add(each)
            most = max(most, len(alive))
            yield each

    registry.pour(seen(Written(verdict(problem=problem(number))) for number in range(200)))
    assert len(registry.verdicts()) == 200
    for _ in seen(registry.each_verdict()):
        pass
    assert most <= 34


def test_an_export_is_not_in_memory_as_a_whole(tmp_path: Path) -> None:
    line = "x" * 100_000 + "\n"
    some = (line + "y" * number for number in range(200))
    tracemalloc.start()
    with (tmp_path / "out.jsonl").open("w") as stream:
        assert exchange_lines.gathered((), some, ()).write(stream) == 200
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out.jsonl").stat().st_size > 20_000_000
    assert most < 8_000_000


class Counted:
    """Counts the statements, and the rows that come back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.statements = self.rows = 0
        ask, insert, run = Sql.rows, Sql.insert, Sql.run

        def rows(sql: Sql, *arguments: Any) -> Any:
            found = ask(sql, *arguments)
            self.statements, self.rows = self.statements + 1, self.rows + len(found)
            return found

        def counted(call: Any) -> Any:
            def wrapped(*arguments: Any, **named: Any) -> None:
                self.statements += 1
                call(*arguments, **named)

            return wrapped

        monkeypatch.setattr(Sql, "rows", rows)
        monkeypatch.setattr(Sql, "insert", counted(insert))
        monkeypatch.setattr(Sql, "run", counted(run))


def test_statements_are_issued_for_batches_of_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 4 * merging_module.BATCH
    counted = Counted(monkeypatch)
    with Registry.open(tmp_path / "r.db", write=True) as registry:
        registry.merge(verdicts=[verdict(problem=problem(number)) for number in range(count)])
        assert counted.statements <= 20 * count / merging_module.BATCH
        counted.statements = 0
        export(registry, io.StringIO())
        assert counted.statements <= 4 * count / reading.BATCH + 4


def test_one_gpus_verdicts_are_read_without_the_others(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = [verdict(problem=problem(number), device=A100) for number in range(300)]
    mine = [verdict(problem=problem(number)) for number in range(10)]
    registry.merge(verdicts=[*theirs, *mine, verdict(op="mlp_fwd")])
    counted = Counted(monkeypatch)
    assert registry.verdicts(op="rms_norm_fwd", gpu="h200") == sorted(mine, key=lambda each: each.place)
    assert counted.rows <= 2 * len(mine) + 5
    assert len(registry.verdicts(gpu="nvidia")) == 311
    assert registry.verdicts(gpu="unheard of") == []
