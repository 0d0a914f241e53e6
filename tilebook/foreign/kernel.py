"""Which kernel an autotuner runs, and what its configs and problems are called in a registry."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tilebook import source
from tilebook.errors import UsageError
from tilebook.op import Config
from tilebook.registry.checks import canonical
from tilebook.registry.checks import config as checked
from tilebook.registry.checks import problem as stored

IMPLEMENTATION = "triton"

_OPTIONS = {"num_warps": 4, "num_stages": 3, "num_ctas": 1, "maxnreg": 0}
_ALWAYS = ("num_warps", "num_stages")
_PRODUCTS = ("dot", "mma", "asm", "extern")  # the last two may be anything
_MOST_NAME = 64  # characters of an op's name in a registry


class Unfit(UsageError):
    """A kernel, a config or a call that cannot be written down; the text says why."""


class Kernel:
    """The kernel behind an object of `triton.autotune`.

    module, name: where it can be imported from. outer: the heuristics' values between the autotuner and the kernel.
    """

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner
        self.jit = tuner.fn
        self.heuristics: dict[str, Any] = {}
        while not inspect.isfunction(self.jit.fn):
            self.heuristics |= getattr(self.jit, "values", {})
            self.jit = self.jit.fn
        self.function = self.jit.fn
        self.module = source.module_name(self.function.__module__)
        self.name = _variable(tuner, self.function) or self.function.__qualname__

    @functools.cached_property
    def op(self) -> str:
        """Its name in registries."""
        return op_name(self.module, self.name)

    @functools.cached_property
    def texts(self) -> Mapping[str, str]:
        return source.texts(self.function)

    @functools.cached_property
    def digest(self) -> str:
        """Of the kernel's source and all that it calls in its own package."""
        return source.digest(self.function)

    @property
    def atomic(self) -> bool:
        """May its sums be added in any order, so that two runs differ?"""
        return any("atomic_" in text for text in self.texts.values())

    @property
    def multiplies(self) -> bool:
        """May it multiply matrices, whose numbers a GPU rounds to fewer digits?"""
        return any(word in text for text in self.texts.values() for word in _PRODUCTS)

    def config(self, config: Any) -> Config:
        """A `triton.Config` as registries have it. Raises Unfit."""
        values = dict(config.kwargs)
        for name, usual in _OPTIONS.items():
            value = getattr(config, name, usual)
            value = usual if value is None else value
            if (name in _ALWAYS and hasattr(config, name)) or value != usual:
                values[name] = value
        if getattr(config, "ir_override", None) is not None:
            raise Unfit("a config that replaces the compiler's code is not taken")
        try:
            return Config(checked(values))
        except ValueError as wrong:
            raise Unfit(str(wrong)) from None

    @functools.cached_property
    def configs(self) -> dict[Config, Any]:
        """The autotuner's configs by their names, in its order; those that cannot be written down are left out."""
        found: dict[Config, Any] = {}
        for each in self.tuner.configs:
            try:
                found.setdefault(self.config(each), each)
            except Unfit:
                continue
        return found

    def made(self, config: Config) -> Any:
        """The `triton.Config` of this name: the autotuner's own, where its list has it here too.

        Some lists depend on the GPU, which a process that only compiles does not see.
        """
        if config in self.configs:
            return self.configs[config]
        from triton import Config as TritonConfig

        options: dict[str, Any] = {name: value for name, value in config.items() if name in _OPTIONS}
        if len(hooks := {each.pre_hook for each in self.tuner.configs}) == 1:
            options["pre_hook"] = hooks.pop()
        return TritonConfig({name: value for name, value in config.items() if name not in _OPTIONS}, **options)

    def problem(self, key: Sequence[Any]) -> str:
        """What a verdict is stored under, of the autotuner's own key. Raises Unfit."""
        values = list(key)
        dtypes: list[str] = []
        while values and isinstance(values[-1], str) and values[-1].startswith("torch."):
            written = values.pop()
            dtypes.insert(0, _SHORT.get(written, written.removeprefix("torch.")))
        names = self.tuner.keys if len(self.tuner.keys) == len(values) else [f"k{n}" for n in range(len(values))]
        text = canonical({"dtype": ",".join(dtypes), "key": dict(zip(names, map(_plain, values), strict=True))})
        try:
            return stored(text)
        except ValueError as wrong:
            raise Unfit(f"its key cannot be written down: {wrong}") from None


