"""The lines of the exchange format: how records are written to text and read back. Standard library only.

    {"format":"tilebook-registry","records":3,"sha256":"...","version":3}
    {"type":"revocation","op":"attention_fwd",...,"sha256":"..."}
    {"type":"verdict","op":"attention_fwd",...,"sha256":"..."}
    {"type":"trial",...,"sha256":"..."}

The header's digest is over the record lines as written, each with its newline; a record's is over its content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

from tilebook.errors import RegistryError
from tilebook.registry import legacy
from tilebook.registry.checks import Json, canonical, quoted
from tilebook.registry.codec import revocation_from, trial_from, verdict_from
from tilebook.registry.records import Revocation, Trial
from tilebook.registry.verdict import Verdict

FORMAT = "tilebook-registry"
# Version 2 added revocations, version 3 the finalists of verdicts, which were free-form evidence before. A file is
# written as the oldest version that can say what is in it.
VERSION = 3
MAX_LINE = 2 * 1024 * 1024  # characters; a record's own limits keep its line below this
MAX_TOTAL = 256 * 1024 * 1024  # characters


def written(
    revocations: Iterable[Revocation] = (), verdicts: Iterable[Verdict] = (), trials: Iterable[Trial] = ()
) -> list[str]:
    """The lines of a file, its header first. The same records give the same lines, in whatever order they come."""
    revoked = sorted(_line("revocation", each.portable()) for each in revocations)
    found = [(_key(each), _line("verdict", each.portable())) for each in verdicts]
    tried = [(t.op, t.problem, t.created_at, _line("trial", t.content())) for t in trials]
    lines = [*revoked, *(line for _, line in sorted(found)), *(line for *_, line in sorted(tried))]
    whole = hashlib.sha256()
    for line in lines:
        whole.update(line.encode())
    version = VERSION if found else 2 if revoked else 1
    header: dict[str, Json] = {"format": FORMAT, "version": version, "records": len(lines), "sha256": whole.hexdigest()}
    return [canonical(header) + "\n", *lines]


def _key(verdict: Verdict) -> tuple[str, str, str, str, int, str]:
    device = verdict.device
    return verdict.op, verdict.problem, device.name, device.arch, device.sm_count, verdict.kernel


def is_header(line: bytes) -> bool:
    """Is this the first line of a file in the format, of whatever version?"""
    try:
        head = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(head, dict) and head.get("format") == FORMAT


def read(
    stream: TextIO, *, origin: str, trusted: bool, max_total: int = MAX_TOTAL
) -> Iterator[tuple[int, Trial | Verdict | Revocation]]:
    """The records of a file with the numbers of their lines; verdicts and revocations get this origin and trust.

    Raises RegistryError; what the header promises is known to be true only when the last line has been read.
    """
    for number, version, data in _records(stream, max_total):
        try:
            yield number, _decode(data, version, origin, trusted)
        except (ValueError, TypeError, RecursionError) as error:
            raise _malformed(number, str(error)) from error


def _line(kind: str, content: Mapping[str, Any]) -> str:
    return canonical({**content, "type": kind, "sha256": _sha256(content)}) + "\n"


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def _malformed(number: int, why: str) -> RegistryError:
    return RegistryError(f"line {number} of the import: {why}")


def _records(stream: TextIO, max_total: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yields (line number, version, object); the header's promises are checked when the last line has been seen."""
    head = _parse(1, _read_line(stream, 1, max_total))
    if head.get("format") != FORMAT:
        raise _malformed(1, "this is not a tilebook export")
    if type(head.get("version")) is not int or not 1 <= head["version"] <= VERSION:
        raise _malformed(1, f"export version {quoted(head.get('version'))} is not 1 to {VERSION}")
    if head.keys() != {"format", "version", "records", "sha256"} or type(head["records"]) is not int:
        raise _malformed(1, "the header's fields are wrong")
    whole = hashlib.sha256()
    left, number = max_total, 1
    while line := _read_line(stream, number + 1, left):
        number += 1
        left -= len(line)
        if number - 1 > head["records"]:
            raise _malformed(number, f"the header promised {head['records']} records, and there are more")
        whole.update(line.rstrip("\r\n").encode() + b"\n")
        data = _parse(number, line)
        if head["version"] == 1 and data.get("type") == "revocation":
            raise _malformed(number, "version 1 of the format has no revocations")
        yield number, head["version"], data
    if number - 1 != head["records"]:
        raise _malformed(number, f"the header promised {head['records']} records, and there are {number - 1}")
    if whole.hexdigest() != head["sha256"]:
        raise _malformed(1, "the digest of the records is wrong")


def _read_line(stream: TextIO, number: int, left: int) -> str:
    try:
        line = stream.readline(MAX_LINE + 1)
        line.encode()
    except UnicodeError as error:
        raise _malformed(number, "the text is not UTF-8") from error
    if len(line) > MAX_LINE:
        raise _malformed(number, f"longer than {MAX_LINE} characters")
    if len(line) > left:
        raise _malformed(number, "the file is too large")
    return line


def _parse(number: int, line: str) -> dict[str, Any]:
    try:
        data = json.loads(line, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError as error:
        raise _malformed(number, "nested too deep") from error
    except ValueError as error:
        raise _malformed(number, f"not JSON: {error}") from error
    if type(data) is not dict:
        raise _malformed(number, "not a JSON object")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is there twice")
    return result


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _decode(data: dict[str, Any], version: int, origin: str, trusted: bool) -> Trial | Verdict | Revocation:
    kind, claimed = data.pop("type", None), data.pop("sha256", None)
    record: Trial | Verdict | Revocation
    if kind == "trial":
        record = trial_from(data)
    elif kind == "verdict":
        content = legacy.lifted(data) if version < 3 else data
        record = verdict_from(content, origin=origin, trusted=trusted)
    elif kind == "revocation":
        record = revocation_from(data, origin=origin, trusted=trusted)
    else:
        raise ValueError(f"unknown record type {quoted(kind)}")
    if claimed != _sha256(data):
        raise ValueError("the record's digest is wrong")
    return record
