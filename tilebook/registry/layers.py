"""The registries of one process, first hit first: the explicit one, the user's, the one this package ships."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from tilebook.errors import RegistryError
from tilebook.registry import shipped
from tilebook.registry.checks import called
from tilebook.registry.records import ConfigValue, Device, Miss, Revocation, Trial
from tilebook.registry.target import Target, user_folder
from tilebook.registry.verdict import Verdict
from tilebook.registry.wanted import ANY, Wanted

if TYPE_CHECKING:
    from tilebook.registry.filewriter import FileWriter
    from tilebook.registry.overview import Shown
    from tilebook.registry.quick import Line
    from tilebook.registry.store import Registry

REGISTRY_VARIABLE = "TILEBOOK_REGISTRY"
SHIPPED = Path(__file__).parent.parent / "registry.db"

_T = TypeVar("_T")
_V = TypeVar("_V", bound="Shown | Line")


class Layers:
    """Ordered (name, target) pairs. Reading never raises: what cannot be read becomes a line in `problems`.

    unread: by name, the layers that could not be read at all, with their lines.
    """

    def __init__(self, layers: Sequence[tuple[str, str]]) -> None:
        self.layers = list(layers)
        self.problems: list[str] = []
        self.unread: dict[str, str] = {}

    def demand_explicit(self) -> None:
        """Raises RegistryError where the explicit layer, which somebody named, could not be read."""
        if "explicit" in self.unread:
            raise RegistryError(self.unread["explicit"])

    @classmethod
    def default(cls, explicit: str | Path | None = None) -> Self:
        """ "explicit" (the argument, else $TILEBOOK_REGISTRY, where given), "user", "shipped"."""
        first = str(explicit or os.environ.get(REGISTRY_VARIABLE, ""))
        layers = [("explicit", first)] if first else []
        with contextlib.suppress(RegistryError):  # without a home there is no user layer, and the others serve
            layers.append(("user", str(user_folder() / "registry.db")))
        return cls([*layers, ("shipped", str(SHIPPED))])

    def read(
        self, *, op: str | None = None, device: Device | None = None, gpu: str | None = None
    ) -> tuple[list[tuple[str, Verdict]], list[tuple[str, Revocation]]]:
        """`verdicts` and `revocations` of a single reading: a layer gives both, or neither.

        gpu: words of the GPU's name, see `checks.called`.
        """
        return self._both(lambda each: each.verdicts(op=op, device=device, gpu=gpu))

    def overviews(
        self, *, op: str | None = None, device: Device | None = None, gpu: str | None = None
    ) -> tuple[list[tuple[str, Shown]], list[tuple[str, Revocation]]]:
        """As `read`, for people: of a file without the samples of verdicts, which most of the time would go to."""
        return self._both(lambda each: _overviews(each, Wanted(op=op, device=device, gpu=gpu)))

    def lines(
        self, *, op: str | None = None, gpu: str | None = None
    ) -> tuple[list[tuple[str, Line]], list[tuple[str, Revocation]]]:
        """As `read`, as lines of the exchange format."""
        return self._both(lambda each: list(each.each_line(Wanted(op=op, gpu=gpu))))

    def _both(
        self, verdicts: Callable[[Readable], Sequence[_V]]
    ) -> tuple[list[tuple[str, _V]], list[tuple[str, Revocation]]]:
        found = [(name, *both) for name, both in self._read(lambda each: (verdicts(each), each.revocations()))]
        return _best((name, v) for name, v, _ in found), union((name, r) for name, _, r in found)

    def revocations(self) -> list[tuple[str, Revocation]]:
        """Those of all layers together, with the name of the first layer that has each scope (trusted, if any is).

        No layer can take back what another revokes. Refreshes `problems`.
        """
        return union(self._read(lambda each: each.revocations()))

    def misses(self, device: Device) -> list[Miss]:
        """The ledgers of all layers together, heaviest first: calls times a call's GPU time. Refreshes `problems`."""
        together: dict[tuple[str, str], Miss] = {}
        for _, found in self._read(lambda each: each.misses(device=device)):
            for miss in found:
                key = miss.op, miss.problem
                together[key] = miss.plus(together[key]) if key in together else miss
        return sorted(together.values(), key=lambda miss: (-miss.calls * miss.time_ms, miss.op, miss.problem))

    def verdicts(
        self,
        *,
        op: str | None = None,
        problem: str | None = None,
        device: Device | None = None,
        gpu: str | None = None,
    ) -> list[tuple[str, Verdict]]:
        """One verdict for each (op, problem, device, kernel), with the name of its layer; the first layer wins.

        gpu: words of the GPU's name, see `checks.called`; a registry looks for it before it reads anything whole.

        But as within one registry, evidence goes first: a prediction does not hide a trusted measurement in a later
        layer, and a verdict that may not be served hides none that may. Refreshes `problems`; a user or shipped
        registry that simply does not exist is not one.
        """
        return _best(self._read(lambda each: each.verdicts(op=op, problem=problem, device=device, gpu=gpu)))

    def trials(self, *, op: str | None = None, gpu: str | None = None) -> list[tuple[str, Trial]]:
        """The trials of all layers with the name of the first layer that has each, oldest first. Refreshes `problems`.

        gpu: words of the GPU's name, see `checks.called`.
        """
        found: dict[str, tuple[str, Trial]] = {}
        for name, trials in self._read(lambda each: each.trials(op=op)):
            for trial in trials:
                if not gpu or called(gpu, trial.device.name):
                    found.setdefault(trial.sha256, (name, trial))
        return sorted(found.values(), key=lambda each: each[1].created_at)

    def writer(self) -> Registry:
        """The first layer that can be written, opened for it: the explicit one and no other, where there is one."""
        from tilebook.registry.store import Registry

        return self._writable(lambda target: Registry.open(target, write=True))

    def sink(self) -> FileWriter | Registry:
        """As `writer`, to have records poured in, and no more."""
        from tilebook.registry import filewriter

        return self._writable(filewriter.writer)

    def _writable(self, opened: Callable[[str], _T]) -> _T:
        problems = []
        for name, target in self.layers:
            if name == "shipped":
                continue
            try:
                return opened(target)
            except RegistryError as error:
                if name == "explicit":
                    raise
                problems.append(str(error))
        if not problems:
            user_folder()  # says why there is no user layer
        raise RegistryError("no registry can be written: " + "; ".join(problems))

    def _read(self, query: Callable[[Readable], _T]) -> Iterator[tuple[str, _T]]:
        """What each layer answers, in order; what is wrong with a layer goes to `problems`."""
        self.problems, self.unread = [], {}
        for name, target in self.layers:
            try:
                path = Target.parse(target).path
                text = shipped_registry(path) if name == "shipped" and path is not None else None
                if text is None:
                    if name != "explicit" and path is not None and not path.exists():
                        continue
                    from tilebook.registry.filereader import reader

                    opened: Readable = reader(target)
                with text or opened as registry:
                    found = query(registry)
                    self.problems += registry.problems
            except (RegistryError, OSError) as error:
                self.unread[name] = str(error)
                self.problems.append(str(error))
            else:
                yield name, found


