from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from drawing import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from registry_samples import (
    A100,
    KERNEL,
    START,
    a_revocation,
    a_trial,
    a_verdict,
    an_old_verdict,
    broken_trial,
    evidenced,
    predicted,
    problem,
    revocation,
    signed,
    trial,
    verdict,
)

from tilebook.registry import (
    Again,
    Finalist,
    Registry,
    Speedup,
    Verdict,
    VerdictStatus,
    export,
    load,
)
from tilebook.registry.exchange import import_rule

ALLOWED = {"rms_norm_fwd": {"triton": frozenset({"BLOCK_M", "num_warps", "use_tma", "order"})}}


@pytest.fixture
def second(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "second.db", write=True) as registry:
        yield registry


def exported(registry: Registry) -> str:
    stream = io.StringIO()
    export(registry, stream)
    return stream.getvalue()


def test_export_import_export_gives_the_same_bytes(registry: Registry, second: Registry) -> None:
    trials = [trial(3), broken_trial(), trial(1, device=A100), trial(2, op="mlp_fwd")]
    registry.merge(trials, [evidenced(), predicted(problem=problem(7)), verdict(device=A100)])
    first = exported(registry)
    report = load(second, io.StringIO(first), allowed=None)
    assert (report.trials, report.verdicts, report.skipped, report.replaced) == (4, 3, [], [])
    assert exported(second) == first
    again = load(second, io.StringIO(first), allowed=None)
    assert (again.trials, again.verdicts, again.unchanged, again.skipped) == (0, 0, 7, [])
    home = load(registry, io.StringIO(first), allowed=None, trust=True)
    assert (home.trials, home.verdicts, home.unchanged, home.skipped) == (0, 0, 7, [])
    assert exported(second) == exported(registry) == first


def test_an_imported_verdict_is_untrusted_unless_the_user_says_so(registry: Registry) -> None:
    text = signed(a_verdict(), a_trial())
    load(registry, io.StringIO(text), allowed=ALLOWED)
    assert registry.verdicts() == [verdict(origin="imported", trusted=False)]
    assert registry.trials(origin="local") == []
    load(registry, io.StringIO(text), allowed=ALLOWED, trust=True)
    assert registry.verdicts() == [verdict(origin="imported", trusted=True)]


def test_revocations_travel_and_are_not_trusted_unless_the_user_says_so(registry: Registry, second: Registry) -> None:
    everywhere = revocation(kernel=None, arch=None, triton=None, config={})
    registry.merge([trial()], [verdict()], [revocation(), everywhere])
    first = exported(registry)
    report = load(second, io.StringIO(first), allowed=ALLOWED)
    assert (report.trials, report.verdicts, report.revocations) == (1, 1, 2)
    assert {(each.origin, each.trusted) for each in second.revocations()} == {("imported", False)}
    assert exported(second) == first
    again = load(second, io.StringIO(first), allowed=ALLOWED)
    assert (again.revocations, again.unchanged) == (0, 4)
    load(second, io.StringIO(first), allowed=ALLOWED, trust=True)
    assert {(each.origin, each.trusted) for each in second.revocations()} == {("imported", True)}
    load(second, io.StringIO(first), allowed=ALLOWED)
    assert {(each.origin, each.trusted) for each in second.revocations()} == {("imported", True)}
    home = load(registry, io.StringIO(first), allowed=ALLOWED, trust=True)
    assert (home.revocations, home.unchanged) == (0, 4)


def test_import_adds_revocations_to_those_that_are_here(registry: Registry) -> None:
    registry.revoke(revocation())
    load(registry, io.StringIO(signed(a_revocation(config={}))), allowed=ALLOWED, trust=True)
    assert {each.origin for each in registry.revocations()} == {"local", "imported"}


def test_only_a_file_with_revocations_needs_a_reader_that_knows_them(registry: Registry) -> None:
    registry.record([trial()])
    assert json.loads(exported(registry).partition("\n")[0])["version"] == 1
    registry.revoke(revocation())
    assert json.loads(exported(registry).partition("\n")[0])["version"] == 2


