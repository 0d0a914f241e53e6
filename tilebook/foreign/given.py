"""A kernel without an autotuner, its space given from outside: an autotuner whose config the program names."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from triton.runtime.autotuner import Autotuner

from tilebook.errors import UsageError
from tilebook.foreign.call import heuristic
from tilebook.foreign.grids import SAME, Grid, Written, followed, plain
from tilebook.foreign.kernel import Kernel, descriptors
from tilebook.foreign.serving import FAILURES, Served, once, say

OPTIONS = {"num_warps": 4, "num_stages": 2 if torch.version.hip else 3, "num_ctas": 1}
"""What a launch may leave to Triton, and what Triton takes then."""


class Setting:
    """A config that sets the axes of a space, and nothing else."""

    pre_hook = None

    def __init__(self, axes: Mapping[str, Any]) -> None:
        self.kwargs = dict(axes)

    def all_kwargs(self) -> dict[str, Any]:
        return dict(self.kwargs)


class Given(Autotuner):  # type: ignore[misc]
    """Stands before a kernel: where a verdict covers a call, its config takes the place of what the program passes.

    Of the key are the arguments named for it, all constexprs, and what the program passes for the axes. The rest of a
    call is as the program has it. grid: None, "same", or the grid's dimensions as texts: see `tilebook.give_space`.
    """

    given = True

    def __init__(self, kernel: Any, configs: Iterable[Mapping[str, Any]], key: Sequence[str] = (), grid: Any = None):
        """Raises UsageError for axes, keys and grids that the kernel does not have."""
        super().__init__(kernel, kernel.arg_names, [Setting(each) for each in configs], [], None, None)
        descriptors()
        self.kernel, self.cache = Kernel(self), Served(self, {})
        self.axes = {axis: {each.kwargs[axis] for each in self.configs} for axis in self.configs[0].kwargs}
        parameters = inspect.signature(self.base_fn).parameters
        constants = [n for n, p in parameters.items() if "constexpr" in str(p.annotation)]
        constants = self._constants = [name for name in constants if name not in self.kernel.heuristics]
        for name in self.axes:
            if name not in constants and name not in OPTIONS:
                raise UsageError(f"{self.kernel.op}: {name} is none of its constexprs and of {', '.join(OPTIONS)}")
        for name in key:
            if name not in self.arg_names or name in self.axes:
                raise UsageError(f"{self.kernel.op}: its key cannot have {name}, an axis or no argument of it")
        self.keys = [*dict.fromkeys([*key, *(name for name in constants if name not in self.axes)]), *self.axes]
        self._usual = {**OPTIONS, **{n: p.default for n, p in parameters.items() if p.default is not p.empty}}
        self._grid = grid if grid in (None, SAME) else Written(grid, {*self.arg_names, *self.axes})
        self._plain = kernel.run

    def called(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in the place of the kernel's own `run`."""
        return self.run(*args, **kwargs)

    def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        chosen = None if warmup else self._chosen(args, kwargs, grid)
        if chosen is None:
            return self._plain(*args, grid=grid, warmup=warmup, **kwargs)
        its, whole = chosen
        try:
            return self._plain(grid=its, warmup=False, **whole)
        except FAILURES:
            self.cache.withdraw()
        return self._plain(*args, grid=grid, warmup=False, **kwargs)

    def key(self, given: Mapping[str, Any]) -> tuple[Any, ...]:
        """What an autotuner's key is of a call. Raises UsageError where the program passes what the space has not."""
        values = [self._passed(given, name) for name in self.keys]
        for (name, known), value in zip(self.axes.items(), values[-len(self.axes) :], strict=True):
            if value not in known:
                raise UsageError(f"{name}={value}, which the program passes, is not in the space of {self.kernel.op}")
        tensors = (given[name] for name in self.arg_names if name in given)
        return (*values, *(str(each.dtype) for each in tensors if hasattr(each, "dtype")))

    def grid(self, grid: Any, given: Mapping[str, Any], config: Setting) -> Grid | None:
        """The grid of a call that this config runs, None where nothing says it.

        Raises UsageError where the program's own is not what the space says."""
        usual, its = self.usual(given), self._meta({**given, **config.kwargs})
        changed = self._changed(given, config)
        if isinstance(self._grid, Written):
            own, written = plain(grid, usual), self._grid(usual)
            if own != written:
                raise UsageError(f"{self.kernel.op} runs on the grid {own}, and its space says {written}")
            return self._grid(its)
        if self._grid == SAME or not changed:
            return plain(grid, usual)
        if (found := followed(grid, its, self._constants)) is None:
            fixed = f"{', '.join(changed)} of {self.kernel.op} stays as the program passes it: the grid does not"
            once(f"tilebook: {fixed} follow it, and its space does not say how")
        return found

    def usual(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a launch as the program passes them."""
        return self._meta({**given, **{name: self._passed(given, name) for name in self.axes}})

    def prune_configs(self, kwargs: Mapping[str, Any]) -> list[Any]:
        del kwargs
        return list(self.configs)

    def _passed(self, given: Mapping[str, Any], name: str) -> Any:
        value = given.get(name, self._usual.get(name))
        return value.value if type(value).__name__ == "constexpr" else value

    def _changed(self, given: Mapping[str, Any], config: Setting) -> list[str]:
        """The constexprs that a config sets to something else than the program passes."""
        axes = (name for name in self.axes if name not in OPTIONS)
        return [name for name in axes if self._passed(given, name) != config.kwargs[name]]

    def _meta(self, given: Mapping[str, Any]) -> dict[str, Any]:
        whole = {**self._usual, **given}
        return {**whole, **heuristic(self.kernel, whole)}

    def _chosen(self, args: Sequence[Any], kwargs: Mapping[str, Any], grid: Any) -> Any:
        """The grid of a verdict's config and the call's arguments with it; None where the program's own call stays."""
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        try:
            if (key := self.key(given)) not in self.cache:
                return None
            config = self.cache[key]
            its = self.grid(grid, given, config) if self._changed(given, config) else grid
        except Exception as broken:  # the program does without
            say(self, broken)
            return None
        return None if its is None else (its, {**given, **config.kwargs})
