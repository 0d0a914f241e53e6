"""PyTorch's own ops, served by recorded launches without Python: what a kernel of ours saves, the host does not lose.

A small extension in C++ (`served.cpp`) stands below PyTorch's autograd. It knows calls again by all that a launch
depends on; what they are served by is asked here, once for each kind of call, and is dispatch's choice as ever. Where
the extension has not been built there are our functions in the places of PyTorch's instead (`tilebook.enabling`).
"""

from __future__ import annotations

import atexit
import importlib.machinery
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.compiler import config

from tilebook import dispatch
from tilebook.determinism import only_warns
from tilebook.dispatch import memo
from tilebook.frames import as_it_is
from tilebook.native import plans
from tilebook.native.build import begin
from tilebook.native.place import NAME, built, whole
from tilebook.op import Op

__all__ = ["Standing", "available", "begin", "serve", "stop"]

_FEW = 4
"""Calls of one kind after which a choice has a plan or never will: the first compiles, the second is recorded. As many
errors in answering for an op are passed over."""


@dataclass(frozen=True)
class Standing:
    """How one of PyTorch's ops is one of ours.

    name:   of PyTorch's op, with its namespace.
    op:     gives ours; loads its kernels.
    posed:  arguments of PyTorch's op → of ours, None where ours does not do the same.
    places: for each argument of ours, which of PyTorch's it is, None for one that is no tensor.
    outputs: arguments of PyTorch's op → its outputs (see `plans.Output`).
    long:   arguments of PyTorch's op → does the GPU take longer for the call than the host for asking who serves it?
    rest:   arguments of PyTorch's op → what of the call ours does not do, which PyTorch's own kernel is asked for.
    serves: may what dispatch has chosen serve in this place at all?
    of_rows: are calls whose first tensor (B, H, S, D) has one row PyTorch's, without being asked about?
    """

    name: str
    op: Callable[[], Op[Any]]
    posed: Callable[[Sequence[Any]], tuple[Any, ...] | None]
    places: tuple[int | None, ...]
    outputs: Callable[[Sequence[Any]], Sequence[plans.Output]]
    long: Callable[[Sequence[Any]], bool] = lambda args: False
    rest: Callable[[Sequence[Any]], plans.Rest | None] = lambda args: None
    serves: Callable[[Any], bool] = lambda choice: True
    of_rows: bool = False


Noted = tuple[dict[int, Any], Callable[..., Any], tuple[float, float]]
"""What is told of notes on masks, see `serve`."""


class _Graphs:
    """Keeps what `torch.compile` traces while this is on apart from what it has traced without, in all its caches.

    They know a program by its code, in which nothing differs.
    """

    def __init__(self) -> None:
        self._mark = ""

    def mark(self, extension: Path) -> None:
        if not self._mark:
            self._mark = f"tilebook-{extension.parent.name}"
            config.cache_key_tag = getattr(config, "cache_key_tag", "") + self._mark

    def unmark(self) -> None:
        if self._mark:
            config.cache_key_tag = getattr(config, "cache_key_tag", "").replace(self._mark, "")
        self._mark = ""


_BESIDE = ("aten::scaled_dot_product_attention", "aten::stack", "aten::add", "aten::linear", "aten::addmm")
"""What the extension puts kernels of its own beside, without asking Python."""


def resolve_anew(names: Iterable[str]) -> None:
    """Has PyTorch's tracers look for kernels of these ops again: they keep what they once found, when it was all."""
    for name in (*names, *_BESIDE):
        space, _, op = name.partition("::")
        packet = getattr(getattr(torch.ops, space), op)
        for overload in packet.overloads():
            getattr(packet, overload)._dispatch_cache.clear()


