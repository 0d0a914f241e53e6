"""What dispatch reads of the registries: the verdicts for one GPU, by op. Standard library only.

A SQLite file is read without SQLAlchemy, by an index, for this GPU and the op that is asked for: the samples and the
notes behind a verdict stay on the disk. SQLAlchemy is imported for a layer on PostgreSQL, and only then.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from tilebook.errors import RegistryError
from tilebook.registry import readers
from tilebook.registry.layers import Layers, shipped_registry, standing, union
from tilebook.registry.lookup import Answer, Question
from tilebook.registry.readers import Reader
from tilebook.registry.records import Device, Revocation
from tilebook.registry.served import Finalist, Served
from tilebook.registry.target import Locked, Target, Unreachable

__all__ = ["Answer", "Finalist", "Question", "Served", "Table", "read"]

_T = TypeVar("_T")

READER_WAIT_S = 0.2  # a call of an op waits for it; a layer that stays locked is asked again with the next op
WHOLE = 128  # verdicts on an op; where a layer holds more, it is asked about one problem at a time
MOST_REMEMBERED = 10_000  # answers


class Table:
    """The verdicts of all layers for one GPU, read op by op, and their revocations, read at once.

    A layer that holds more than WHOLE verdicts on an op is *large*: of it only what is asked about is read, see `find`.

    problems: what is wrong with the layers, a line each; it may grow as ops are read.
    locked:   whether another process holds the lock of a layer, so that its rows are not here. They are asked for again
              with the next op; until then its revocations are not known either.

    Reading never raises: what cannot be read becomes a problem. No lock is held between two calls.
    """

    def __init__(self, layers: Sequence[tuple[str, str]], device: Device) -> None:
        self._device = device
        self.problems: list[str] = []
        self._layers = [layer for name, target in layers if (layer := self._layer(name, target)) is not None]
        self._verdicts: dict[tuple[str, str], list[Served] | None] = {}  # None: the layer is large
        self._answers: dict[tuple[str, str, str, str], tuple[int, Answer]] = {}  # with how many near ones were wanted
        self._revocations: dict[str, list[Revocation]] = {}
        self._waiting: set[str] = set()  # names of layers that were locked when they were asked last
        self._unreachable: set[str] = set()
        self._read_revocations()

    @property
    def locked(self) -> bool:
        return bool(self._waiting) or any(layer.name not in self._revocations for layer in self._layers)

    @property
    def revocations(self) -> list[Revocation]:
        """Those of all layers together; the untrusted ones too."""
        return [each for _, each in union(self._revocations.items())]

    def large(self, op: str) -> bool:
        """Is there so much on this op that one had better ask about single problems?"""
        return any(each is None for _, each in self._held(op))

    def verdicts(self, op: str) -> list[Served]:
        """One verdict for each problem and kernel of this op, the untrusted ones too; the first layer wins.

        But evidence goes first: a prediction does not hide a trusted measurement in a later layer, and a verdict that
        may not be served hides none that may. Of a large layer all is read, each time.
        """
        return self._together(op, lambda layer: layer.verdicts(op, self._device) or [])

    def small(self, op: str) -> list[Served]:
        """`verdicts` of the layers that are not large."""
        return self._together(op, None)

    def find(self, question: Question) -> Answer:
        """The verdict on one problem among those of all layers, and the nearest in the large ones: those of the others
        are in `small`."""
        layers = self._held(question.op)
        exact = self._exact(question, layers)
        near: dict[str, tuple[float, Served]] = {}
        asks = question.asks_near(exact)
        asked = [layer for layer, held in layers if asks and held is None]
        answers = [self._answer(layer, question) for layer in asked]
        for distance, each in itertools.chain.from_iterable(answer.near for answer in answers):
            if each.problem not in near and (best := self._exact(question.about(each.problem), layers)):
                near[each.problem] = distance, best
        complete = min((answer.complete for answer in answers), default=math.inf if asks else 0.0)
        in_order = sorted(near.values(), key=lambda each: (each[0], not each[1].measured))
        return Answer(exact, tuple(in_order), complete=complete)

    def some(self, op: str, kernel: str) -> list[Served]:
        """Verdicts on the op that may be served: of each large layer as many as another layer holds at most."""
        found = self._together(op, lambda layer: layer.some(op, kernel, self._device, WHOLE))
        return [each for each in found if each.kernel == kernel and each.trusted]

    def _together(self, op: str, large: Callable[[Reader], list[Served]] | None) -> list[Served]:
        """One verdict for each problem and kernel; `large` reads what is wanted of a large layer, if anything is."""
        best: dict[tuple[str, str], Served] = {}
        for layer, found in self._held(op):
            if found is None and large is not None:
                found = self._ask(layer, partial(large, layer), list[Served]())
            for served in found or ():
                key = served.problem, served.kernel
                if key not in best or standing(served) > standing(best[key]):
                    best[key] = served
        return list(best.values())

    def _exact(self, question: Question, layers: Sequence[tuple[Reader, list[Served] | None]]) -> Served | None:
        best: Served | None = None
        for layer, held in layers:
            if held is None:
                each = self._answer(layer, question).exact
            else:
                sought = question.problem, question.kernel
                each = next((served for served in held if (served.problem, served.kernel) == sought), None)
            if each is not None and (best is None or standing(each) > standing(best)):
                best = each
        return best

    def _answer(self, layer: Reader, question: Question) -> Answer:
        """What a large layer says; what it says is remembered, and of the nearest ones what it says of them alone."""
        about = layer.name, question.op, question.kernel, question.problem
        if (told := self._answers.get(about)) is not None:
            most, known = told
            if most >= question.most or not question.asks_near(known.exact):
                return known
        found = self._ask(layer, lambda: layer.answer(question, self._device), Answer())
        if found is None:
            return Answer()
        if len(self._answers) > MOST_REMEMBERED:
            self._answers.clear()
        self._answers[about] = question.most if question.asks_near(found.exact) else 0, found
        for _, each in found.near:
            self._answers.setdefault((*about[:3], each.problem), (0, Answer(each)))
        return found

    def _held(self, op: str) -> list[tuple[Reader, list[Served] | None]]:
        """The layers that can be read, each with all its verdicts on the op, or None where it is large."""
        if self.locked:
            self._read_revocations()
        held: list[tuple[Reader, list[Served] | None]] = []
        for layer in self._layers:
            place = layer.name, op
            if layer.name not in self._revocations:
                continue  # still locked: it was waited for just now
            if place not in self._verdicts:
                found = self._ask(layer, partial(_whole, layer, op, self._device), _Whole([]))
                if found is None:
                    continue
                self._verdicts[place] = found.verdicts
            held.append((layer, self._verdicts[place]))
        return held

    def _read_revocations(self) -> None:
        for layer in list(self._layers):
            if layer.name not in self._revocations:
                found = self._ask(layer, layer.revocations, list[Revocation]())
                if found is not None:
                    self._revocations[layer.name] = found

    def _layer(self, name: str, target: str) -> Reader | None:
        """None for a layer that does not exist, or cannot be one."""
        try:
            parsed = Target.parse(target)
        except RegistryError as error:
            self._note([str(error)])
            return None
        if parsed.path is None:
            return readers.Database(name, target, READER_WAIT_S)
        if name == "shipped" and (text := shipped_registry(parsed.path)) is not None:
            return readers.ShippedText(text)
        there = name == "explicit" or parsed.path.exists()
        return readers.File(name, parsed.path, READER_WAIT_S) if there else None

    def _ask(self, layer: Reader, query: Callable[[], _T], nothing: _T) -> _T | None:
        """What a layer answers: None where it is locked, nothing where it is broken.

        A server that does not answer is asked no more: a program waits for it once.
        """
        if layer.name in self._unreachable:
            return nothing
        self._waiting.discard(layer.name)
        try:
            found = query()
        except Locked as error:
            self._note([str(error)])
            self._waiting.add(layer.name)
            layer.wait_s = 0.0  # a program waits for it once
            return None
        except Exception as error:  # whatever is wrong with it, the program that asks goes on
            self._note([str(error)])
            if isinstance(error, Unreachable):
                self._unreachable.add(layer.name)
            found = nothing
        layer.wait_s = READER_WAIT_S
        self._note(layer.problems)
        return found

    def _note(self, problems: Sequence[str]) -> None:
        self.problems += [each for each in problems if each not in self.problems]


def read(device_name: str, arch: str, sm_count: int, explicit: str | None = None) -> Table:
    """The layers as they are now, for this GPU: `explicit`, else $TILEBOOK_REGISTRY; the user's; the one that ships."""
    return Table(Layers.default(explicit).layers, Device(device_name, arch, sm_count))


class _Whole(NamedTuple):
    """All that a layer holds on an op; None where it is large."""

    verdicts: list[Served] | None


def _whole(layer: Reader, op: str, device: Device) -> _Whole:
    return _Whole(layer.verdicts(op, device, WHOLE))
