"""In which verdicts two registries, or exports of them, differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Literal, NamedTuple

from tilebook.registry.checks import canonical

if TYPE_CHECKING:
    from tilebook.registry.overview import Shown
    from tilebook.registry.texts import Written

Kind = Literal["only in A", "only in B", "other winner", "other time", "other evidence", "other trust"]
KINDS: tuple[Kind, ...] = ("only in A", "only in B", "other winner", "other time", "other evidence", "other trust")

Key = tuple[str, str, str, str, int, str]


class Told(NamedTuple):
    """A verdict as one side has it. said: the SHA-256 of all that it says to others, see `Written.portable`."""

    verdict: Shown
    said: str

    @classmethod
    def of(cls, written: Written) -> Told:
        return cls(written.verdict, sha256(written.portable.encode()).hexdigest())


@dataclass(frozen=True)
class Difference:
    """A problem, device and kernel of which two registries say different things; a side that says nothing is None.

    "other time": the same winner took another time. "other evidence": all that is served is the same, but not what it
    was found with. "other trust": they say the same, and only one side serves it.
    """

    kind: Kind
    a: Shown | None
    b: Shown | None

    @property
    def either(self) -> Shown:
        found = self.a or self.b
        assert found is not None
        return found

    @property
    def ratio(self) -> float | None:
        """B's time over A's, where both were measured."""
        times = [None if each is None else each.time_ms for each in (self.a, self.b)]
        return times[1] / times[0] if times[0] and times[1] else None


def differences(a: Iterable[Told], b: Iterable[Told]) -> Iterator[Difference]:
    """In the order of the keys. What two sides say alike is left out."""
    mine, theirs = {_key(each.verdict): each for each in a}, {_key(each.verdict): each for each in b}
    for key in sorted({*mine, *theirs}):
        one, other = mine.get(key), theirs.get(key)
        kind = _kind(one, other)
        if kind is not None:
            yield Difference(kind, one and one.verdict, other and other.verdict)


def _key(verdict: Shown) -> Key:
    device = verdict.device
    return verdict.op, verdict.problem, device.name, device.arch, device.sm_count, verdict.kernel


def _kind(one: Told | None, other: Told | None) -> Kind | None:
    if one is None:
        return "only in B"
    if other is None:
        return "only in A"
    a, b = one.verdict, other.verdict
    if (a.implementation, canonical(a.config)) != (b.implementation, canonical(b.config)):
        return "other winner"
    if (a.time_ms, a.winner.predicted_ms) != (b.time_ms, b.winner.predicted_ms):
        return "other time"
    if one.said != other.said:
        return "other evidence"
    return "other trust" if a.trusted != b.trusted else None
