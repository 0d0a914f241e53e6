"""What a reader of a registry leaves out because it is damaged, counted and said."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

_Record = TypeVar("_Record")


class Damage:
    """The account that a reader keeps.

    label:    of the registry, for people. corrupt: the rows that the last question left out.
    problems: a line for all that was found damaged; each is logged, too.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.problems: list[str] = []
        self.corrupt = 0

    def intact(self, found: Iterable[_Record | None]) -> list[_Record]:
        """Those that are not None, which stands for a damaged row."""
        records = list(found)
        kept = [record for record in records if record is not None]
        self.count_lost(len(records) - len(kept))
        return kept

    def count_lost(self, lost: int) -> None:
        """Says that so many rows were left out: for who reads them one by one."""
        self.corrupt = lost
        if lost:
            self.note(f"left out {lost} damaged rows")

    def note(self, text: str) -> None:
        """Adds a line to the problems."""
        self.problems.append(f"registry {self.label}: {text}")
        import logging  # most registries are whole

        logging.getLogger("tilebook.registry").warning("%s", self.problems[-1])