class _Serving:
    """The extension, once it is loaded, and what it has been told to serve."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._extension: Any = None
        self._failed = False
        self._standings: dict[str, Standing] = {}
        self._failures: dict[str, int] = {}

    def extension(self) -> Any:
        """The module, None where it is not built, does not load or finds no driver."""
        with self._lock:
            if self._extension is None and not self._failed:
                try:
                    loaded = _loaded()
                    self._extension = loaded if loaded is not None and loaded.able() else None
                    if self._extension is not None:
                        self._extension.keys(torch.nn.Parameter, memo.key)
                        dispatch.here.keyed_by(self._extension.key)
                except Exception:  # one that was built for another machine, say
                    self._extension = None
                self._failed = self._extension is None
            return self._extension

    def serve(self, standings: Sequence[Standing], notes: Noted | None = None) -> None:
        extension = self.extension()
        if notes is not None:
            extension.notes(*notes)
        new = [each for each in standings if each.name not in self._standings]
        for each in new:
            self._standings[each.name] = each
            extension.install(each.name, each.of_rows)
        extension.start(self.answer)
        if new:
            resolve_anew(each.name for each in new)
        _graphs.mark(Path(extension.__file__))
        if self._told not in dispatch.here.watchers:
            dispatch.here.watchers.append(self._told)

    def stop(self) -> None:
        if self._extension is not None:
            self._extension.stop()
            _graphs.unmark()

    def _told(self, event: str) -> None:
        """Dispatch has forgotten what it read, is being forced, is no longer, or wants its calls counted."""
        for choice, calls in self._extension.counted():
            if choice is not None:
                choice.calls += calls
        if event != "counted":
            self._extension.ask(dispatch.forced())
            self._extension.clear()

    @as_it_is
    def answer(self, name: str, args: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        """(outputs of this call or None, who serves such calls, their choice): see `served.cpp`."""
        try:
            return self._answer(self._standings[name], args)
        except torch.OutOfMemoryError:
            return None, None, None  # PyTorch's kernel may need less, or says so itself
        except Exception as broken:
            failures = self._failures[name] = self._failures.get(name, 0) + 1
            if failures == 1:
                text = f"tilebook: {name} is PyTorch's: {type(broken).__name__}: {broken}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            # It may have been somebody's signal handler that raised.
            return None, (False if failures > _FEW else None), None

    def _answer(self, standing: Standing, args: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        if only_warns():
            return None, False, None  # PyTorch's own kernels are to tell of themselves
        given = standing.posed(args)
        if given is None:
            return None, False, None
        if args[0].is_cuda and torch.cuda.is_current_stream_capturing():
            # Nothing may be compiled or read now.
            known = dispatch.known(standing.op(), given)
            if known is None or not known.calls:
                return None, None, None
        choice = dispatch.lookup(standing.op(), given)
        probed = choice.probed
        if (choice.native and not probed) or not standing.serves(choice):
            return None, (False if choice.kept and not choice.open else None), choice
        computed = choice(*given)
        outputs, rest = standing.outputs(args), standing.rest(args)
        decision: Any = None
        if choice.plan is not None and not probed:
            decision = plans.translated(choice.plan, args, given, standing.places, outputs, rest)
        if decision is None and choice.calls >= _FEW and not (probed or dispatch.forced() or standing.long(args)):
            decision = False
        theirs = () if rest is None else _pytorchs(standing.name, args, rest)
        there = iter(computed)
        return [_placed(each, there, theirs, args[0].device) for each in outputs], decision, choice


def _pytorchs(name: str, args: Sequence[Any], rest: plans.Rest) -> Sequence[Any]:
    """What PyTorch's own kernel gives of a call: nobody is asked about calls that are made while an answer is found."""
    found = getattr(torch.ops.aten, name.removeprefix("aten::"))(
        *args[: rest.place], rest.flags, *args[rest.place + 1 :]
    )
    return found if isinstance(found, tuple) else (found,)


def _placed(output: plans.Output, computed: Iterator[torch.Tensor], theirs: Sequence[Any], device: torch.device) -> Any:
    """An output of PyTorch's op, where the next of ours is one, and `theirs` are of its own kernel."""
    if isinstance(output, plans.Theirs):
        return theirs[output.number]
    if isinstance(output, plans.Empty):
        return torch.empty(output.shape, dtype=output.dtype, device=device)
    if not isinstance(output, plans.Ours):
        return output
    given = next(computed)
    if plans.fits(given, output):
        return given.as_strided(output.shape, output.strides)
    return given.new_empty_strided(output.shape, output.strides).copy_(given)


def _loaded() -> Any:
    path = built()
    if path is None or not whole(path):
        return None
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(path))
    spec = importlib.util.spec_from_file_location(NAME, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


_graphs = _Graphs()
_serving = _Serving()
atexit.register(_serving.stop)  # no thread is to ask an interpreter that is gone


def available() -> bool:
    """Is the extension there, built for this PyTorch and this Python?"""
    return _serving.extension() is not None


def serve(standings: Sequence[Standing], notes: Noted | None = None) -> None:
    """Has these ops of PyTorch's served by dispatch's choices, in every thread, until `stop`.

    notes: masks whose structure is known, by `id`; what answers for a call with one, given q, k, v, the mask, the scale
           and whether heads are grouped: the result, or None; and how many numbers q times keys are too few for it,
           without gradients and with them.
    """
    _serving.serve(standings, notes)


def stop() -> None:
    """Every call is PyTorch's own again."""
    _serving.stop()
