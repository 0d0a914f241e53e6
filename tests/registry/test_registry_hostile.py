"""Exports that somebody has spoilt or made up: refused in one line, and nothing of them stays."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drawing import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from registry_samples import (
    A100,
    a_revocation,
    a_trial,
    a_verdict,
    an_old_verdict,
    evidenced,
    seal,
    signed,
    verdict,
)

from tilebook.registry import (
    Registry,
    RegistryError,
    load,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"evidence": {"candidates": [{}]}},
        {"evidence": {"candidates": {}}},
        {"evidence": {"candidates": [{"implementation": "triton", "config": {}, "time_ms": "fast"}]}},
        {"evidence": {"seconds": "many"}},
        {"evidence": {"rejected": {"slow": "often"}}},
        {"evidence": {"again": [[{"implementation": "triton"}]]}},
        {"evidence": {"mode": "warp"}},
        {"evidence": {"kernels": {"triton": 1}}},
        {"speedup": None, "speedup_low": None, "speedup_high": None},
        {"speedup_low": None},
        {"time_ms": None},
        {"time_ms": 0.0},
        {"default_time_ms": None},
        {"status": "predicted"},
    ],
    ids=str,
)
def test_an_old_verdict_that_no_tuner_wrote_is_refused(shared: Registry, changes: dict[str, Any]) -> None:
    for version in (1, 2):
        with pytest.raises(RegistryError, match=r"^line 2 of the import: "):
            load(shared, io.StringIO(signed(an_old_verdict(**changes), version=version)), allowed=None)
    assert shared.verdicts() == []


DEEP = "[" * 200_000


FILES: dict[str, str] = {
    "empty file": "",
    "not JSON": "hello\n",
    "another format": '{"format":"x"}\n',
    "header is a list": "[]\n",
    "another version": signed(version=5),
    "version zero": signed(version=0),
    "a revocation in version 1": signed(a_revocation(), version=1),
    "version is a flag": signed(version=True),
    "unknown header field": signed(extra=1),
    "too few records": signed(a_trial(), records=2),
    "too many records": signed(a_trial(), records=0),
    "record count is a float": signed(a_trial(), records=1.0),
    "wrong file digest": signed(a_trial(), sha256="0" * 64),
}


LINES: dict[str, str | dict[str, Any]] = {
    "unknown field": a_trial(extra=1),
    "wrong record digest": a_trial(sha256="0" * 64),
    "no record digest": json.dumps(a_trial()),
    "unknown type": a_trial(type="miss"),
    "type is a list": a_trial(type=[]),
    "blank line": "",
    "record is a list": "[1]",
    "nested too deep to parse": '{"type":' + DEEP,
    "nested facts": a_trial(facts={"a": json.loads("[" * 20 + "]" * 20)}),
    "deep problem": a_trial(problem="[" * 1900),
    "a key twice": json.dumps(seal(a_trial()))[:-1] + ',"op":"mlp_fwd"}',
    "a key twice, deeper": '{"type":"trial","config":{"a":1,"a":2}}',
    "NaN": json.dumps(seal(a_trial(time_ms=float("nan")))),
    "infinite by overflow": json.dumps(seal(a_trial())).replace('"time_ms": 0.1', '"time_ms": 1e999'),
    "huge integer": '{"type":"trial","time_ms":' + "9" * 5000 + "}",
    "a verdict that says it is trusted": a_verdict(trusted=True),
    "missing field": {k: v for k, v in a_trial().items() if k != "reason"},
    "time is an integer": a_trial(time_ms=1),
    "time is negative": a_trial(time_ms=-1.0),
    "time is a string": a_trial(time_ms="1.0"),
    "sample is a flag": a_trial(samples_ms=[True]),
    "samples are a string": a_trial(samples_ms="123"),
    "too many samples": a_trial(samples_ms=[0.1] * 10_001),
    "SM count is a flag": a_trial(device={"name": "X", "arch": "sm_90", "sm_count": True}),
    "SM count is a float": a_trial(device={"name": "X", "arch": "sm_90", "sm_count": 1.0}),
    "device has another field": a_trial(device={**A100.content(), "id": 1}),
    "device name with an escape": a_trial(device={**A100.content(), "name": "\x1b[31m"}),
    "device name with a line break": a_trial(device={**A100.content(), "name": "a\nb"}),
    "long device name": a_trial(device={**A100.content(), "name": "x" * 129}),
    "environment is a list": a_trial(environment=[]),
    "version is a number": a_trial(environment={"triton": 3}),
    "op with a path": a_trial(op="../x"),
    "kernel is not hex": a_trial(kernel="zz" * 8),
    "config value is a float": a_trial(config={"BLOCK_M": 1.5}),
    "config value is null": a_trial(config={"BLOCK_M": None}),
    "config value is a path": a_trial(config={"BLOCK_M": "/tmp/x"}),
    "config value is too large": a_trial(config={"BLOCK_M": 2**31 + 1}),
    "config replaces the code": a_trial(config={"ir_override": "x.ttgir"}),
    "config key is not a name": a_trial(config={"a b": 1}),
    "reason with a control character": a_trial(reason="\x07"),
    "reason with a right-to-left override": a_trial(reason="\u202e"),
    "long reason": a_trial(reason="x" * 4001),
    "reason is null": a_trial(reason=None),
    "status unknown": a_trial(status="fine"),
    "status is a list": a_trial(status=[]),
    "failure of a passed trial": a_trial(failure="slow"),
    "naive time stamp": a_trial(created_at="2026-11-21T12:00:00.000000"),
    "other time zone": a_trial(created_at="2026-11-21T12:00:00.000000+01:00"),
    "time stamp in other digits": a_trial(created_at="٢٠٢٦-11-21T12:00:00.000000+00:00"),
    "impossible date": a_trial(created_at="2026-02-30T12:00:00.000000+00:00"),
    "problem not canonical": a_trial(problem='{"a": 1}'),
    "problem is a list": a_trial(problem="[]"),
    "problem with an escape sequence": a_trial(problem='{"key":{"a":"\\u001b[2J"}}'),
    "problem with a line break": a_verdict(problem='{"key":{"a":["b\\nc"]}}'),
    "problem with a delete": a_verdict(problem='{"dtype":"\x7f"}'),
    "problem with a right-to-left override": a_verdict(problem='{"dtype":"\\u202e"}'),
    "problem with half a character": a_trial(problem='{"dtype":"\\ud800"}'),
    "a revocation that says it is trusted": a_revocation(trusted=True),
    "a revocation without a reason": a_revocation(reason=" "),
    "a revocation of PyTorch": a_revocation(implementation="torch", config={}),
    "a revocation whose range is not in its normal form": a_revocation(triton=">=3.6,<3.7"),
    "a revocation with an empty range": a_revocation(triton="<3.6,>=3.7"),
    "a revocation with a range of a million bounds": a_revocation(triton=",".join(f"<{n}" for n in range(10**5))),
    "a revocation with a range that is not one": a_revocation(triton="3.*"),
    "a revocation with a range in other digits": a_revocation(triton=">=٣.٦"),
    "a revocation of a flag": a_revocation(kernel=True),
    "interval upside down": a_verdict(interval=[1.5, 2.0, 1.0]),
    "no interval": a_verdict(interval=None),
    "half an interval": a_verdict(interval=[1.0, 0.9]),
    "no finalists": a_verdict(finalists=[]),
    "a finalist without fields": a_verdict(finalists=[{}]),
    "a finalist twice": a_verdict(finalists=[verdict().winner.content()] * 2),
    "a winner that took no time": a_verdict(finalists=[{**verdict().winner.content(), "time_ms": 0.0}]),
    "a winner that was not measured": a_verdict(finalists=[{**verdict().winner.content(), "time_ms": None}]),
    "losers out of order": a_verdict(finalists=[each.content() for each in evidenced().finalists][::-1]),
    "a mode that is none": a_verdict(mode="warp"),
    "sources that are numbers": a_verdict(sources={"triton": 1}),
    "notes with a text for a count": a_verdict(notes={"tried": "many"}),
    "notes with texts for seconds": a_verdict(notes={"seconds": {"total": "long"}}),
    "a prediction with times": a_verdict(status="predicted"),
    "a default of another time": a_verdict(finalists=[{**verdict().winner.content(), "default": True}]),
    "a verdict as it was in version 2": an_old_verdict(),
    "long line": a_trial(reason="x" * (2 * 1024 * 1024)),
    "lone surrogate": '{"type":"\\ud800"}',
    "not JSON": "{]",
}


def _refuses(registry: Registry, text: str) -> None:
    with pytest.raises(RegistryError, match=r"^line \d+ of the import: ") as caught:
        load(registry, io.StringIO(text), allowed=None)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
    assert (registry.trials(), registry.verdicts()) == ([], [])


@pytest.mark.parametrize("text", FILES.values(), ids=FILES.keys())
def test_a_malformed_file_changes_nothing(shared: Registry, text: str) -> None:
    _refuses(shared, text)


@pytest.mark.parametrize("record", LINES.values(), ids=LINES.keys())
def test_a_hostile_record_changes_nothing_even_behind_good_ones(shared: Registry, record: Any) -> None:
    _refuses(shared, signed(record))
    _refuses(shared, signed(a_trial(), a_verdict(), record))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry.open(tmp_path_factory.mktemp("hostile") / "registry.db", write=True) as registry:
        yield registry


def test_a_file_that_is_too_large_or_not_utf8_changes_nothing(shared: Registry) -> None:
    with pytest.raises(RegistryError, match="too large"):
        load(shared, io.StringIO(signed(*(a_trial(reason=str(n)) for n in range(50)))), allowed=None, max_total=5000)
    with pytest.raises(RegistryError, match="UTF-8"):
        load(shared, io.TextIOWrapper(io.BytesIO(b'{"\xff\xfe'), "utf-8"), allowed=None)
    assert shared.trials() == []


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=examples(100), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([a_trial(), a_verdict(), a_revocation()]), st.data())
def test_a_field_of_junk_is_refused_or_kept_exactly(tmp_path_factory: Any, record: dict[str, Any], data: Any) -> None:
    field = data.draw(st.sampled_from(sorted(record)))
    changed = {**record, field: data.draw(junk)}
    with Registry.open(_junk_registry(tmp_path_factory), write=True) as registry:
        before = registry.trials() + registry.verdicts() + registry.revocations()
        try:
            report = load(registry, io.StringIO(signed(changed)), allowed=None)
        except RegistryError:
            assert registry.trials() + registry.verdicts() + registry.revocations() == before
        else:
            assert report.trials + report.verdicts + report.revocations + report.unchanged + len(report.skipped) == 1
        assert registry.corrupt == 0


_place: list[Path] = []


def _junk_registry(factory: pytest.TempPathFactory) -> Path:
    if not _place:
        _place.append(factory.mktemp("junk") / "registry.db")
    return _place[0]
