"""The lines of a long file read in several processes. What a record is, and what is none, is for `lines` to say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from tilebook.registry import checks, workers
from tilebook.registry.checks import config_of
from tilebook.registry.lines import Decoded, Kind, Line, record
from tilebook.registry.lines import decoded as alone
from tilebook.registry.records import Device, Environment, Failure, Status, Trial
from tilebook.registry.texts import Columns, Record, Written

ALONE = 4 << 20
"""Characters that are read before others are asked to help: half a second or so."""

_LINES = 256  # of a chunk
_CHARACTERS = 384 << 10  # likewise

Chunk = tuple[int, list[str]]
"""The number of the first of some lines, and the lines."""


def decoded(lines: Iterator[Line], promised: int, kind: Kind) -> Decoded:
    """As `lines.decoded`. Others help where as much is left of a file as has been read, and that took its time."""
    read = number = 0
    for number, line in lines:
        yield number, record(number, line, kind)
        read += len(line)
        if read > ALONE:
            break
    if promised < 2 * number or not workers.count():
        yield from alone(lines, promised, kind)
        return
    for (first, texts), found in workers.mapped("records", tuple(kind), _chunks(lines)):
        for number, line, told in zip(itertools.count(first), texts, found or itertools.repeat(None)):
            yield number, record(number, line, kind) if told is None else unpacked(told)


def _chunks(lines: Iterator[Line]) -> Iterator[Chunk]:
    """The lines in their order; an error comes after all that were read before it."""
    texts: list[str] = []
    first = size = 0
    error = None
    try:
        for number, line in lines:
            if texts and (len(texts) == _LINES or size + len(line) > _CHARACTERS):
                yield first, texts
                texts, size = [], 0
            if not texts:
                first = number
            texts.append(line)
            size += len(line)
    except Exception as found:
        error = found
    if texts:
        yield first, texts
    if error is not None:
        raise error


# In a process that helps


def packed(chunk: Chunk, version: int, origin: str, trusted: bool) -> list[Any]:
    """The records of a chunk as plain values; None for each that the parent is to look at itself, wrong ones too."""
    first, texts = chunk
    kind = Kind(version, origin, trusted)
    return [_packed(number, line, kind) for number, line in enumerate(texts, first)]


def _packed(number: int, line: str, kind: Kind) -> tuple[Any, ...] | None:
    try:
        found = record(number, line, kind)
    except Exception:
        return None
    if isinstance(found, Written):
        device, environment, finalists = found.told.device, found.told.environment, [*map(tuple, found.finalists)]
        told = found.told._replace(device=_device_values(device), environment=environment.text)  # type: ignore[arg-type]
        return tuple(told), finalists, (found.sha256, found.served)
    return _packed_trial(found) if isinstance(found, Trial) else None


def _packed_trial(trial: Trial) -> tuple[Any, ...]:
    failure = None if trial.failure is None else trial.failure.value
    plain = {name: getattr(trial, name) for name in _AS_THEY_ARE}
    seen = checks.time_text(trial.created_at)
    return plain, _device_values(trial.device), trial.environment.text, trial.status.value, failure, seen


_AS_THEY_ARE = (
    "op", "problem", "kernel", "implementation", "reason", "time_ms", "samples_ms", "facts", "texts", "sha256",
)  # fmt: skip
"""What of a trial is plain: fields, and the texts that are made of them once."""


def _device_values(device: Device) -> tuple[Any, ...]:
    return device.name, device.arch, device.sm_count


# In the parent


def unpacked(told: Sequence[Any]) -> Record:
    """The record that was packed. It has been looked at, field by field, and is not looked at again."""
    if len(told) > 3:
        return _trial(*told)
    (op, problem, device, environment, *rest), finalists, digests = told
    columns = Columns(op, problem, _device(*device), _environment(environment), *rest)
    return Written.of(columns, finalists, digests=digests)


def _trial(
    plain: dict[str, Any], device: Sequence[Any], environment: str, status: str, failure: str | None, created_at: str
) -> Trial:
    trial = object.__new__(Trial)
    vars(trial).update(
        plain,
        device=_device(*device),
        environment=_environment(environment),
        config=config_of(plain["texts"][0]),
        status=Status(status),
        failure=None if failure is None else Failure(failure),
        created_at=checks.parse_time(created_at, "created_at"),
    )
    return trial


@lru_cache(256)
def _device(name: str, arch: str, sm_count: int) -> Device:
    return Device(name, arch, sm_count)


@lru_cache(256)
def _environment(text: str) -> Environment:
    return Environment(json.loads(text))
