"""Where calls are met: functions in the places of dispatch's, of families' and of CUDA graphs'."""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import tilebook
from tilebook import dispatch, left, native
from tilebook.call import Entry
from tilebook.dispatch.choice import Choice
from tilebook.frames import as_it_is
from tilebook.native import gates
from tilebook.profiling.notes import Notes, key_of, stamp

_FIRST_S, _EVERY_S, _WINDOW_S = 1.5, 3.0, 0.3
"""Calls are timed so long after the first one, or until there are times enough; and then so often for so long."""

_NODES = 64  # of a graph, where those of one call are looked for
_TICK_S = 0.05
_OTHERS_S, _GRACE_S = 1.0, 10.0  # until other processes have come so far, and until a program has to have ended

_OF_PARTS = frozenset({"mlp", "swiglu", "geglu", "linear_cross_entropy"})
"""Functions that do more than the op by which they are left to PyTorch: their time is not that op's."""

_BELOW = frozenset({"attention_fwd", "rms_norm_fwd", "layer_norm_fwd"})
"""Ops whose calls are met below PyTorch's autograd, where they are served there."""


class Watching:
    """Ends the program, as by Ctrl-C, so many seconds after its first call or after so many calls, if told to.

    put: how functions take the places of others.
    """

    def __init__(
        self, folder: Path, seconds: float | None, calls: int | None, put: Callable[[Any, str, Any], None] = setattr
    ) -> None:
        self._folder, self._seconds, self._calls, self._put = folder, seconds, calls, put
        self.notes = Notes(lambda: threading.Thread(target=self._run, name="tilebook profile", daemon=True).start())
        self._graphs: weakref.WeakKeyDictionary[Any, Counter[Any]] = weakref.WeakKeyDictionary()
        self._lock, self._stop, self._state, self._asking = threading.RLock(), threading.Event(), "", False

    def watch(self) -> None:
        """From now on. Families are imported first: who imports them later has functions that are watched.

        Calls that C++ would answer in these functions' places are Python's, where they are met.
        """
        gates.close()
        for name, place in tilebook._MODULE.items():
            if place.startswith("kernels.") and name not in _OF_PARTS:
                owner: Any = importlib.import_module(f"tilebook.{place}")
                function = getattr(owner, name)
                watched = self._public(function)
                for each in {tilebook, owner, sys.modules[function.__module__]}:
                    self._put(each, name, watched)
        enabling: Any = importlib.import_module("tilebook.enabling")
        graph: Any = torch.cuda.CUDAGraph
        for place_, name, made in (
            (Choice, "__call__", self._call),
            *((dispatch, name, self._looking) for name in ("known", "lookup", "choose")),
            (Entry, "left_to_pytorch", self._leaving),
            (left, "_allows", self._allowing),
            (native._Serving, "answer", self._answer),
            *((enabling, name, self._passing) for name in ("pytorchs", "losses_pytorchs")),
            (graph, "capture_begin", self._capture_begin),
            (graph, "capture_end", self._capture_end),
            (graph, "replay", self._replay),
        ):
            self._put(place_, name, made(getattr(place_, name)))

    def _call(self, original: Any) -> Callable[..., Any]:
        def call(choice: Choice, *args: Any) -> Any:
            self.notes.thread.looked = None
            if choice.source == "forced":  # which nobody keeps
                self.notes.more[key_of(choice)] += 1
            if not self.notes.times(args[0]):
                return original(choice, *args)
            return self.notes.timed(choice, args[0], lambda: original(choice, *args))

        return call

    def _looking(self, original: Any) -> Callable[..., Any]:
        def looking(*args: Any) -> Any:
            found = original(*args)
            self.notes.thread.looked = found or self.notes.thread.looked
            return found

        return looking

    def _leaving(self, original: Any) -> Callable[..., Any]:
        """What PyTorch's dispatcher is to serve is chosen anew at each call, and no choice that is kept counts it."""

        def leaving(entry: Any, posed: Any, tensors: Any) -> bool:
            left_: bool = original(entry, posed, tensors)
            if left_ and (choice := self.notes.thread.looked) is not None and not _below(choice):
                self.notes.more[key_of(choice)] += 1
            return left_

        return leaving

    def _allowing(self, original: Any) -> Callable[..., Any]:
        def allowing(found: Any, recorded: bool, tensors: Any) -> bool:
            allowed: bool = original(found, recorded, tensors)
            if allowed and found.choice is not None:
                self.notes.thread.looked = found.choice
                found.choice.calls -= _below(found.choice)  # it is counted there
            return allowed

        return allowing

    def _passing(self, original: Any) -> Callable[..., Any]:
        """What is known to be PyTorch's goes to our function all the same, which leaves it, where it is timed."""

        def passing(*args: Any) -> bool:
            return (torch.compiler.is_compiling() or not self.notes.times()) and bool(original(*args))

        return passing

    def _public(self, function: Any) -> Callable[..., Any]:
        """What it leaves to PyTorch takes as long as it does."""

        @functools.wraps(function)
        def watched(*args: Any, **options: Any) -> Any:
            if torch.compiler.is_compiling() or not self.notes.times():
                return function(*args, **options)
            first = next((x for x in (*args, *options.values()) if isinstance(x, torch.Tensor)), None)
            if first is None or not self.notes.times(first):
                return function(*args, **options)
            thread, since = self.notes.thread, torch._C._autograd._get_sequence_nr()
            thread.looked, device = None, first.get_device() if first.is_cuda else None
            start = stamp(device)
            result = function(*args, **options)
            choice, thread.looked = thread.looked, None
            if choice is not None and not _below(choice):
                with suppress(Exception):
                    self.notes.note(choice, start, device)
                    self._follow(choice, result if isinstance(result, tuple) else (result,), since, device)
            return result

        return watched

    def _follow(self, choice: Choice, outputs: tuple[Any, ...], since: int, device: int | None) -> None:
        """Has the gradients of a call that was left timed, from the first node of its graph to the last."""
        root = next((x.grad_fn for x in outputs if isinstance(x, torch.Tensor) and x.grad_fn is not None), None)
        backward, compiled = dispatch.backward_of(choice), sys.modules.get("torch._dynamo.compiled_autograd")
        if root is None or backward is choice or getattr(compiled, "compiled_autograd_enabled", False):
            return
        nodes, started = list(_nodes(root, since)), list[Any]()

        @as_it_is
        def begin(*_: Any) -> None:
            started.clear()
            if self.notes.times() and (device is None or not torch.cuda.is_current_stream_capturing()):
                started.append(stamp(device))

        @as_it_is
        def end(*_: Any) -> None:
            if started:
                self.notes.note(backward, started.pop(), device, key_of(choice))

        if 0 < len(nodes) < _NODES:
            root.register_prehook(begin)
            min(nodes, key=lambda node: node._sequence_nr()).register_hook(end)

    def _answer(self, original: Any) -> Callable[..., Any]:
        """PyTorch's kernel, for a call that C++ would leave to it, in Python, where it can be timed."""

        @as_it_is
        def answer(serving: Any, name: str, args: tuple[Any, ...]) -> Any:
            found = outputs, decision, choice = original(serving, name, args)
            if choice is None or outputs is not None:
                return found
            choice.calls += self._asking  # else who knows it counts it
            if not self.notes.times(args[0]):
                return found
            op = getattr(torch.ops.aten, name.removeprefix("aten::")).default
            named = [each.name for each in op._schema.arguments if each.kwarg_only]
            count = len(args) - len(named)
            options = dict(zip(named, args[count:], strict=True))
            try:
                outputs = self.notes.timed(choice, args[0], lambda: op(*args[:count], **options))
            except Exception:
                return found  # PyTorch's own call will say so
            return outputs, decision, choice

        return answer

    def _capture_begin(self, original: Any) -> Callable[..., Any]:
        @functools.wraps(original)
        def capture_begin(graph: Any, *args: Any, **options: Any) -> Any:
            self._graphs[graph] = self.notes.counts()
            original(graph, *args, **options)
            self.notes.capturing += 1

        return capture_begin

    def _capture_end(self, original: Any) -> Callable[..., Any]:
        """Calls that were captured count with each replay."""

        @functools.wraps(original)
        def capture_end(graph: Any) -> Any:
            self.notes.capturing -= 1
            captured = self.notes.counts()
            captured.subtract(self._graphs.pop(graph, captured))
            self.notes.more.subtract(captured)
            self._graphs[graph] = captured
            original(graph)

        return capture_end

    def _replay(self, original: Any) -> Callable[..., Any]:
        @functools.wraps(original)
        def replay(graph: Any) -> Any:
            self.notes.more.update(self._graphs.get(graph, {}))
            original(graph)

        return replay

    def _run(self) -> None:
        """Opens and closes windows, until it is time to end."""
        begun, first = time.perf_counter(), True
        while not self._stop.wait(_TICK_S):
            age = time.perf_counter() - begun
            first = first and age < _FIRST_S and not self.notes.enough()
            self._turn(first or age % _EVERY_S < _WINDOW_S)
            over = self._seconds is not None and age >= self._seconds
            over = over or (self._calls is not None and self.notes.made() >= self._calls)
            if over and not self.notes.capturing:
                self.finish("limit")
                self._stop.clear()
                for wait_s, number in ((_OTHERS_S, signal.SIGINT), (_GRACE_S, signal.SIGTERM)):
                    if self._stop.wait(wait_s):  # it has come to its end
                        return
                    os.kill(os.getpid(), number)

    def _turn(self, to: bool) -> None:
        extension = native._serving._extension
        self.notes.open, self._asking = to, to and extension is not None
        if extension is not None:
            extension.ask(to or dispatch.forced())

    def forked(self) -> None:
        """In a process that was forked off: the calls until now are its parent's."""
        self._lock, self._stop, self._state, self._asking = threading.RLock(), threading.Event(), "", False
        self.notes.reset()
        self.notes.more.subtract(self.notes.counts())

    def finish(self, state: str = "done") -> None:
        """Writes what was noted, once. Whatever goes wrong, the program ends as it would."""
        self._stop.set()
        with self._lock, suppress(Exception):
            if self._state:
                return
            self._state = state
            self._turn(False)
            try:
                self.write({"state": state, **(self.notes.found() if self.notes.first is not None else {})})
            except Exception as broken:
                self.write({"state": "failed", "why": f"{type(broken).__name__}: {broken}"})

    def write(self, data: dict[str, Any]) -> None:
        """As what this process has noted."""
        place = self._folder / f"{os.getpid()}.json"
        aside = place.with_suffix(".part")
        aside.write_text(json.dumps(data), encoding="utf-8")
        aside.replace(place)


def _below(choice: Choice) -> bool:
    """Is the call met again below PyTorch's autograd, when PyTorch's own function serves it?"""
    op, problem = choice.implementation.op.name, choice.problem
    masked = getattr(problem, "bias", "") or (op == "attention_fwd" and getattr(problem, "dtype", "") == "fp32")
    return bool(native._serving._standings) and op in _BELOW and not masked


def _nodes(root: Any, since: int) -> Iterator[Any]:
    """The nodes of a graph that were made since then, so many at most."""
    seen, waiting = {root}, [root]
    while waiting and len(seen) < _NODES:
        node = waiting.pop()
        if since <= node._sequence_nr() < 1 << 62:  # that of a leaf's is the largest number
            yield node
            new = {other for other, _ in node.next_functions if other is not None} - seen
            seen |= new
            waiting += new
