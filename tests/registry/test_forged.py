"""Rows that somebody has made up, with digests that fit: what no record holds is passed over by every reader."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from command_samples import Run, today
from registry_samples import H200, predicted

from tilebook.registry import Device, Environment, Registry
from tilebook.registry.filereader import FileReader
from tilebook.registry.overview import _FINALISTS, overviews
from tilebook.registry.reading import _VERDICTS
from tilebook.registry.served import digest_of
from tilebook.registry.serving import Table
from tilebook.registry.texts import Columns, finalist_text, text_of


def forge(path: Path, *statements: str) -> None:
    """Changes verdicts, and makes their digests anew as readers would."""
    with sqlite3.connect(path) as database:
        for statement in statements:
            database.execute(statement)
        for row in database.execute(_VERDICTS.removesuffix("WHERE v.id IN")).fetchall():
            number, _, _, op, problem, name, arch, sm_count, versions, _, kernel, status, mode, ours, *rest = row
            value, low, high, sources, origin, trusted, at, notes = rest
            its = f"{_FINALISTS} WHERE f.verdict_id = ? ORDER BY f.place"
            finalists = database.execute(its, [number]).fetchall()
            device, contest = Device(name, arch, sm_count), (value, low, high)
            columns = [versions, kernel, status, mode, *contest, sources, origin, trusted]
            told = Columns(
                op, problem, device, Environment(json.loads(versions)), kernel, status, mode, ours, contest, sources,
                origin, bool(trusted), at, notes,
            )  # fmt: skip
            text = text_of(told, (finalist_text(each[2:]) for each in finalists))
            database.execute(
                "UPDATE verdict SET served = ?, sha256 = ? WHERE id = ?",
                [
                    digest_of(op, problem, device, columns, [each[2:6] for each in finalists]),
                    text.sha256(origin, bool(trusted)),
                    number,
                ],
            )


def found(path: Path) -> dict[str, int]:
    """How many verdicts each reader sees."""
    with FileReader.open(path) as reading:
        counts = {
            "lines": len(list(reading.each_line())),
            "verdicts": len(reading.verdicts()),
            "overviews": len(overviews(reading)),
        }
    return {**counts, "served": len(Table([("explicit", str(path))], H200).verdicts("rms_norm_fwd"))}


FORGED = {
    "no speed-up": ["UPDATE verdict SET speedup = NULL, speedup_low = NULL, speedup_high = NULL WHERE id = 1"],
    "half an interval": ["UPDATE verdict SET speedup_low = NULL WHERE id = 1"],
    "an interval upside down": ["UPDATE verdict SET speedup_low = 2.0, speedup_high = 1.0 WHERE id = 1"],
    "a winner without a time": ["UPDATE finalist SET time_ms = NULL WHERE verdict_id = 1"],
    "a winner of no time": ["UPDATE finalist SET time_ms = 0.0 WHERE verdict_id = 1"],
    "a time that has no end": ["UPDATE finalist SET time_ms = 9e999 WHERE verdict_id = 1"],
    "a prediction that was measured": ["UPDATE verdict SET status = 'measured' WHERE id = 2"],
    "a measurement that was predicted": ["UPDATE verdict SET status = 'predicted' WHERE id = 1"],
}
FORGED_BESIDE = {
    "no default": ["UPDATE verdict SET default_time_ms = NULL WHERE id = 1"],
    "a default of another time": ["UPDATE finalist SET is_default = 1 WHERE verdict_id = 1"],
    "a default of a prediction": ["UPDATE verdict SET default_time_ms = 1.0 WHERE id = 2"],
    "a flag that is none": ["UPDATE finalist SET is_default = 2 WHERE verdict_id = 1"],
    "a finalist's speed-up that is none": ["UPDATE finalist SET speedup = 'fast' WHERE verdict_id = 1"],
    "a prediction of no time": ["UPDATE finalist SET predicted_ms = 0.0 WHERE verdict_id = 2"],
}


@pytest.mark.parametrize("statements", [*FORGED.values(), *FORGED_BESIDE.values()], ids=[*FORGED, *FORGED_BESIDE])
def test_a_verdict_that_no_tuner_wrote_is_passed_over_by_every_reader(
    run: Run, path: Path, request: pytest.FixtureRequest, statements: list[str]
) -> None:
    with Registry.open(path, write=True) as registry:
        registry.merge(verdicts=[today(), predicted(problem=today("M8,N256").problem, kernel=today().kernel)])
    forge(path)
    assert set(found(path).values()) == {2}
    forge(path, *statements)
    counts = found(path)
    if request.node.callspec.id in FORGED_BESIDE:  # dispatch reads what it serves by, and no more
        counts.pop("served")
    assert set(counts.values()) == {1}, counts
    assert "left out 1 damaged rows" in run("show", "--registry", path).stderr
    assert "1 damaged verdicts" in run("check", "--registry", path, status=1).stdout
    run("check", "--repair", "--registry", path)
    assert set(found(path).values()) == {1}