def test_a_version_1_file_is_still_read(second: Registry) -> None:
    old = an_old_verdict(
        evidence={
            "candidates": [
                {"implementation": "triton", "config": {"BLOCK_M": 64}, "time_ms": 0.123, "speedup": [1.0, 1.0, 1.0]},
                {"implementation": "torch", "config": {}, "time_ms": 0.11, "samples_ms": [0.1, 0.12]},
                {"implementation": "triton", "config": {"BLOCK_M": 128}, "time_ms": 0.1, "speedup": [1.2, 1.1, 1.3]},
            ],
            "again": [
                [
                    {"implementation": "triton", "config": {"BLOCK_M": 64}, "samples_ms": [0.2], "time_ms": 0.2},
                    {
                        "implementation": "triton",
                        "config": {"BLOCK_M": 128},
                        "samples_ms": [0.1],
                        "speedup": [2.0, 1.9, 2.1],
                    },
                ]
            ],
            "kernels": {"triton": KERNEL},
            "mode": "eager",
            "tried": 9,
        }
    )
    report = load(second, io.StringIO(signed(a_trial(), old, version=1)), allowed=ALLOWED)
    assert (report.trials, report.verdicts, report.skipped) == (1, 1, [])
    (found,) = second.verdicts()
    assert [(each.implementation, each.time_ms, each.default) for each in found.finalists] == [
        ("triton", 0.1, False),
        ("torch", 0.11, False),
        ("triton", 0.123, True),
    ]
    assert found.winner.again == Again(Speedup(2.0, 1.9, 2.1), (0.1,), (0.2,))
    assert (found.mode, found.sources, found.notes) == ("eager", {"triton": KERNEL}, {"tried": 9})
    assert found.interval == Speedup(1.23, 1.2, 1.26)


def test_unknown_ops_and_config_keys_are_skipped_with_a_reason(second: Registry) -> None:
    text = signed(a_trial(op="unheard_of"), a_trial(config={"BLOCK_Q": 1}), a_verdict())
    report = load(second, io.StringIO(text), allowed=ALLOWED)
    assert (report.trials, report.verdicts) == (0, 1)
    assert report.skipped == [
        "line 2: unknown op unheard_of",
        "line 3: rms_norm_fwd has no config key ['BLOCK_Q'] for triton",
    ]
    report = load(second, io.StringIO(signed(a_revocation(config={"BLOCK_Q": 1}))), allowed=ALLOWED, trust=True)
    assert report.skipped == ["line 2: rms_norm_fwd has no config key ['BLOCK_Q'] for triton"]


def test_the_configs_in_the_evidence_are_held_to_the_same_list(second: Registry) -> None:
    hostile = verdict(finalists=(verdict().winner, Finalist("triton", {"BLOCK_Q": 1}, 0.2)))
    report = load(second, io.StringIO(signed({"type": "verdict", **hostile.portable()})), allowed=ALLOWED)
    assert report.skipped == ["line 2: rms_norm_fwd has no config key ['BLOCK_Q'] for triton"]
    assert second.verdicts() == []


def test_an_implementation_that_is_not_here_may_have_any_config(second: Registry) -> None:
    older = verdict(finalists=(verdict().winner, Finalist("triton_of_old", {"BLOCK_Q": 1}, 0.2)))
    report = load(second, io.StringIO(signed({"type": "verdict", **older.portable()})), allowed=ALLOWED)
    assert (report.skipped, report.verdicts) == ([], 1)


