"""Verdicts for the autotuners of a program: looked up by key when one asks for the first time, remembered by itself."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import triton
from triton.runtime.errors import OutOfResources, PTXASError

from tilebook import device as devices
from tilebook.device import Device, package_version
from tilebook.dispatch.agreement import Agreement
from tilebook.foreign.kernel import IMPLEMENTATION, Kernel, Unfit
from tilebook.op import Config
from tilebook.registry import ledger, serving
from tilebook.registry.current import may_run, stands
from tilebook.registry.layers import DenyList
from tilebook.registry.lookup import Question
from tilebook.registry.records import Device as Model
from tilebook.registry.records import Miss

FAILURES = (OutOfResources, PTXASError, triton.CompilationError)
"""What a config raises that does not fit, before any kernel has run."""

_EFFICIENCY = 0.5  # of the memory's bandwidth, by which a missed call's time is estimated


class Book:
    """The registries as one program has read them, for the GPU model that it runs on."""

    def __init__(self, gpu: Device, registry: str | None = None) -> None:
        self.gpu = gpu
        self._table = serving.read(*gpu.identity, registry)
        self._warned: set[str] = set()
        self._agreement = Agreement()

    def chosen(self, kernel: Kernel, problem: str, measured: bool) -> list[Config]:
        """As `ranked`; all processes of a distributed program run what the first of them that asks has found."""
        ranked = self.ranked(kernel, problem, measured)
        self._agreement.begun()
        mine = IMPLEMENTATION, dict(ranked[0]) if ranked else None, "exact", kernel.digest
        op: Any = SimpleNamespace(name=kernel.op, digest=kernel.digest)
        decided = self._agreement.settle(op, cast(Any, SimpleNamespace(key=problem)), self.gpu, mine)
        if decided == mine:
            return ranked
        theirs = Config(decided[1] or {})
        return [theirs] if decided[3] == kernel.digest and theirs in kernel.configs else []

    def ranked(self, kernel: Kernel, problem: str, measured: bool) -> list[Config]:
        """What a verdict on exactly this problem has to offer of this kernel's configs, best first.

        measured: what was only predicted counts for nothing.
        """
        found = self._table.find(Question(kernel.op, kernel.digest, problem)).exact
        self._warn()
        if (
            found is None
            or not found.trusted
            or not stands(found, kernel.digest)
            or not (found.measured or not measured)
        ):
            return []
        denied = DenyList(self._table.revocations, package_version("triton"))
        ranked = [Config(each.config) for each in found.finalists if may_run(found, each.implementation, kernel.digest)]
        return [each for each in ranked if each in kernel.configs and not self._denied(denied, kernel, each)]

    def allowed(self, kernel: Kernel, configs: Sequence[Any]) -> list[Any]:
        """Those of an autotuner's configs that nobody has revoked; all, where none would be left."""
        denied = DenyList(self._table.revocations, package_version("triton"))
        if kernel.op not in denied.ops:
            return list(configs)
        return [each for each in configs if not self._denied(denied, kernel, kernel.config(each))] or list(configs)

    def _denied(self, denied: DenyList, kernel: Kernel, config: Config) -> bool:
        return denied.find(kernel.op, kernel.digest, self.gpu.arch, IMPLEMENTATION, config) is not None

    def _warn(self) -> None:
        for problem in self._table.problems:
            if problem not in self._warned:
                self._warned.add(problem)
                warnings.warn(f"tilebook: {problem}; kernels run without its verdicts", RuntimeWarning, stacklevel=4)


_books: dict[str, Book] = {}


