"""What a module computes with beside its weights: is it what it was when the module was tried?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from tilebook.hooks import hooked

_NUMBERS = int, float, bool, str, type(None)
_NOT_ASKED = frozenset(vars(nn.Module())) | {"_is_hf_initialized"}


class _Part:
    """A module: its class's code, its children by name, and the numbers and functions among its attributes."""

    def __init__(self, module: nn.Module, without: frozenset[str]) -> None:
        self.module, self.code = module, type(module).forward
        self.children = tuple((name, each) for name, each in module._modules.items() if name not in without)
        self.values = tuple(
            (name, each)
            for name, each in vars(module).items()
            if name not in _NOT_ASKED and (type(each) in _NUMBERS or callable(each))
        )

    def __getstate__(self) -> dict[str, Any]:  # of a class's code not each has a name to be stored by
        return {name: each for name, each in vars(self).items() if name != "code"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.code = type(self.module).forward

    def same(self) -> bool:
        module = self.module
        if type(module).forward is not self.code:
            return False
        now: Any = module.__dict__
        for name, each in self.values:
            found = now.get(name)
            if found is not each and (type(found) is not type(each) or found != each):
                return False
        now = module._modules
        for name, each in self.children:  # noqa: SIM110
            if now.get(name) is not each:
                return False
        return True


class Beside:
    """All that is in a module, except for some of its layers."""

    def __init__(self, module: nn.Module, layers: frozenset[str] = frozenset()) -> None:
        self.outer = _Part(module, layers)
        self.inner = tuple(_inner(module, layers))

    def same(self) -> bool:
        """Is it as it was, and does nobody listen to what is in it?"""
        if not self.outer.same():
            return False
        for each in self.inner:
            if "forward" in each.module.__dict__ or not each.same() or hooked(each.module):
                return False
        return True


def _inner(module: nn.Module, layers: frozenset[str] = frozenset()) -> Iterator[_Part]:
    for name, each in module.named_children():
        if name not in layers:
            yield _Part(each, frozenset())
            yield from _inner(each)
