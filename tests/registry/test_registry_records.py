from __future__ import annotations

import pickle
from datetime import datetime
from typing import Any

import pytest
from registry_samples import H200, broken_trial, problem, revocation, trial, verdict

from tilebook.registry import Environment, Miss, canonical
from tilebook.registry.checks import in_range


class Opaque:
    """Nothing that JSON knows; its text is the same in every process, as the ids of parallel tests must be."""

    def __repr__(self) -> str:
        return "Opaque()"


def test_canonical_is_one_text_for_one_value() -> None:
    assert canonical({"b": [1, 2.0, True], "a": "ü"}) == '{"a":"\\u00fc","b":[1,2.0,true]}'
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical(float("nan"))


@pytest.mark.parametrize(
    "changes",
    [
        {"problem": '{"b":1, "a":2}'},
        {"created_at": datetime(2026, 1, 1)},
        {"time_ms": float("nan")},
        {"samples_ms": (float("inf"),)},
        {"facts": {"x": float("nan")}},
        {"facts": {"x": Opaque()}},
        {"config": {"ir_override": "x"}},
        {"config": {"num_warps": 4.0}},
        {"config": {"path": "/etc/passwd"}},
        {"kernel": "not hex"},
        {"status": "failed"},
        {"failure": "slow"},
        {"device": "NVIDIA H200"},
    ],
    ids=str,
)
def test_what_cannot_be_stored_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes)).removesuffix("s_ms")):
        trial(**changes)


def test_ugly_text_is_made_printable_and_cut_in_the_middle() -> None:
    assert broken_trial().reason == "line 1\n\tü \ufffd\ufffd[31mred"
    long = trial(facts={"stderr": "a" * 9000 + "end"}).facts["stderr"]
    assert isinstance(long, str)
    assert len(long) <= 4000
    assert (long[:3], long[-3:]) == ("aaa", "end")


def test_a_record_is_unaffected_by_later_changes_to_what_it_was_made_of() -> None:
    facts: dict[str, Any] = {"tuple": (1, 2)}
    record = trial(facts=facts)
    facts["more"] = 1
    assert record.facts == {"tuple": [1, 2]}


def test_records_travel_between_processes() -> None:
    for record in (trial(), verdict(), revocation(), H200, Miss("op", problem(), H200, 1, 0.5)):
        assert pickle.loads(pickle.dumps(record)) == record


def test_an_environment_is_its_versions_in_any_order() -> None:
    one, two = Environment({"a": "1", "b": "2"}), Environment({"b": "2", "a": "1"})
    assert one == two
    assert one.digest == two.digest
    assert len({one, two}) == 1
    assert one.digest != Environment({"a": "1"}).digest


def test_the_digest_covers_every_field() -> None:
    base = trial().sha256
    changed = [trial(config={}), trial(reason="x"), trial(facts={}), trial(kernel="0" * 8), trial(implementation="x")]
    assert len({base, *(record.sha256 for record in changed)}) == 6
    assert verdict(trusted=False).sha256 != verdict().sha256
    assert verdict(trusted=False).portable() == verdict().portable()


@pytest.mark.parametrize(
    "changes",
    [
        {"reason": " \n"},
        {"implementation": "torch"},
        {"kernel": "current"},
        {"arch": "sm 90"},
        {"triton": ""},
        {"triton": "3.6"},
        {"triton": "~=3.6"},
        {"triton": ">=3.7,<3.6"},
        {"triton": ">3.6,<3.6.0"},
        {"config": {"ir_override": "x"}},
        {"trusted": 1},
    ],
    ids=str,
)
def test_a_revocation_that_means_nothing_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"reason|torch|kernel|arch|triton|config|trusted"):
        revocation(**changes)


def test_a_scope_is_what_is_revoked_not_why_or_by_whom() -> None:
    same = [revocation(reason="x"), revocation(origin="imported", trusted=False), revocation(triton="<3.7 , >= 3.6")]
    assert {each.scope for each in same} == {revocation().scope}
    other = [revocation(kernel=None), revocation(arch=None), revocation(triton=None), revocation(config={})]
    assert len({each.scope for each in [*same, *other]}) == 5


@pytest.mark.parametrize(
    ("version", "bounds", "inside"),
    [
        ("3.6.0", ">=3.6,<3.7", True),
        ("3.6", ">=3.6.0", True),
        ("3.7.0", "<3.7,>=3.6", False),
        ("3.10.0", "<3.9", False),
        ("3.10.0", ">3.9", True),
        ("3.6.0+git1a2b3c", "==3.6", True),
        ("3.6.1", "==3.6", False),
        ("3.6.1", ">3.6", True),
        ("3.7.0rc1", "<3.7", False),
        ("unknown", "==3.6", True),
        ("", "<1", True),
    ],
)
def test_a_version_is_compared_by_its_release_number(version: str, bounds: str, inside: bool) -> None:
    assert in_range(version, bounds) is inside
