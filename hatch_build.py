"""What a build does that hatchling cannot: what ships as text becomes the registry that is read at run time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShippedRegistry(BuildHookInterface):
    """Builds tilebook/registry.db into a wheel; for an editable one, where it will be looked for."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        sys.path.insert(0, str(root))
        try:
            from tilebook.registry import shipped
        finally:
            sys.path.remove(str(root))
        package = root / "tilebook"
        if version == "editable":
            shipped.ready(package / "registry.db")
            return
        verdicts, revocations, problems = shipped.read(package / "shipped")
        if problems:
            raise ValueError("; ".join(problems))
        built = Path(self.directory) / "registry.db"
        shipped.build(built, verdicts, revocations)
        build_data["force_include"][str(built)] = "tilebook/registry.db"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        (Path(self.directory) / "registry.db").unlink(missing_ok=True)
