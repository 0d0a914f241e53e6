"""The lines of the exchange format: how records are written to text and read back. Standard library only.

    {"format":"tilebook-registry","records":3,"sha256":"...","signature":{"key":"...","value":"..."},"version":4}
    {"type":"revocation","op":"attention_fwd",...,"sha256":"..."}
    {"type":"verdict","op":"attention_fwd",...,"sha256":"..."}
    {"type":"trial",...,"sha256":"..."}

The header's digest is over the record lines as written, each with its newline; a record's is over its content. A
signature, where there is one, is of the header without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TextIO

from tilebook.errors import RegistryError
from tilebook.registry import legacy
from tilebook.registry.checks import DAMAGE, Json, canonical, quoted, time_text
from tilebook.registry.codec import revocation_from, trial_from, trial_like, verdict_from
from tilebook.registry.cut import cut
from tilebook.registry.records import Revocation, Trial
from tilebook.registry.texts import Record, Written
from tilebook.registry.verdict import Verdict

if TYPE_CHECKING:
    from tilebook.registry.signing import Sign, Signature

FORMAT = "tilebook-registry"
# Version 2 added revocations, version 3 the finalists of verdicts, which were free-form evidence before, version 4
# signatures, and who made a revocation. A file is written as the oldest version that can say what is in it.
VERSION = 4
_FINALISTS = 3
MAX_LINE = 2 * 1024 * 1024  # characters; a record's own limits keep its line below this


def written(
    revocations: Iterable[Revocation] = (), verdicts: Iterable[Verdict] = (), trials: Iterable[Trial] = ()
) -> list[str]:
    """The lines of a file, its header first. The same records give the same lines, in whatever order they come."""
    revoked = _revoked(revocations)
    found = [Written(each).line for each in sorted(verdicts, key=lambda each: each.place)]
    tried = list(in_order(map(trial_line, sorted(trials, key=_when))))
    lines = [*(line for _, line in revoked), *found, *tried]
    whole = hashlib.sha256()
    for line in lines:
        whole.update(line.encode())
    version = max(1, *(version for version, _ in revoked), _FINALISTS if found else 1)
    return [_header(version, len(lines), whole.hexdigest()), *lines]


class Gathered:
    """The lines of a file that is to be written, aside: its header, which tells what follows, can be known only now."""

    def __init__(self, header: str, body: IO[str], count: int) -> None:
        self.count = count
        self._header, self._body = header, body

    def write(self, stream: TextIO) -> int:
        """Writes them, once; returns how many records they are."""
        with contextlib.closing(self._body):
            stream.write(self._header)
            while part := self._body.read(1 << 20):
                stream.write(part)
        return self.count


def gathered(
    revocations: Iterable[Revocation], verdicts: Iterable[str], trials: Iterable[TrialLine], sign: Sign | None = None
) -> Gathered:
    """The file that `written` gives, of more records than fit into memory. sign: by whom.

    verdicts are their lines; they come in the order of the file, by `Verdict.place`, and so do trials, by op, problem
    and time.
    """
    whole, count, versions = hashlib.sha256(), 0, {1}

    def counted(lines: Iterable[str], version: int) -> Iterator[str]:
        nonlocal count
        for line in lines:
            count += 1
            versions.add(version)
            whole.update(line.encode())
            yield line

    body = _aside()
    try:
        for version, line in _revoked(revocations):
            body.writelines(counted([line], version))
        body.writelines(counted(verdicts, _FINALISTS))
        body.writelines(counted(in_order(trials), 1))
        body.seek(0)
        return Gathered(_header(max(versions), count, whole.hexdigest(), sign), body, count)
    except BaseException as error:
        with contextlib.suppress(OSError):  # what could not be written cannot be now
            body.close()
        if not isinstance(error, OSError):
            raise
        import tempfile

        where = f"{tempfile.gettempdir()}, where its records wait"
        raise RegistryError(f"the export cannot be written: {where}: {error.strerror or error}") from error


def _aside() -> IO[str]:
    """Where lines wait until the header is known: on disk, or in memory where no folder can be written to."""
    import tempfile  # which imports much, and most who read lines write none

    try:
        return tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n")
    except OSError:
        return io.StringIO()


def _header(version: int, records: int, sha256: str, sign: Sign | None = None) -> str:
    head: dict[str, Json] = {"format": FORMAT, "version": version, "records": records, "sha256": sha256}
    if sign is not None:
        head["version"] = VERSION
        head["signature"] = sign(canonical(head))
    return canonical(head) + "\n"


def _revoked(revocations: Iterable[Revocation]) -> list[tuple[int, str]]:
    """Their lines in order, each with the version that can say it."""
    lines = ((_line("revocation", each.portable()), VERSION if each.made else 2) for each in revocations)
    return [(version, line) for line, version in sorted(lines)]


def _when(trial: Trial) -> tuple[str, str, datetime]:
    return trial.op, trial.problem, trial.created_at


TrialLine = tuple[str, str, str, str]
"""A trial's op, problem and time, and its line."""


