"""A line that is cut into columns says what the whole way says of it, and nothing is let in that this refuses."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from registry_samples import A100, evidenced, predicted, problem, seal, verdict

import tilebook
from tilebook.errors import RegistryError
from tilebook.registry import Environment, Finalist, Speedup, lines, served
from tilebook.registry.cut import cut
from tilebook.registry.texts import VERDICT, Written, columns, values

SHIPPED = sorted((Path(tilebook.__file__).parent / "shipped").glob("*/*.jsonl"))
ODD = verdict(
    problem=json.dumps({"note": 'a "quoted" \\ text, "op":"x" }] é'}, sort_keys=True, separators=(",", ":")),
    device=type(A100)('A "GPU" \\ of é', "sm_90", 7),
    notes={"text": 'ü,"op":"rms_norm_fwd","problem":"{}"', "list": [1, None, True, -2.5e-7, {"a": {}}]},
)
PLAIN = [evidenced(), predicted(), verdict(device=A100, problem=problem(7)), evidenced(sources={}, notes={}), ODD]


def whole(line: str) -> Written | None:
    """The record that every field of the line makes; None where there is none."""
    try:
        found = lines.whole(2, line, 3, "imported", True)
    except RegistryError:
        return None
    return found if isinstance(found, Written) else None


def same(one: Written, other: Written) -> bool:
    return (
        (one.verdict, one.line, one.sha256, one.served, one.told, list(map(list, one.finalists)))
        == (other.verdict, other.line, other.sha256, other.served, other.told, list(map(list, other.finalists)))
        and values(one) == values(other)
        and one.served == served.digest(other.verdict)
    )


@pytest.mark.parametrize("number", range(len(PLAIN)))
def test_what_is_written_is_cut_and_is_the_same_record(number: int) -> None:
    line = Written(PLAIN[number]).line
    found, wanted = cut(line, "imported", True), whole(line)
    assert wanted is not None
    assert found is not None
    assert same(found, wanted)
    assert dict(zip(VERDICT, values(found), strict=True)).keys() == columns(found).keys()


def test_all_that_ships_is_cut() -> None:
    for file in SHIPPED:
        with file.open(encoding="utf-8", newline="\n") as stream:
            for line in list(stream)[1:6]:
                found, wanted = cut(line, "shipped", True), whole(line)
                if '"type":"verdict"' in line:
                    assert found is not None
                    assert wanted is not None
                    assert found.verdict == lines.whole(2, line, 3, "shipped", True).verdict  # type: ignore[union-attr]


def test_texts_of_a_record_that_need_care_are_left_to_the_whole_way() -> None:
    odd = verdict(environment=Environment({"torch": "a } b"}))
    assert cut(Written(odd).line, "imported", True) is None
    assert whole(Written(odd).line) is not None


PARTS = [
    '"', "\\", "{", "}", "[", "]", ",", ":", "null", "true", "0", "1", "-1.0", "1.0", "1e999", "NaN", "0.10", "1_0.0",
    " ", "\n", '""', '"op":"x",', ',"op":"', '"problem":"{}",', '},{"again":', '],"interval":', "é", "\x00", "ab" * 32,
    "predicted", "default", "eager", '"ir_override":1',
]  # fmt: skip
WORD = re.compile(r"[A-Za-z0-9_.-]+")
WORDS = ["0.2", "1.1", "7", "true", "null", "predicted", "default", "eager", "x", "a.b", "ab" * 8, "torch", "-1"]


def changed(line: str, dice: random.Random) -> str:
    """The line with words of it exchanged, or with pieces in other places."""
    for _ in range(dice.randrange(1, 4)):
        if dice.random() < 0.7:
            word = dice.choice(list(WORD.finditer(line)))
            start, end = word.span()
            piece = dice.choice([*WORDS, dice.choice(WORD.findall(line))])
        else:
            start = dice.randrange(len(line) - 1)
            end = start + dice.choice([0, 1, 1, 2, 5, 30])
            piece = dice.choice(PARTS) if dice.random() < 0.7 else line[(at := dice.randrange(len(line))) : at + 20]
        line = line[:start] + piece + line[end:]
    return line


def line_of(told: dict[str, Any]) -> str:
    """A record's line in its normal form, with the digest of what it says."""
    fresh = {name: value for name, value in told.items() if name != "sha256"}
    return json.dumps(seal(fresh), sort_keys=True, separators=(",", ":")) + "\n"


def sealed(line: str) -> str:
    """The line with the digest of what it says, where it says anything."""
    try:
        told = json.loads(line)
        return line_of(told) if isinstance(told, dict) else line
    except ValueError:
        return line


