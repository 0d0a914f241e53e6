"""In which verdicts two registries, or exports of them, differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from tilebook.registry.verdict import Verdict

Kind = Literal["only in A", "only in B", "other winner", "other time", "other evidence"]
KINDS: tuple[Kind, ...] = ("only in A", "only in B", "other winner", "other time", "other evidence")

Key = tuple[str, str, str, str, int, str]


@dataclass(frozen=True)
class Difference:
    """A problem, device and kernel of which two registries say different things; a side that says nothing is None.

    "other time": the same winner took another time. "other evidence": all that is served is the same, but not whether
    it may be served, or what it was found with.
    """

    kind: Kind
    a: Verdict | None
    b: Verdict | None

    @property
    def either(self) -> Verdict:
        found = self.a or self.b
        assert found is not None
        return found

    @property
    def ratio(self) -> float | None:
        """B's time over A's, where both were measured."""
        times = [None if each is None else each.time_ms for each in (self.a, self.b)]
        return times[1] / times[0] if times[0] and times[1] else None


def differences(a: Iterable[Verdict], b: Iterable[Verdict]) -> Iterator[Difference]:
    """In the order of the keys. What two sides say alike is left out."""
    mine, theirs = {_key(each): each for each in a}, {_key(each): each for each in b}
    for key in sorted({*mine, *theirs}):
        one, other = mine.get(key), theirs.get(key)
        kind = _kind(one, other)
        if kind is not None:
            yield Difference(kind, one, other)


def _key(verdict: Verdict) -> Key:
    device = verdict.device
    return verdict.op, verdict.problem, device.name, device.arch, device.sm_count, verdict.kernel


def _kind(a: Verdict | None, b: Verdict | None) -> Kind | None:
    if a is None:
        return "only in B"
    if b is None:
        return "only in A"
    if a.winner.key != b.winner.key:
        return "other winner"
    if (a.time_ms, a.winner.predicted_ms) != (b.time_ms, b.winner.predicted_ms):
        return "other time"
    return "other evidence" if a.portable() != b.portable() or a.trusted != b.trusted else None
