"""The registries of one process, first hit first: the explicit one, the user's, the one this package ships."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tilebook.registry.backend import RegistryError, Target
from tilebook.registry.records import Device, Verdict
from tilebook.registry.store import Registry

REGISTRY_VARIABLE = "TILEBOOK_REGISTRY"
SHIPPED = Path(__file__).parent.parent / "registry.db"


class Layers:
    """Ordered (name, target) pairs. Reading never raises: what cannot be read becomes a line in `problems`."""

    def __init__(self, layers: Sequence[tuple[str, str]]) -> None:
        self.layers = list(layers)
        self.problems: list[str] = []

    @classmethod
    def default(cls, explicit: str | Path | None = None) -> Self:
        """ "explicit" (the argument, else $TILEBOOK_REGISTRY, where given), "user", "shipped"."""
        import platformdirs

        first = str(explicit or os.environ.get(REGISTRY_VARIABLE, ""))
        user = Path(platformdirs.user_data_dir("tilebook", appauthor=False)) / "registry.db"
        layers = [("explicit", first)] if first else []
        return cls([*layers, ("user", str(user)), ("shipped", str(SHIPPED))])

    def verdicts(
        self, *, op: str | None = None, problem: str | None = None, device: Device | None = None
    ) -> list[tuple[str, Verdict]]:
        """One verdict for each (op, problem, device, kernel), with the name of its layer; the first layer wins.

        But as within one registry, evidence goes first: a prediction does not hide a trusted measurement in a later
        layer, and a verdict that may not be served hides none that may. Refreshes `problems`; a user or shipped
        registry that simply does not exist is not one.
        """
        self.problems = []
        best: dict[tuple[str, str, Device, str], tuple[str, Verdict]] = {}
        for name, target in self.layers:
            for verdict in self._read(name, target, op, problem, device):
                key = (verdict.op, verdict.problem, verdict.device, verdict.kernel)
                if key not in best or _standing(verdict) > _standing(best[key][1]):
                    best[key] = (name, verdict)
        return list(best.values())

    def writer(self) -> Registry:
        """The first layer that can be written, opened for it: the explicit one and no other, where there is one."""
        problems = []
        for name, target in self.layers:
            if name == "shipped":
                continue
            try:
                return Registry.open(target, write=True)
            except RegistryError as error:
                if name == "explicit":
                    raise
                problems.append(str(error))
        raise RegistryError("no registry can be written: " + ("; ".join(problems) or "there is no user layer"))

    def _read(
        self, name: str, target: str, op: str | None, problem: str | None, device: Device | None
    ) -> list[Verdict]:
        try:
            path = Target.parse(target).path
            if name != "explicit" and path is not None and not path.exists():
                return []
            with Registry.open(target) as registry:
                found = registry.verdicts(op=op, problem=problem, device=device)
                if registry.corrupt:
                    self.problems.append(f"registry {registry.label}: left out {registry.corrupt} damaged rows")
                return found
        except (RegistryError, OSError) as error:
            self.problems.append(str(error))
            return []


def _standing(verdict: Verdict) -> int:
    return 0 if not verdict.trusted else 2 if verdict.measured else 1