@pytest.mark.parametrize("seed", range(4))
def test_what_is_cut_of_a_changed_line_is_what_the_whole_way_makes_of_it(seed: int) -> None:
    dice, let_in = random.Random(seed), set()
    originals = [Written(each).line for each in PLAIN]
    for _ in range(400):
        line = changed(dice.choice(originals), dice)
        for each in {line, sealed(line)}:
            if (found := cut(each, "imported", True)) is not None:
                let_in.add(each)
                wanted = whole(each)
                assert wanted is not None, each
                assert same(found, wanted), each
    assert len(let_in - set(originals)) > 10


FIELDS = {
    "created_at": ["2026-11-21", "2026-13-21T12:00:00.000000+00:00", "2026-11-21T12:00:00.123456+01:00", 5, None],
    "default_time_ms": [None, -1.0, 0.0, 1, "1", True],
    "device": [None, {}, {"arch": "sm_90", "name": "", "sm_count": 1}, {"arch": "a b", "name": "x", "sm_count": 1}],
    "environment": [None, [], {"a b": "c"}, {"a": 1}, {"a": "b\n"}],
    "interval": [None, [1.0, 2.0], [1.0, 2.0, 1.0], [1, 1, 1], "1"],
    "kernel": ["xyz", "", "AB" * 8, 5],
    "mode": ["fast", "", None],
    "notes": [[], {"tried": "many"}, {"tried": -1}, {"made": {"who": ""}}, {"a": "x" * 5000}, {"\n": 1}, {"a": 2**70}],
    "op": ["a b", "", "mlp_fwd\n", 5],
    "problem": ["{}x", '{"b":1,"a":2}', "[1]", "", {}],
    "sources": [[], {"a b": "c"}, {"a": 1}, {"a": "\n"}],
    "status": ["new", "predicted", "", None],
}
FINALIST = {
    "again": [{}, [], {"speedup": None, "samples_ms": [], "default_samples_ms": []}, 1],
    "code": ["xyz", None, 5, "AB" * 32],
    "config": [{"ir_override": 1}, {"A": 1.5}, {"A": None}, {"A": 2**40}, {"a b": 1}, [], None],
    "default": [1, 0, None, "true"],
    "implementation": ["a b", "", None, 'a"b'],
    "predicted_ms": [-1.0, 0.0, "1", 1],
    "samples_ms": [None, [1], [-1.0], ["1"], {}, [0.1] * 10_001, [True]],
    "speedup": [[1.0], [2.0, 3.0, 1.0], [-1.0, 1.0, 1.0], 5, [1, 1.0, 1.0]],
    "time_ms": [None, 0.0, -1.0, "1", 1],
}


@pytest.mark.parametrize("name", [*FIELDS, *(f"finalist {name}" for name in FINALIST)])
def test_a_value_that_no_record_holds_is_refused_even_where_every_digest_fits(name: str) -> None:
    for value in FIELDS.get(name) or FINALIST[name.removeprefix("finalist ")]:
        told = json.loads(Written(evidenced()).line)
        if name in FIELDS:
            told[name] = value
        else:
            told["finalists"][0][name.removeprefix("finalist ")] = value
        line = line_of(told)
        assert cut(line, "imported", True) is None
        assert whole(line) is None or name in ("finalist default", "finalist time_ms"), (name, value)


def test_a_wrong_digest_is_refused() -> None:
    line = Written(evidenced()).line
    told = json.loads(line)
    wrong = line.replace(told["sha256"], "0" * 64)
    assert wrong != line
    assert cut(wrong, "imported", True) is None
    with pytest.raises(RegistryError, match="digest is wrong"):
        lines.whole(2, wrong, 3, "imported", True)


def test_finalists_that_no_verdict_has_are_refused() -> None:
    speedup = Speedup(1.0, 1.0, 1.0)
    told = json.loads(Written(evidenced()).line)
    first, second, third = told["finalists"]
    assert (Finalist.of(third).default, speedup.content()) == (True, third["speedup"])
    wrongs = [[], [first, first], [first, third, second], [first, third, {**third, "config": {"BLOCK_M": 1}}]]
    for wrong in wrongs:
        line = line_of({**told, "finalists": wrong})
        assert cut(line, "imported", True) is None
        assert whole(line) is None


def test_a_line_of_nothing_but_beginnings_takes_no_longer_than_its_length() -> None:
    """No pattern goes over a piece of a line again and again."""
    line = Written(evidenced()).line
    for piece in ('{"again":null,', '"op":"a",', "\\\\", '\\"', "[", "{", ',"op":"'):
        assert cut(line[: len(line) // 2] + piece * 200_000 + line[len(line) // 2 :], "imported", True) is None
        assert cut(line.replace('"problem":"', '"problem":"' + piece * 200_000), "imported", True) is None