def op_name(module: str, name: str) -> str:
    """A kernel's name in registries: module:kernel, the module in short where that is too long."""
    if len(whole := f"{module}:{name}") <= _MOST_NAME:
        return whole
    package, short = module.split(".")[0], hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{package}.{short}:{name[: _MOST_NAME - len(package) - len(short) - 2]}"


_SHORT = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}


def split(dtypes: str) -> list[str]:
    """The texts that stand in an autotuner's key for the dtypes of a problem."""
    whole = {short: text for text, short in _SHORT.items()}
    return [whole.get(each, f"torch.{each}") for each in dtypes.split(",") if each]


def _plain(value: Any) -> str | int | float | bool | None:
    """A key's value as JSON has it; of what JSON has not, a dtype for one, the text."""
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = "" if isinstance(value, torch.Tensor) else str(value)  # whose numbers are nobody's
    if not 0 < len(text) <= 64 or " at 0x" in text:
        raise Unfit(f"a key of type {type(value).__name__} cannot be written down")
    return text


def _variable(tuner: Any, function: Any) -> str:
    """What the kernel's module calls an autotuner, nearly always as its function; "" where it does not."""
    names = vars(sys.modules[function.__module__]) if function.__module__ in sys.modules else {}
    likely = [name for name in (function.__name__, *names) if name in names]
    if is_given(tuner):
        return next((name for name in likely if names[name] is tuner.fn), "")
    return next((name for name in likely if autotuner(names[name]) is tuner), "")


def is_given(tuner: Any) -> bool:
    """Is it a kernel that has its space from outside?"""
    return getattr(tuner, "given", False) is True


@functools.cache
def descriptors() -> Any:
    """Triton's class of tensor descriptors, which have a dtype from now on, as tensors have: autotuners take into
    their keys the dtype of what has one."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if not hasattr(TensorDescriptor, "dtype"):
        TensorDescriptor.dtype = property(lambda self: self.base.dtype)
    return TensorDescriptor


def key_of(tuner: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The key that an autotuner makes of a call, as Triton 3.6 to 3.9 do."""
    descriptors()
    given = {**dict(zip(tuner.arg_names, args, strict=False)), **kwargs}
    if is_given(tuner):
        return tuple(tuner.key(given))
    named = {name: value for name, value in given.items() if name in tuner.arg_names}
    key = [named[name] for name in tuner.keys if name in named]
    return (*key, *(str(value.dtype) for value in named.values() if hasattr(value, "dtype")))


def autotuner(value: Any) -> Any:
    """The autotuner in a chain of decorators, or what a space from outside has made; None where there is none."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import KernelInterface

    while isinstance(value, KernelInterface) and not isinstance(value, Autotuner):
        given = getattr(vars(value).get("run"), "__self__", None)
        value = given if is_given(given) else getattr(value, "fn", None)
    return value if isinstance(value, Autotuner) else None


def found(module: str, name: str) -> Any:
    """What has that name in that module, which is imported. Raises UsageError where it is not there."""
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (Exception, SystemExit) as broken:  # a program without a guard around what it does
        raise UsageError(f"{module}:{name} cannot be imported: {type(broken).__name__}: {broken}") from broken
    return value


def imported(module: str, name: str) -> Kernel:
    """The kernel of that module and name. Raises UsageError where it is not there, or nothing tunes it."""
    if (tuner := autotuner(found(module, name))) is None:
        raise UsageError(f"{module}:{name} has no autotuner, and no space was given to it")
    return Kernel(tuner)
