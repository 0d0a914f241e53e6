"""What is to be done once a module of somebody else's has been imported, without importing it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, call: Callable[[], None], failed: bool = False) -> None:
    """Calls it once the module is there: now if it has been imported, else at the end of its first import.

    With failed also at the end of an import that is under way and fails. What goes wrong in it is a warning: it must
    not break somebody's import.
    """
    if importing(name):
        _at_its_end(name, call, failed)
        return
    if name in sys.modules:
        _attempt(name, call)
        return
    known = next((each for each in sys.meta_path if isinstance(each, _Finder) and each.name == name), None)
    if known is None:
        sys.meta_path.insert(0, known := _Finder(name))
    known.calls[call] = None


def importing(name: str) -> bool:
    """Is its import under way, perhaps below us?"""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


def _attempt(name: str, call: Callable[[], None]) -> None:
    try:
        call()
    except Exception as broken:
        what = f"tilebook: nothing was done about {name}: {type(broken).__name__}: {broken}"
        warnings.warn(what, RuntimeWarning, stacklevel=3)


class _Finder(MetaPathFinder):
    """Finds one module as the other finders do, and takes itself out."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: dict[Callable[[], None], None] = {}  # in the order in which they were asked for

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((found for each in others if (found := each.find_spec(fullname, path, target)) is not None), None)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        load = loader.exec_module
        if getattr(load, "told", None) is self:  # somebody looked before whether it is there
            return spec

        def exec_module(module: ModuleType) -> None:
            if getattr(module.__spec__, "name", None) != self.name:  # a loader may be that of others, too
                load(module)
                return
            del loader.exec_module
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            for call in self.calls:
                _attempt(self.name, call)

        exec_module.told = self  # type: ignore[attr-defined]
        loader.exec_module = exec_module
        return spec


class _Watched(ModuleSpec):
    """The spec of a module whose import is under way, whose end Python notes in it."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            for call, failed in self.__dict__.pop("_tilebook", {}).items():
                if failed or self.name in sys.modules:
                    _attempt(self.name, call)


def _at_its_end(name: str, call: Callable[[], None], failed: bool) -> None:
    spec: Any = sys.modules[name].__spec__
    spec.__dict__.setdefault("_tilebook", {})[call] = failed
    spec.__class__ = _Watched