class Readable(Protocol):
    """What layers ask of a registry; `Registry` keeps the promises, and `FileReader` of a file."""

    problems: list[str]

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def verdicts(
        self,
        *,
        op: str | None = None,
        problem: str | None = None,
        device: Device | None = None,
        kernel: str | None = None,
        gpu: str | None = None,
    ) -> list[Verdict]: ...

    def each_line(self, wanted: Wanted = ANY) -> Iterator[Line]: ...

    def revocations(self) -> list[Revocation]: ...

    def trials(self, *, op: str | None = None) -> list[Trial]: ...

    def misses(self, *, device: Device | None = None) -> list[Miss]: ...


def shipped_registry(path: Path) -> Text | None:
    """The text of what ships, where no file can be built from it."""
    return Text(shipped.text_of(path)) if shipped.ready(path) is None else None


class Text:
    """What ships, read from its text; the folder is that of `shipped.text_of`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.problems: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def verdicts(
        self,
        *,
        op: str | None = None,
        problem: str | None = None,
        device: Device | None = None,
        kernel: str | None = None,
        gpu: str | None = None,
    ) -> list[Verdict]:
        found, _, self.problems = shipped.read(self._folder, op, device)
        return [each for each in found if Wanted(op, problem, device, kernel, gpu).has(each)]

    def each_line(self, wanted: Wanted = ANY) -> Iterator[Line]:
        from tilebook.registry.quick import Line
        from tilebook.registry.texts import Written

        found = self.verdicts(op=wanted.op, device=wanted.device)
        yield from (Line.of(Written(each)) for each in found if wanted.has(each))

    def revocations(self) -> list[Revocation]:
        _, found, problems = shipped.read(self._folder, "")
        self.problems += [each for each in problems if each not in self.problems]
        return found

    def trials(self, *, op: str | None = None) -> list[Trial]:
        return []

    def misses(self, *, device: Device | None = None) -> list[Miss]:
        return []


class DenyList:
    """The revocations that are honoured under one version of Triton; "" where it is not known."""

    def __init__(self, revocations: Iterable[Revocation], triton: str) -> None:
        self._revocations = [each for each in revocations if each.trusted]
        self.ops = frozenset(each.op for each in self._revocations)
        self._triton = triton

    def find(
        self, op: str, kernel: str, arch: str, implementation: str, config: Mapping[str, ConfigValue]
    ) -> Revocation | None:
        """Why this candidate may not run, or None where it may."""
        for each in self._revocations:
            if each.covers(op, kernel, arch, self._triton, implementation, config):
                return each
        return None

    def winner(self, verdict: Shown) -> Revocation | None:
        """Why a verdict's winner may not run, or None where it may."""
        kernel = verdict.source_of(verdict.implementation)
        return self.find(verdict.op, kernel, verdict.device.arch, verdict.implementation, verdict.config)