def in_order(trials: Iterable[TrialLine]) -> Iterator[str]:
    """The lines of trials; those of one moment are sorted among themselves."""
    for _, together in itertools.groupby(trials, key=lambda each: each[:3]):
        yield from sorted(line for *_, line in together)


def trial_line(trial: Trial) -> TrialLine:
    """As `_line`, of the text that is there: the digest stands before the last but one of its fields."""
    head, status, tail = trial.text.rpartition(',"status":')
    line = f'{head},"sha256":"{trial.sha256}"{status}{tail[:-1]},"type":"trial"}}\n'
    return trial.op, trial.problem, time_text(trial.created_at), line


def is_header(line: bytes) -> bool:
    """Is this the first line of a file in the format, of whatever version?"""
    try:
        head = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(head, dict) and head.get("format") == FORMAT


@dataclass
class Source:
    """A file that is read, by its header: who signed it, if anybody did, and whether what it says is trusted."""

    signature: Signature | None
    trusted: bool
    records: Decoded


def read(
    stream: TextIO, *, origin: str, trusted: bool | None, max_total: int | None = None
) -> Iterator[tuple[int, Record]]:
    """`opened`, of which nothing but the records is wanted."""
    return opened(stream, origin=origin, trusted=trusted, max_total=max_total).records


Line = tuple[int, str]
"""A line of a file, the end of it with it, after its number."""


class Kind(NamedTuple):
    """What the lines of a file have in common: its version, and the origin and the trust that its records get."""

    version: int
    origin: str
    trusted: bool


Decoded = Generator[tuple[int, Record], None, None]
"""Records with the numbers of their lines."""


def decoded(lines: Iterator[Line], promised: int, kind: Kind) -> Decoded:
    """The record of each line with its number. promised: how many lines there are, as the file says."""
    return ((number, record(number, line, kind)) for number, line in lines)


def opened(
    stream: TextIO,
    *,
    origin: str,
    trusted: bool | None,
    max_total: int | None = None,
    decode: Callable[[Iterator[Line], int, Kind], Decoded] = decoded,
) -> Source:
    """A file with its records and the numbers of their lines; verdicts and revocations get this origin and trust.

    trusted: None where that is for the signature to say, see `signing`. A file may have any length, a line may not;
    max_total: characters after which a file is refused after all. decode: a way to what `decoded` does. Raises
    RegistryError, of a signature that is wrong too; what the header promises is known to be true only when the last
    line has been read.
    """
    left = math.inf if max_total is None else max_total
    head = _head(_read_line(stream, 1, left))
    signature = _checked(head, needed=trusted is None)
    if trusted is None:
        trusted = signature is not None and signature.trusted is not None
    kind = Kind(head["version"], origin, trusted)
    return Source(signature, trusted, decode(_lines(stream, head, left), head["records"], kind))


def signature_of(text: str) -> Signature | None:
    """Who says to have signed the file that begins so; None where it is no export, or nobody did."""
    line = text.partition("\n")[0]
    return _signature(_head(line)) if is_header(line.encode()) else None


