"""Lines that are put together from columns are those of records, and no others."""

import json
import random
from pathlib import Path

import pytest
from registry_samples import A100, evidenced, predicted, problem, verdict

import tilebook
from tilebook.registry import Registry, checks, notes, reading, shipped, texts
from tilebook.registry.checks import MAX_SAMPLES
from tilebook.registry.notes import are_notes
from tilebook.registry.quick import Line, quick
from tilebook.registry.quick import _again as quick_again
from tilebook.registry.quick import _samples as quick_samples
from tilebook.registry.quick import _short_samples as short_samples
from tilebook.registry.texts import Written
from tilebook.registry.wanted import Wanted

SHIPPED = Path(tilebook.__file__).parent / "shipped"


def rows(registry):
    """The columns of the only verdict."""
    with registry.transaction() as sql:
        (row,) = sql.among(reading._VERDICTS, [1])
        return list(row), sorted(map(list, sql.among(reading._FINALISTS, [1])), key=lambda each: each[1])


def test_lines_are_those_of_the_records_and_all_are_quick(registry, monkeypatch):
    found = [each for op in ("rms_norm_fwd", "mlp_up_fwd") for each in shipped.read(SHIPPED, op)[0][:40]]
    found += [evidenced(), predicted(problem=problem(7)), verdict(device=A100, trusted=False, origin="imported")]
    registry.merge(verdicts=found)
    monkeypatch.setattr(reading, "_verdict", lambda *row: pytest.fail("read whole"))
    lines = list(registry.each_line())
    monkeypatch.undo()
    assert lines == [Line.of(each) for each in registry.each_verdict()]
    assert sorted(line.text for line in lines) == sorted(Written(each).line for each in found)
    assert [each.op for each in registry.each_line(Wanted(gpu="a100"))] == ["rms_norm_fwd"]
    assert registry.corrupt == 0


def digests_fit(monkeypatch, row):
    monkeypatch.setattr(texts.Text, "sha256", lambda self, origin, trusted: row[1])
    monkeypatch.setattr(texts, "served_of", lambda *_: row[2])


# The columns of `reading`'s statements; of finalists the first.
BAD = {
    "op": (3, ["mlp_fwd", "a b", None, 3]),
    "problem": (4, ["{}x", '{"b":1,"a":2}', "[1]", None]),
    "device": (5, ["", "a\nb", None]),
    "sm_count": (7, [0, 1.0, None]),
    "environment": (8, ['{"a": "b"}', '{"a":1}', "[]", "{", None]),
    "kernel": (10, ["xyz", "", None]),
    "status": (11, ["predicted", "new", None]),
    "mode": (12, ["fast", None]),
    "default_time_ms": (13, [None, -1.0, 0.0, float("inf"), "1", 1]),
    "interval": (15, [None, 2.0, "1", -1.0]),
    "sources": (17, ['{"a b":"c"}', '{"a":1}', "[]", "{} "]),
    "origin": (18, ["a b", "", None]),
    "trusted": (19, [2, None, "1"]),
    "created_at": (20, ["2026-11-21", None, "2026-11-21T12:00:00.000000+01:00"]),
    "notes": (
        21,
        ['{"tried":"many"}', '{"a":1e999}', '{"a": 1}', "[]", '{"\\n":1}', "[" * 5000, '{"made":{"who":""}}'],
    ),
}
BAD_FINALIST = {
    "place": (1, [1, None]),
    "implementation": (2, ["a b", None]),
    "config": (3, ['{"ir_override":1}', '{"A": 1}', '{"A":1.5}', "[]", None]),
    "time_ms": (4, [None, 0.0, -1.0, float("nan"), "1"]),
    "code": (5, ["xyz", None, 5]),
    "predicted_ms": (6, [-1.0, "1"]),
    "default": (7, [1, 2, None]),
    "speedup": (8, [None, -1.0, "1"]),
    "samples_ms": (11, ["[1]", "[0.10]", "[-1.0]", '["1"]', "{}", "[1e999]", "[" * 5000, None]),
    "again": (12, ["{}", "1", " null", None]),
}


@pytest.mark.parametrize(
    ("table", "place", "value"),
    [(0, place, value) for place, values in BAD.values() for value in values]
    + [(1, place, value) for place, values in BAD_FINALIST.values() for value in values],
)
def test_what_no_record_would_hold_is_never_quick_even_where_its_digest_fits(
    table, place, value, tmp_path, monkeypatch
):
    with Registry.open(tmp_path / "registry.db", write=True) as registry:
        registry.record(verdict=evidenced())
        row, finalists = rows(registry)
    digests_fit(monkeypatch, row)
    assert quick(row, finalists) is not None
    if table == 0:
        row[place] = value
    else:
        finalists[0][place] = value
    assert quick(row, finalists) is None