def _overviews(registry: Readable, wanted: Wanted) -> Sequence[Shown]:
    from tilebook.registry.filereader import FileReader

    if not isinstance(registry, FileReader) or registry.schema < 3:
        return registry.verdicts(op=wanted.op, device=wanted.device, gpu=wanted.gpu)
    from tilebook.registry.overview import overviews

    return overviews(registry, wanted)


def _best(found: Iterable[tuple[str, Sequence[_V]]]) -> list[tuple[str, _V]]:
    best: dict[tuple[str, str, Device, str], tuple[str, _V]] = {}
    for name, verdicts in found:
        for verdict in verdicts:
            key = (verdict.op, verdict.problem, verdict.device, verdict.kernel)
            if key not in best or standing(verdict) > standing(best[key][1]):
                best[key] = (name, verdict)
    return list(best.values())


def union(found: Iterable[tuple[str, Sequence[Revocation]]]) -> list[tuple[str, Revocation]]:
    """The revocations of all layers, with the name of the first layer that has each scope (trusted, if any is)."""
    union: dict[str, tuple[str, Revocation]] = {}
    for name, revocations in found:
        for each in revocations:
            if each.scope not in union or (each.trusted and not union[each.scope][1].trusted):
                union[each.scope] = (name, each)
    return list(union.values())


class Standing(Protocol):
    """What of a verdict says which of two hides the other."""

    @property
    def trusted(self) -> bool: ...

    @property
    def measured(self) -> bool: ...

    @property
    def origin(self) -> str: ...


def standing(verdict: Standing) -> int:
    """3 for a trusted measurement, 2 for what a program has observed, 1 for a trusted prediction, 0 for what may not be
    served."""
    if not verdict.trusted or not verdict.measured:
        return int(verdict.trusted)
    return 2 if verdict.origin == "observed" else 3
