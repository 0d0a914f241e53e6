"""Whether a registry is whole: every page of its file, every reference, the digest of every record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tilebook.errors import RegistryError
from tilebook.registry.contents import Contents
from tilebook.registry.filereader import FileReader, reader
from tilebook.registry.layers import shipped_registry
from tilebook.registry.target import Target

MENDED = ("verdicts", "trials", "misses")
"""What a repair takes out where it is damaged."""


@dataclass(frozen=True)
class Examined:
    """What was found in one layer.

    intact, damaged: how many records of each kind. structure: what is wrong with the file itself, a line each.
    unread:          why it could not be read at all, "" where it could.
    """

    layer: str
    label: str
    intact: Mapping[str, int] = field(default_factory=dict)
    damaged: Mapping[str, int] = field(default_factory=dict)
    structure: Sequence[str] = ()
    unread: str = ""

    @property
    def whole(self) -> bool:
        return not (self.unread or self.structure or any(self.damaged.values()))


def examine(layer: str, target: str) -> Examined | None:
    """Reads all of a layer, and changes nothing; None where there is no such layer."""
    label = target
    try:
        parsed = Target.parse(target)
        path, label = parsed.path, parsed.label
        if layer == "shipped" and path is not None and (text := shipped_registry(path)) is not None:
            return Examined(layer, label, {"verdicts": len(text.verdicts())}, structure=tuple(text.problems))
        if layer != "explicit" and path is not None and not path.exists():
            return None
        with reader(target) as registry:
            return _examined(layer, label, registry)
    except (RegistryError, OSError) as error:
        return Examined(layer, label, unread=str(error))


def _examined(layer: str, label: str, registry: Contents) -> Examined:
    structure = registry.structure() if isinstance(registry, FileReader) else ()
    intact, damaged = {}, {}
    kinds: Mapping[str, Callable[[], Iterable[object]]] = {
        "verdicts": registry.each_line,
        "trials": registry.each_trial,
        "misses": registry.misses,
        "revocations": registry.revocations,
    }
    for kind, read in kinds.items():
        intact[kind] = sum(1 for _ in read())
        damaged[kind] = registry.corrupt
    return Examined(layer, label, intact, damaged, structure)


def lines(examined: Examined) -> Iterator[str]:
    """What was found, for people."""
    head = f"{examined.layer} {examined.label}:"
    if examined.unread:
        yield f"{head} cannot be read"
        yield f"  {examined.unread}"
        return
    counts = [f"{count:,} {_NAMES[kind]}" for kind, count in examined.intact.items() if count]
    yield f"{head} {', '.join(counts) or 'no records'}: {'whole' if examined.whole else 'damaged'}"
    for kind, count in examined.damaged.items():
        if count:
            means = "check --repair moves them to a file" if kind in MENDED else "see show, which names them"
            yield f"  {count:,} damaged {_NAMES[kind]}: {means}"
    for line in examined.structure:
        yield f"  the file itself: {line}"
    if examined.structure and Path(examined.label).is_absolute():
        yield "  where check --repair does not help: export what is left, and import that into a new registry"


_NAMES = {
    "verdicts": "verdicts",
    "trials": "trials",
    "misses": "problems asked for",
    "revocations": "revocations",
}