def book() -> Book:
    """The program's own, for the GPU that is current. Raises Unfit where there is none."""
    import torch

    if not devices.present():
        raise Unfit("there is no GPU here")
    gpu = devices.current(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    if gpu.name not in _books:
        _books[gpu.name] = Book(gpu)
    return _books[gpu.name]


def reload() -> None:
    """Forgets what was read; what an autotuner has been told it keeps."""
    _books.clear()


_Called = tuple[tuple[Any, ...], Mapping[str, Any]]


class _UnderWay(threading.local):
    """The call of an autotuner that this thread has come to last, until it is done: its object, and what it is called
    with. An autotuner's own `nargs` are those of whichever thread has come last."""

    call: tuple[Any, tuple[Any, ...], Mapping[str, Any]] | None = None


under_way = _UnderWay()


class Served(dict[Any, Any]):
    """An autotuner's memory, which knows a verdict where it would be searched for.

    Of what no verdict covers it knows nothing, and the autotuner does as ever.
    """

    def __init__(self, tuner: Any, known: dict[Any, Any]) -> None:
        super().__init__(known)
        self._tuner = tuner
        self._kernel: Kernel | None = None
        self._told: dict[Any, Any] = {}  # by key, what a verdict has said; None where there is none
        self._last: Any = None  # the key that was asked about last

    def __contains__(self, key: object) -> bool:
        self._last = key
        return dict.__contains__(self, key) or (key not in self._told and self._found(key))

    def withdraw(self) -> bool:
        """The call that was asked about last has failed. Where a verdict had its config, that config's keys are
        searched for as ever; false where nobody but the program has chosen it, or nothing yet."""
        config = self._told.get(self._last)
        if config is None or self.get(self._last) is not config:
            return False
        for key in [key for key, told in self._told.items() if told is config and self.get(key) is config]:
            del self[key]
        return True

    def forget(self) -> None:
        """What has been looked up: there may be other verdicts now."""
        for key in self._told:
            self.pop(key, None)
        self._told.clear()

    @property
    def kernel(self) -> Kernel:
        if self._kernel is None:
            self._kernel = Kernel(self._tuner)
        return self._kernel

    def _found(self, key: Any) -> bool:
        self._told[key] = None
        call = self._call()
        try:
            ranked = book().chosen(self.kernel, self.kernel.problem(key), measured=True)
            offered = [self.kernel.configs[each] for each in ranked]
            left = offered if call is None or not offered else list(self._tuner.prune_configs(dict(call[1])))
        except Exception as broken:  # the program does without
            say(self._tuner, broken)
            return False
        chosen = next((each for each in offered if each in left), None)
        if chosen is None:
            return False
        self[key] = self._told[key] = chosen
        self._settle(call, chosen, left)
        return True

    def _settle(self, call: _Called | None, config: Any, left: Sequence[Any]) -> None:
        """Has the call's tensors set anew as the autotuner does after a search among what its rules have left: it
        would have searched now."""
        if call is not None and len(left) > 1:
            args, kwargs = call
            named = dict(zip(self._tuner.arg_names, args, strict=False))
            self._tuner.pre_hook({**named, **kwargs, **config.all_kwargs()}, reset_only=True)

    def _call(self) -> _Called | None:
        """What the autotuner is called with in this thread, if that is known."""
        call = under_way.call
        return call[1:] if call is not None and call[0] is self._tuner else None


_said: set[str] = set()


def say(tuner: Any, broken: Exception) -> None:
    """Why no verdict for its call can be looked up."""
    if isinstance(broken, Unfit):
        return  # it cannot be in a registry
    name = getattr(getattr(tuner, "base_fn", None), "__name__", "a kernel")
    once(f"tilebook: no verdict for {name} can be looked up ({type(broken).__name__}: {broken})")


def once(text: str) -> None:
    """A warning that a program gives once."""
    if text not in _said:
        _said.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=4)


_MOST_MISSED = 10_000
_missed: dict[tuple[str, str, Model], list[float]] = {}


def missed(kernel: Kernel, problem: str, gpu: Device, moved: int) -> list[float]:
    """The counter of a problem's calls that no verdict covers, to be raised with each; of so many problems as anybody
    would tune. moved: bytes of a call."""
    time_ms = 1e3 * moved / gpu.bandwidth / _EFFICIENCY
    if len(_missed) >= _MOST_MISSED:
        return [0, time_ms]
    return _missed.setdefault((kernel.op, problem, Model(*gpu.identity)), [0, time_ms])


def misses() -> list[Miss]:
    """What this process asked for and no verdict covers."""
    found = ((key, int(calls), time_ms) for key, (calls, time_ms) in _missed.items())
    return [Miss(*key, calls, time_ms) for key, calls, time_ms in found if calls]


def _forked() -> None:
    """Told in a process that was forked off: the calls until now are its parent's to count."""
    for counter in _missed.values():
        counter[0] = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@atexit.register
def _store() -> None:
    with contextlib.suppress(Exception):  # the program is over; what it computed stands
        ledger.count(misses())
