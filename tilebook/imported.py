"""What is to be done once a module of somebody else's has been imported, without importing it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, call: Callable[[], None]) -> None:
    """Calls it once the module is there: now if it has been imported, else at the end of its first import.

    What goes wrong in it is a warning: it must not break somebody's import.
    """
    if name in sys.modules and not _importing(name):
        _attempt(name, call)
    elif not any(isinstance(finder, _Finder | _Later) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, (_Later if name in sys.modules else _Finder)(name, call))


def _importing(name: str) -> bool:
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

    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self.name, self._call = name, call

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
            _attempt(self.name, self._call)

        exec_module.told = self  # type: ignore[attr-defined]
        loader.exec_module = exec_module
        return spec


class _Later(MetaPathFinder):
    """Finds nothing; at the first import after that of its module has ended, it takes itself out and calls."""

    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self.name, self._call = name, call

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if _importing(self.name):
            return
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            _attempt(self.name, self._call)
