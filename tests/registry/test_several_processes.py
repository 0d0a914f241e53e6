"""Large exports and imports, which several processes read: what comes of them is what one alone makes of them."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from registry_samples import (
    A100,
    START,
    a_revocation,
    a_trial,
    a_verdict,
    broken_trial,
    evidenced,
    execute,
    predicted,
    problem,
    revocation,
    signed,
    trial,
    verdict,
)

from tilebook.errors import RegistryError
from tilebook.registry import Registry, export, incoming, load, outgoing, workers
from tilebook.registry.exchange import gathered
from tilebook.registry.filereader import FileReader
from tilebook.registry.filewriter import FileWriter
from tilebook.registry.selection import Selection

ALLOWED = {"rms_norm_fwd": {"triton": frozenset({"BLOCK_M", "num_warps", "use_tma", "order"})}}
TEXT = signed(*(a_verdict(problem=problem(rows)) for rows in range(40)))


class Helped:
    """How many chunks others have done, and how many were left to this process."""

    def __init__(self, mapped: Callable[..., Iterator[tuple[Any, Any]]]) -> None:
        self.done = self.left = 0
        self.between: Callable[[], object] = lambda: None
        self._mapped = mapped

    def __call__(self, *given: Any) -> Iterator[tuple[Any, Any]]:
        for chunk, found in self._mapped(*given):
            self.done += found is not None
            self.left += found is None
            self.between()
            yield chunk, found


@pytest.fixture
def helped(monkeypatch: pytest.MonkeyPatch) -> Helped:
    """From here on others help, with chunks of a few records."""
    for module, name, value in (
        (incoming, "ALONE", 0),
        (incoming, "_LINES", 4),
        (outgoing, "ALONE", 4),
        (outgoing, "_BATCH", 3),
        (workers, "count", lambda: 2),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(workers, "mapped", found := Helped(workers.mapped))
    return found


def by_itself(do: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is made of it where nobody helps."""
    with monkeypatch.context() as patch:
        patch.setattr(workers, "count", lambda: 0)
        return do()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with records of every kind, some of whose rows are damaged."""
    path = tmp_path_factory.mktemp("full") / "registry.db"
    at = [START + timedelta(hours=hour // 3) for hour in range(24)]  # three trials of each moment
    with Registry.open(path, write=True) as registry:
        tried = [trial(n, problem=problem(n % 5), created_at=each) for n, each in enumerate(at)]
        registry.merge(
            [*tried, broken_trial(), trial(7, device=A100), trial(2, op="mlp_fwd")],
            [
                evidenced(),
                *(predicted(problem=problem(rows), device=A100) for rows in range(200, 206)),
                *(verdict(problem=problem(rows), created_at=START + timedelta(days=rows)) for rows in range(20)),
                *(verdict(problem=problem(rows), trusted=False, origin="imported") for rows in range(30, 35)),
            ],
            [revocation(), revocation(arch=None)],
        )
    execute(
        path,
        "UPDATE verdict SET default_time_ms = default_time_ms * 2 WHERE id IN (3, 9)",
        "UPDATE finalist SET place = 'x' WHERE verdict_id = 12",
        "UPDATE trial SET reason = 'another' WHERE id = 5",
        "DELETE FROM finalist WHERE verdict_id = 15",
    )
    return path


def text_of(path: Path, selection: Selection | None = None) -> tuple[str, list[str]]:
    """The export, and what the reader has found damaged."""
    stream = io.StringIO()
    with FileReader.open(path) as source:
        gathered(source, selection=selection or Selection()).write(stream)
        return stream.getvalue(), source.problems


@pytest.mark.parametrize(
    "selection",
    [
        Selection(),
        Selection("rms_norm_fwd", "h200", "bf16", START + timedelta(hours=2), START + timedelta(days=9), trusted=True),
    ],
    ids=["all", "some"],
)
def test_an_export_has_the_same_bytes_and_says_the_same_of_damage(
    tmp_path: Path, full: Path, helped: Helped, monkeypatch: pytest.MonkeyPatch, selection: Selection
) -> None:
    path = shutil.copy(full, tmp_path / "registry.db")
    expected = by_itself(lambda: text_of(path, selection), monkeypatch)
    assert text_of(path, selection) == expected
    if selection.everything:
        stream = io.StringIO()
        with Registry.open(path) as source:
            export(source, stream)
        assert stream.getvalue() == expected[0]
    assert helped.done > 2
    assert helped.left == 0
    assert "left out 3 damaged rows" in expected[1][0]
    assert "left out 1 damaged rows" in expected[1][1]


def contents(path: Path) -> list[str]:
    with sqlite3.connect(path) as connection:
        return list(connection.iterdump())


def loaded(path: Path, text: str, **options: Any) -> tuple[list[str], Any]:
    """What an import has made of a registry that has something already, and the report; or its refusal."""
    if not path.exists():
        with Registry.open(path, write=True) as registry:
            registry.record([trial()], verdict(problem=problem(3), created_at=START + timedelta(days=9)))
    target = FileWriter.open(path)
    assert target is not None
    try:
        report = load(target, io.StringIO(text, newline="\n"), **{"allowed": ALLOWED, **options})
    except RegistryError as error:
        return contents(path), str(error)
    counts = report.trials, report.verdicts, report.revocations, report.unchanged
    accepted = [each.portable() for each in report.accepted]
    return contents(path), (counts, report.skipped, report.replaced, accepted, report.trusted)


def many_kinds() -> str:
    """A file with all that lines may be: of every kind, twice, in another spelling, of ops that are not known."""
    spelled = json.dumps(json.loads(signed(a_verdict(problem=problem(50))).splitlines()[1]), indent=None)
    return signed(
        a_revocation(),
        *(a_verdict(problem=problem(rows)) for rows in range(12)),
        {"type": "verdict", **evidenced(problem=problem(60)).portable()},
        a_verdict(op="another_fwd", problem=problem(61)),
        spelled,
        a_verdict(problem=problem(3)),
        a_verdict(problem=problem(70), finalists=[{**a_verdict()["finalists"][0], "config": {"unknown": 1}}]),
        *({"type": "trial", **trial(number).content()} for number in range(9)),
        a_trial(config={"unknown": 1}),
        {"type": "trial", **broken_trial().content()},
    )


@pytest.mark.parametrize("options", [{}, {"trust": True, "allowed": None}], ids=["strange", "own"])
def test_an_import_makes_the_same_registry_and_report(
    tmp_path: Path, helped: Helped, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    text = many_kinds()
    expected = by_itself(lambda: loaded(tmp_path / "alone.db", text, **options), monkeypatch)
    assert loaded(tmp_path / "helped.db", text, **options) == expected
    assert (helped.done > 2, helped.left) == (True, 0)
    assert not isinstance(expected[1], str)
    again = by_itself(lambda: loaded(tmp_path / "alone.db", text, **options), monkeypatch)
    assert loaded(tmp_path / "helped.db", text, **options) == again


DEEP = '{"type":"verdict","notes":' + "[" * 100_000 + "]" * 100_000 + "}"
REFUSED = {
    "no JSON": (TEXT.replace('"mode": "graph"', '"mode": ', 1), {}),
    "the first of two": (signed(*[a_verdict(problem=problem(n)) for n in range(9)], "nothing", DEEP), {}),
    "deep": (signed(*[a_verdict(problem=problem(n)) for n in range(9)], DEEP), {}),
    "a wrong digest": (TEXT.replace('"tried": 7', '"tried": 8', 30).replace('"tried": 8', '"tried": 7', 25), {}),
    "fewer than promised": ("\n".join(TEXT.split("\n")[:-5]) + "\n", {}),
    "more than promised": (TEXT + TEXT.split("\n")[-2] + "\n", {}),
    "too large": (TEXT, {"max_total": len(TEXT) * 3 // 4}),
    "too long": (signed(*[a_verdict(problem=problem(n)) for n in range(9)], " " * (2 * 1024 * 1024 + 1)), {}),
    "another digest of all": (signed(*[a_verdict(problem=problem(n)) for n in range(9)], sha256="0" * 64), {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_in_the_same_words_and_changes_nothing(
    tmp_path: Path, helped: Helped, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text, options = REFUSED[name]
    monkeypatch.setattr(workers, "count", lambda: 1)
    expected = by_itself(lambda: loaded(tmp_path / "registry.db", text, **options), monkeypatch)
    before = contents(tmp_path / "registry.db")
    assert isinstance(expected[1], str)
    assert loaded(tmp_path / "registry.db", text, **options) == expected
    assert contents(tmp_path / "registry.db") == before
    assert children() == []


def children() -> list[int]:
    found = []
    for each in Path("/proc/self/task").iterdir():
        found += [int(number) for number in (each / "children").read_text().split()]
    return [number for number in found if b"tilebook.registry.worker" in Path(f"/proc/{number}/cmdline").read_bytes()]


def test_where_a_process_is_killed_this_one_does_the_rest(
    tmp_path: Path, full: Path, helped: Helped, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copy(full, tmp_path / "registry.db")
    expected = by_itself(lambda: text_of(path), monkeypatch)
    imported = by_itself(lambda: loaded(tmp_path / "alone.db", TEXT), monkeypatch)
    helped.between = lambda: [os.kill(number, signal.SIGKILL) for number in children()[:1]]
    assert text_of(path) == expected
    assert loaded(tmp_path / "helped.db", TEXT) == imported
    assert (helped.done > 0, helped.left > 4) == (True, True)
    assert children() == []


@pytest.mark.parametrize("program", ["/nowhere/python", "/bin/cat"])
def test_where_none_can_be_started_this_one_does_all(
    tmp_path: Path, full: Path, helped: Helped, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    path = shutil.copy(full, tmp_path / "registry.db")
    expected = by_itself(lambda: text_of(path), monkeypatch)
    imported = by_itself(lambda: loaded(tmp_path / "alone.db", TEXT), monkeypatch)
    monkeypatch.setattr(sys, "executable", program)
    assert text_of(path) == expected
    assert loaded(tmp_path / "helped.db", TEXT) == imported
    assert helped.done == 0


def test_where_a_writer_waits_for_this_one_no_other_can_begin_to_read(
    tmp_path: Path, full: Path, helped: Helped, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stream = shutil.copy(full, tmp_path / "registry.db"), io.StringIO()
    expected = by_itself(lambda: text_of(path), monkeypatch)

    def write() -> None:
        writer = sqlite3.connect(path, timeout=60, isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM verdict")
        writer.execute("COMMIT")
        writer.close()

    with FileReader.open(path) as source:
        waiting = threading.Thread(target=write)
        waiting.start()
        time.sleep(0.5)  # it holds the lock that keeps others out
        gathered(source).write(stream)
    waiting.join()
    assert stream.getvalue() == expected[0]
    assert (helped.done, helped.left > 4) == (0, True)


def test_another_file_at_the_place_is_not_read(
    tmp_path: Path, full: Path, helped: Helped, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other, stream = shutil.copy(full, tmp_path / "registry.db"), tmp_path / "other.db", io.StringIO()
    expected = by_itself(lambda: text_of(path), monkeypatch)
    with Registry.open(other, write=True) as registry:
        registry.merge([trial(900)], [verdict(problem=problem(900 + n)) for n in range(40)])
    with FileReader.open(path) as source:
        other.replace(path)
        gathered(source).write(stream)
    assert stream.getvalue() == expected[0]
    assert helped.done == 0


def test_a_long_line_stays_here_and_others_take_little_memory(
    tmp_path: Path, helped: Helped, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = '{"type":"trial","facts":[' + ",".join(["{}"] * 120_000) + "]}"
    long = '{"type":"trial","facts":[' + ",".join(["{}"] * 600_000) + "]}"
    peaks = []

    def look() -> None:
        for number in children():
            rows = Path(f"/proc/{number}/status").read_text().splitlines()
            peaks.append(next(int(row.split()[1]) for row in rows if row.startswith("VmHWM")) >> 10)

    helped.between = look
    chunks = [(2, [hostile + "\n"] * 2), (4, [long + "\n"]), (5, [hostile + "\n"] * 2)] * 3
    assert [found for _, found in workers.mapped("records", (3, "imported", False), chunks)] == [
        [None] * 2,
        None,
        [None] * 2,
    ] * 3
    assert 0 < max(peaks) < 100


def test_few_records_start_no_process(tmp_path: Path, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "count", lambda: 2)
    monkeypatch.setattr(workers, "mapped", lambda *given: pytest.fail("others are asked"))
    path = shutil.copy(full, tmp_path / "registry.db")
    text_of(path)
    loaded(tmp_path / "new.db", TEXT)


def test_records_go_to_another_process_and_back() -> None:
    kind = incoming.Kind(3, "imported", True)
    for record in (trial(3), broken_trial(), replace(trial(), facts={"a": [1, 2.5, None, {"b": "ü"}]})):
        line = incoming.record(2, signed({"type": "trial", **record.content()}).splitlines(True)[1], kind)
        (told,) = incoming.packed((2, [signed({"type": "trial", **record.content()}).splitlines(True)[1]]), *kind)
        found = incoming.unpacked(told)
        assert found == line == record
        assert (found.sha256, found.text, found.texts) == (record.sha256, record.text, record.texts)
