"""Models of transformers that are patched by themselves: each when it is first called, as by `tilebook.patch`."""

from __future__ import annotations

import functools
import logging
import threading
import warnings
import weakref
from typing import Any

from torch import nn

from tilebook.patching import Report, patch
from tilebook.trial import Forward, undisturbed

_log = logging.getLogger("tilebook")


class EveryModel:
    """Whether models are patched that are made from now on, and what was changed so far."""

    def __init__(self) -> None:
        self._on = False
        self._lock = threading.Lock()
        self._reports = weakref.WeakKeyDictionary[nn.Module, Report]()
        self._copies = weakref.WeakSet[Forward]()

    def turn(self, on: bool) -> None:
        """On: from now on. Off: what was patched is as it was, and what waits for its first call stays so."""
        with self._lock:
            self._on = on
            reports = [] if on else list(self._reports.values())
            copies = [] if on else list(self._copies)
            if not on:
                self._reports.clear()
                self._copies.clear()
        for report in reports:
            report.undo()
        for each in copies:
            if each.args[0].__dict__.get("forward") is each:
                del each.args[0].forward

    @property
    def patched(self) -> int:
        """How many models are."""
        return sum(bool(report.changed) for report in list(self._reports.values()))

    def made(self, model: nn.Module) -> None:
        """Told of a model, or a part of one, that has all its modules, perhaps without their weights."""
        if self._on and _first_call not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(_first_call)

    def called(self, model: nn.Module) -> None:
        """Told of a model's first call."""
        for each in model.modules():  # parts of it, which were told of before it, are patched with it
            for key in [key for key, hook in each._forward_pre_hooks.items() if hook is _first_call]:
                each._forward_pre_hooks.pop(key, None)  # another thread may have been first
        if not self._on:
            return
        try:
            report = patch(model)
        except Exception as broken:  # the model runs as it is
            text = f"tilebook: {type(model).__name__} is not patched: {type(broken).__name__}: {broken}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
            return
        for forward in report.forwards:
            forward.told = _copied
        with self._lock:
            self._reports[model] = report
        _log.info("%s: %s", type(model).__name__, report)

    def copied(self, forward: Forward) -> None:
        """Told of what a copy of a module that was patched calls, or one that was stored and loaded."""
        with self._lock:
            self._copies.add(forward)


every_model = EveryModel()
"""The program's own."""


def _copied(forward: Forward) -> None:
    every_model.copied(forward)


def _first_call(model: nn.Module, args: Any) -> None:
    """Stands before a model's first call. What is traced and the like runs as it is, and is told of again."""
    if undisturbed():
        every_model.called(model)


def watch() -> None:
    """Has transformers tell of models that it makes; calling it twice is calling it once."""
    from transformers import PreTrainedModel

    made = PreTrainedModel.post_init
    if hasattr(made, "_told"):
        return

    @functools.wraps(made)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = made(self, *args, **kwargs)
        every_model.made(self)
        return found

    post_init._told = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init