IMPORTED = verdict(origin="imported", trusted=False)
WIDER = replace(IMPORTED, interval=Speedup(1.23, 1.0, 1.4))
SAMPLED = replace(IMPORTED, finalists=(Finalist("triton", {"BLOCK_M": 1}, 0.1, samples_ms=(0.1, 0.1)),))
CONFLICTS: list[tuple[str, Verdict, Verdict, bool]] = [
    ("a local measurement stands", verdict(config={}), IMPORTED, False),
    ("a local default stands", verdict(status=VerdictStatus.DEFAULT), IMPORTED, False),
    ("a local measurement stands against a tighter one", replace(WIDER, origin="local", trusted=True), IMPORTED, False),
    ("a local prediction stands against a claim", predicted(), IMPORTED, False),
    ("a trusted measurement replaces a local prediction", predicted(), replace(IMPORTED, trusted=True), True),
    ("a measurement replaces an imported prediction", predicted(origin="imported", trusted=False), IMPORTED, True),
    ("a prediction replaces a claim", IMPORTED, predicted(origin="imported", trusted=True), True),
    ("a local prediction stands against another", predicted(), predicted(origin="imported", config={}), False),
    ("the tighter interval stands", IMPORTED, WIDER, False),
    ("the tighter interval replaces", WIDER, IMPORTED, True),
    ("more samples replace", IMPORTED, SAMPLED, True),
    ("fewer samples do not", SAMPLED, IMPORTED, False),
    ("trust goes before the interval", replace(WIDER, trusted=True), IMPORTED, False),
    ("the same verdict, now trusted", IMPORTED, replace(IMPORTED, trusted=True), True),
    (
        "the newer prediction",
        predicted(origin="imported"),
        predicted(origin="imported", created_at=START + timedelta(days=1)),
        True,
    ),
]


@pytest.mark.parametrize(
    ("existing", "new", "replaced"), [row[1:] for row in CONFLICTS], ids=[row[0] for row in CONFLICTS]
)
def test_conflicts_are_resolved_by_evidence(existing: Verdict, new: Verdict, replaced: bool) -> None:
    choice = import_rule(existing, new)
    assert choice.replace is replaced
    assert choice.why
    assert import_rule(new, existing).replace is not replaced


CLAIMS = st.builds(
    lambda changes, low, samples, later, predict: (predicted if predict else verdict)(
        **changes,
        **({} if predict else {"interval": Speedup(1.2, low, 1.3)}),
        finalists=(Finalist("triton", {"n": samples}, None if predict else 0.1, samples_ms=(0.1,) * samples),),
        created_at=START + timedelta(days=later),
    ),
    st.fixed_dictionaries({"trusted": st.booleans(), "origin": st.sampled_from(["local", "imported", "shipped"])}),
    st.sampled_from([1.0, 1.1]),
    st.integers(1, 2),
    st.integers(0, 1),
    st.booleans(),
)
REASONS = st.builds(
    lambda reason, trusted, later: revocation(reason=reason, trusted=trusted, created_at=START + timedelta(days=later)),
    st.sampled_from(["a", "b"]),
    st.booleans(),
    st.integers(0, 1),
)


@settings(max_examples=examples(25), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(CLAIMS, min_size=2, max_size=4), st.lists(REASONS, max_size=3), st.randoms())
def test_what_is_left_of_many_does_not_depend_on_the_order(
    tmp_path: Path, claims: Any, reasons: Any, dice: Any
) -> None:
    left = []
    for _ in range(2):
        with Registry.open(tmp_path / f"{uuid.uuid4().hex}.db", write=True) as registry:
            for each in claims:
                registry.merge(verdicts=[each], rule=import_rule)
            for reason in reasons:
                registry.merge(revocations=[reason])
            left.append((registry.verdicts(), registry.revocations()))
        dice.shuffle(claims)
        dice.shuffle(reasons)
    assert left[0] == left[1]


def test_the_report_says_what_became_of_each_conflict(registry: Registry) -> None:
    registry.merge(verdicts=[verdict(config={}), predicted(problem=problem(7))])
    text = signed(a_verdict(), a_verdict(problem=problem(7)))
    report = load(registry, io.StringIO(text), allowed=ALLOWED, trust=True)
    assert report.verdicts == 1
    assert [line.rpartition(": ")[2] for line in report.skipped] == ["one's own verdict stands against an imported one"]
    assert [line.rpartition(": ")[2] for line in report.replaced] == ["a measurement stands against a prediction"]