def _checked(head: Mapping[str, Any], needed: bool) -> Signature | None:
    """The header's signature, looked at. needed: also where `cryptography` is missing, if the key is trusted."""
    signature = _signature(head)
    if signature is None:
        return None
    from tilebook.registry.signing import checked

    unsigned = {name: value for name, value in head.items() if name != "signature"}
    return checked(signature, canonical(unsigned), needed=needed and signature.trusted is not None)


def _signature(head: Mapping[str, Any]) -> Signature | None:
    if "signature" not in head:
        return None
    from tilebook.registry.signing import Signature

    try:
        return Signature.of(head["signature"])
    except ValueError as error:
        raise _malformed(1, str(error)) from error


def record(number: int, line: str, kind: Kind) -> Record:
    """The record of a line. Raises RegistryError."""
    plain: Record | None = None
    if line.endswith('"type":"trial"}\n'):
        plain = _plain_trial(line)
    elif kind.version >= _FINALISTS:
        plain = cut(line, kind.origin, kind.trusted)
    return plain or whole(number, line, *kind)


def _plain_trial(line: str) -> Trial | None:
    """The trial whose line this is, to the character; None for all else, right or wrong."""
    try:
        told = json.loads(line)
        del told["type"], told["sha256"]
        trial = trial_like(told)
        return trial if trial_line(trial)[-1] == line else None
    except DAMAGE:
        return None


def whole(number: int, line: str, version: int, origin: str, trusted: bool) -> Record:
    """The record that every field of a line makes, or what is wrong with it; `record` has shorter ways to the same."""
    data = _parse(number, line)
    if version == 1 and data.get("type") == "revocation":
        raise _malformed(number, "version 1 of the format has no revocations")
    try:
        return _decode(data, version, origin, trusted)
    except DAMAGE as error:
        raise _malformed(number, str(error)) from error


def _line(kind: str, content: Mapping[str, Any]) -> str:
    return canonical({**content, "type": kind, "sha256": _sha256(content)}) + "\n"


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def _malformed(number: int, why: str) -> RegistryError:
    return RegistryError(f"line {number} of the import: {why}")


def _head(line: str) -> dict[str, Any]:
    if not line:
        raise _malformed(1, "the file is empty")
    head = _parse(1, line)
    if head.get("format") != FORMAT:
        raise _malformed(1, "this is not a tilebook export")
    if type(head.get("version")) is not int or not 1 <= head["version"] <= VERSION:
        raise _malformed(1, f"export version {quoted(head.get('version'))} is not 1 to {VERSION}")
    signed = {"signature"} if head["version"] == VERSION else set()
    if head.keys() - signed != {"format", "version", "records", "sha256"} or type(head["records"]) is not int:
        raise _malformed(1, "the header's fields are wrong")
    return head


def _lines(stream: TextIO, head: Mapping[str, Any], left: float) -> Iterator[tuple[int, str]]:
    """Yields (line number, line); the header's promises are checked when the last line has been seen."""
    whole = hashlib.sha256()
    number = 1
    while line := _read_line(stream, number + 1, left):
        number += 1
        left -= len(line)
        if number - 1 > head["records"]:
            raise _malformed(number, f"the header promised {head['records']} records, and there are more")
        whole.update(line.rstrip("\r\n").encode() + b"\n")
        yield number, line
    if number - 1 != head["records"]:
        raise _malformed(number, f"the header promised {head['records']} records, and there are {number - 1}")
    if whole.hexdigest() != head["sha256"]:
        raise _malformed(1, "the digest of the records is wrong")


def _read_line(stream: TextIO, number: int, left: float) -> str:
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


def _decode(data: dict[str, Any], version: int, origin: str, trusted: bool) -> Record:
    kind, claimed = data.pop("type", None), data.pop("sha256", None)
    record: Record
    if kind == "trial":
        record = trial_from(data)
    elif kind == "verdict":
        content = legacy.lifted(data) if version < _FINALISTS else data
        record = Written(verdict_from(content, origin=origin, trusted=trusted))
    elif kind == "revocation":
        record = revocation_from(data, origin=origin, trusted=trusted)
    else:
        raise ValueError(f"unknown record type {quoted(kind)}")
    if claimed != _sha256(data):
        raise ValueError("the record's digest is wrong")
    return record