def test_finalists_that_no_verdict_would_have_are_not_quick(tmp_path, monkeypatch):
    with Registry.open(tmp_path / "registry.db", write=True) as registry:
        registry.record(verdict=evidenced())
        row, finalists = rows(registry)
    digests_fit(monkeypatch, row)
    first, second, third = finalists
    alike = [*second[:1], 2, *second[2:]]
    for wrong in ([], [first, third], [first, [*third[:1], 1, *third[2:]], [*second[:1], 2, *second[2:]]]):
        assert quick(row, wrong) is None
    assert quick(row, [first, second, alike]) is None
    assert quick(row, [first, second, [*third[:4], 0.2, *third[5:]]]) is None


@pytest.mark.parametrize(
    "damage",
    [
        f"verdict SET notes = '{json.dumps({'tried': 8})}'",
        "verdict SET served = '00'",
        "finalist SET place = 'x' WHERE place = 1",
    ],
)
def test_a_damaged_row_is_counted_as_by_any_reader(damage, tmp_path):
    with Registry.open(tmp_path / "registry.db", write=True) as registry:
        registry.record(verdict=evidenced())
        with registry.transaction() as sql:
            sql.run(f"UPDATE {damage}")
    for read in (Registry.each_line, Registry.each_verdict):
        with Registry.open(tmp_path / "registry.db") as registry:
            assert list(read(registry)) == []
            assert (registry.corrupt, len(registry.problems)) == (1, 1)


SHORT = [0.040924, 1.0, 0.0001, 1234567.5, 0.123456789012345, 7654321.12345678, 10.0, 1200.25]
LONG = ["1e-05", "0.00005", "0.10", "1.50", "01.5", "1", "1.", ".5", "0.0", "-0.5", "0.1234567890123456", "1e5", "٣.5"]


def test_short_numbers_are_known_without_being_read_and_are_those_that_would_be_written():
    draw = random.Random(0)
    drawn = [round(draw.uniform(0.0001, 10 ** draw.randrange(-3, 7)), draw.randrange(1, 9)) for _ in range(3_000)]
    for value in [*SHORT, *filter(None, drawn)]:
        assert bool(short_samples(f"[{value!r}]")) == ("e" not in repr(value)), value
    for text in LONG:
        assert not short_samples(f"[0.5,{text},0.25]")
    for digits in range(1, 18):  # what it lets pass is written so
        for _ in range(300):
            text = f"[{draw.randrange(10 ** draw.randrange(1, 9))}.{draw.randrange(10**digits)}]"
            assert not short_samples(text) or texts.numbers(json.loads(text)) == text


def test_short_samples_are_no_more_than_a_record_may_hold():
    assert quick_samples(f"[{','.join(['0.5'] * MAX_SAMPLES)}]")
    assert not quick_samples(f"[{','.join(['0.5'] * (MAX_SAMPLES + 1))}]")


def test_a_short_second_contest_is_looked_at_as_a_long_one():
    def second(speedup):
        return f'{{"default_samples_ms":[0.5],"samples_ms":[0.25,0.5],"speedup":{speedup}}}'

    assert quick_again(second("[1.5,1.25,1.75]")) == second("[1.5,1.25,1.75]")
    with pytest.raises(ValueError, match="upside down"):
        quick_again(second("[1.5,1.75,1.25]"))


NOTES = [
    '{}', '{"a":1,"b":[1,2.5,true,null,{"c":"d e"}]}', f'{{"a":{"[" * 11}1{"]" * 11}}}', '{"a":[[],{}],"b":{"c":{}}}',
]  # fmt: skip
NO_PLAIN_NOTES = [
    "[1]", '{"a":""}', '{"":1}', '{"a":"\\n"}', '{"a":"' + 129 * "x" + '"}', '{"' + 129 * "x" + '":"b"}',
    '{"a":1234567890123456789}',
    f'{{"a":{"[" * 12}1{"]" * 12}}}', f'{{"a":{12 * "["}"]]","[["{12 * "]"}}}',
]  # fmt: skip


def test_plain_notes_are_those_that_looking_at_each_value_would_leave_as_they_are():
    for text in NOTES:
        assert notes._is_plain(text)
        assert checks.plain_object(json.loads(text), "notes") == json.loads(text)
        assert are_notes(text)
    for text in NO_PLAIN_NOTES[1:]:
        assert not notes._is_plain(text)
    for text in ("[1]", *NO_PLAIN_NOTES[-2:], '{"":1}', '{"' + 129 * "x" + '":"b"}'):
        with pytest.raises(ValueError, match="notes"):
            are_notes(text)
    for text in ('{"a": 1}', '{"b":1,"a":2}', '{"a":1,"a":1}', '{"a":1e2}', '{"a":"é"}', '{"a":-0}', '{"a":"\x7f"}'):
        assert not are_notes(text)
    assert are_notes('{"a":"\\n"}')
