"""One recorded call of a kernel: what its arguments were like, without their contents, and inputs made after it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch

from tilebook.errors import UsageError, one_line
from tilebook.foreign.grids import Grid, plain
from tilebook.foreign.kernel import Kernel, Unfit, descriptors, is_given
from tilebook.op import Config, generator

Rule = Mapping[str, Any]

ROLES = ("in", "out", "inout", "zero", "scratch")
"""What a kernel does to a tensor: reads it, writes it, both, adds to zeros, or leaves in it what nobody wants."""

WRITTEN = ("out", "inout", "zero")
"""The roles of what a kernel is called for."""

_DISTRIBUTIONS = ("normal", "uniform", "fill", "below", "cumulative", "step", "values")
_MOST_ELEMENTS = 1 << 40
_MOST_CONFIGS = 1 << 20


@dataclass(frozen=True)
class Tensor:
    """same: the argument before it that is the same tensor, "" for none."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    same: str = ""

    def __post_init__(self) -> None:
        sizes = [*self.shape, *self.stride]
        right = len(self.shape) == len(self.stride) and all(type(n) is int and 0 <= n < 1 << 40 for n in sizes)
        if not right or not isinstance(getattr(torch, self.dtype, None), torch.dtype) or self.bytes > _MOST_ELEMENTS:
            raise ValueError("not a tensor's dtype, shape and strides")

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def bytes(self) -> int:
        """Through memory, each element once."""
        elements = math.prod(n for n, step in zip(self.shape, self.stride, strict=True) if step)
        return elements * self.torch_dtype.itemsize

    @property
    def held(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides of what is made for it: dimensions of stride 0 have one element, what has gaps is flat, so
        that a copy lies as it does."""
        pairs = [(n, step) if step else (min(n, 1), 1) for n, step in zip(self.shape, self.stride, strict=True)]
        extent = _extent(*zip(*pairs, strict=True)) if pairs else 1
        shape, stride = tuple(n for n, _ in pairs), tuple(step for _, step in pairs)
        return ((extent,), (1,)) if math.prod(shape) not in (0, extent) else (shape, stride)

    def random(self, device: torch.device | str, source: torch.Generator | None, rule: Rule) -> torch.Tensor:
        """Normal numbers, random flags, zeros where it holds integers; what a rule says instead."""
        shape, stride = self.held
        made = torch.empty_strided(shape, stride, dtype=self.torch_dtype, device=device)
        if source is None:
            return made
        made.copy_(self._values(made.shape, device, source, rule))
        return made

    def _values(
        self, shape: Sequence[int], device: torch.device | str, source: torch.Generator, rule: Rule
    ) -> torch.Tensor:
        def integers(below: int) -> torch.Tensor:
            return torch.randint(max(below, 1), tuple(shape), generator=source, device=device)

        kind = next((each for each in _DISTRIBUTIONS if each in rule), None)
        how: Any = None if kind is None else rule[kind]
        whole, count = tuple(shape), math.prod(shape)
        digits = torch.float64 if self.torch_dtype is torch.float64 else torch.float32
        match kind:
            case "normal":
                return torch.randn(whole, generator=source, device=device, dtype=digits).mul_(how)
            case "uniform":
                return (
                    torch.rand(whole, generator=source, device=device, dtype=digits).mul_(how[1] - how[0]).add_(how[0])
                )
            case "fill":
                return torch.full(whole, how, device=device)
            case "below":
                return integers(how)
            case "cumulative":
                cuts = torch.randint(0, how + 1, (count,), generator=source, device=device).sort().values
                cuts[:1], cuts[-1:] = 0, how
                return cuts.reshape(whole)
            case "values":
                return torch.tensor(how, device=device).reshape(whole)
            case "step":
                return torch.arange(count, device=device).reshape(whole).mul_(how)
        if self.torch_dtype.is_floating_point or self.torch_dtype.is_complex:
            return torch.randn(whole, generator=source, device=device, dtype=digits)
        return integers(2 if self.torch_dtype is torch.bool else 1)


@dataclass(frozen=True)
class Descriptor:
    """What Triton's `TensorDescriptor` says of its tensor, dimensions of `block` that a config's hook may set anew."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    padding: str = "zero"
    tf32: bool = False

    def __post_init__(self) -> None:
        sizes = [*self.shape, *self.strides, *self.block]
        ranks = len(self.shape) == len(self.strides) == len(self.block)
        right = ranks and all(type(n) is int and 0 <= n < 1 << 40 for n in sizes) and self.padding in ("zero", "nan")
        if not right or type(self.tf32) is not bool:
            raise ValueError("not a tensor descriptor")

    @classmethod
    def noted(cls, given: Any) -> Descriptor:
        shape, strides, block = (tuple(map(int, each)) for each in (given.shape, given.strides, given.block_shape))
        return cls(shape, strides, block, given.padding, getattr(given, "round_f32_to_tf32", False))

    def of(self, base: torch.Tensor) -> Any:
        more = {"round_f32_to_tf32": True} if self.tf32 else {}  # Triton 3.6 has none
        return descriptors()(base, list(self.shape), list(self.strides), list(self.block), self.padding, **more)


@dataclass(frozen=True)
class Call:
    """The tensors and the other arguments of a call, by name; its grids, by the place of a config in the autotuner's
    list: None for a config that the kernel's own rules leave out, or that could not run there.

    descriptors: of those tensors that the kernel gets in a descriptor. Raises ValueError where one is larger than its
    tensor."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    grids: tuple[Grid | None, ...]
    descriptors: Mapping[str, Descriptor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, each in self.descriptors.items():
            base = self.tensors[name]
            if _extent(each.shape, each.strides) > _extent(base.shape, base.stride):
                raise ValueError(f"the descriptor {name} reaches beyond its tensor")

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.tensors.values() if not each.same)

    @property
    def shapes(self) -> tuple[Any, ...]:
        """What tells two calls of one key apart."""
        tensors = tuple((name, each.shape, each.stride, each.same) for name, each in self.tensors.items())
        return (*tensors, *self.descriptors.items())

    @property
    def kinds(self) -> tuple[Any, ...]:
        """What kinds of numbers its other arguments are: kernels, and Triton, may do something else for each."""
        return tuple((name, _kind(value)) for name, value in self.values.items())

    @property
    def aliases(self) -> tuple[tuple[str, str], ...]:
        """The arguments that are the same tensor as another."""
        return tuple((name, each.same) for name, each in self.tensors.items() if each.same)

    def inputs(self, device: torch.device | str, seed: int, rules: Mapping[str, Rule]) -> tuple[torch.Tensor, ...]:
        source = generator(device, seed)
        own = [(name, each) for name, each in self.tensors.items() if not each.same]
        return tuple(each.random(device, source, rules.get(name, {})) for name, each in own)

    def content(self) -> dict[str, Any]:
        grids = [None if each is None else list(each) for each in self.grids]
        return {
            "tensors": {name: [t.dtype, list(t.shape), list(t.stride), t.same] for name, t in self.tensors.items()},
            "values": dict(self.values),
            "descriptors": {name: list(astuple(each)) for name, each in self.descriptors.items()},
            "grids": grids[:1] if all(each == grids[0] for each in grids) else grids,
            "configs": len(grids),
        }

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Call:
        """From `content`. Raises ValueError, KeyError or TypeError where it is none: a record may be a stranger's."""
        tensors = {
            str(name): Tensor(dtype, tuple(shape), tuple(stride), same)
            for name, (dtype, shape, stride, same) in content["tensors"].items()
        }
        grids = [None if each is None else tuple(each) for each in content["grids"]]
        if not all(each is None or (0 < len(each) <= 3 and all(type(n) is int for n in each)) for each in grids):
            raise ValueError("not a grid")
        if len(grids) == 1:
            if not 0 < content["configs"] <= _MOST_CONFIGS:
                raise ValueError(f"{content['configs']} configs")
            grids *= content["configs"]
        for value in content["values"].values():
            decoded(value)
        held = {
            str(name): Descriptor(tuple(shape), tuple(strides), tuple(block), *how)
            for name, (shape, strides, block, *how) in content.get("descriptors", {}).items()
        }
        return cls(tensors, dict(content["values"]), tuple(grids), held)


def _kind(value: Any) -> Any:
    """Of a number its sign, whether it is 0 or 1, and of an integer whether 16 divides it; of what is none, itself."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return repr(value)
    return value > 0, value == 0, value == 1, isinstance(value, int) and value % 16 == 0


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from a tensor's first to its last."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def noted(kernel: Kernel, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """A call of an autotuner as it can be written down. Raises Unfit."""
    tuner = kernel.tuner
    given = {**dict(zip(tuner.arg_names, args, strict=False)), **kwargs}
    grid = given.pop("grid", None)
    given.pop("warmup", None)
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    held: dict[str, Descriptor] = {}
    places: dict[Any, str] = {}
    for name, value in given.items():
        if type(value) is descriptors():
            held[name], value = Descriptor.noted(value), value.base
        if isinstance(value, torch.Tensor):
            if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
                raise Unfit(f"{name} is a {type(value).__name__}")
            shape, stride = tuple(value.shape), value.stride()
            place = (value.data_ptr(), value.dtype, shape, stride)
            same = places.setdefault(place, name) if value.numel() else name
            tensors[name] = Tensor(str(value.dtype).removeprefix("torch."), shape, stride, "" if same == name else same)
        else:
            values[name] = encoded(value, name)
    return Call(tensors, values, tuple(_grids(kernel, given, kwargs, grid)), held)


def _grids(kernel: Kernel, given: Mapping[str, Any], kwargs: Mapping[str, Any], grid: Any) -> list[Grid | None]:
    """By config, what the program's grid is for it."""
    tuner = kernel.tuner
    positional = {name: given[name] for name in tuner.arg_names if name in given}
    before, tuner.nargs = getattr(tuner, "nargs", None), positional
    try:
        left = [kernel.config(each) for each in tuner.prune_configs(dict(kwargs))]
    finally:
        tuner.nargs = before
    wanted = set(left)
    try:
        return [_grid(kernel, given, config, grid) if config in wanted else None for config in kernel.configs]
    finally:  # a grid may tell the program what it was asked for: its last word is on what ran
        with contextlib.suppress(Exception):
            if callable(grid):
                plain(grid, tuner.usual(given) if is_given(tuner) else _meta(kernel, given, tuner.best_config))


def _grid(kernel: Kernel, given: Mapping[str, Any], config: Config, grid: Any) -> Grid | None:
    its = kernel.configs[config]
    if is_given(kernel.tuner):
        found: Grid | None = kernel.tuner.grid(grid, given, its)
        return found
    return plain(grid, _meta(kernel, given, its))


def _meta(kernel: Kernel, given: Mapping[str, Any], its: Any) -> dict[str, Any]:
    """What a grid may ask for where this config runs."""
    meta = {**given, **its.all_kwargs()}
    return {**meta, **heuristic(kernel, meta)}


def heuristic(kernel: Kernel, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the heuristics between autotuner and kernel, each of which sees those before it."""
    found: dict[str, Any] = {}
    for name, function in kernel.heuristics.items():
        found[name] = function({**arguments, **found})
    return found


def encoded(value: Any, name: str) -> Any:
    """An argument that is no tensor as JSON. Raises Unfit."""
    import triton.language as tl

    if isinstance(value, tl.constexpr):
        value = value.value
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, torch.dtype):
        return {"torch": str(value).removeprefix("torch.")}
    if type(value) is tl.dtype:
        return {"tl": value.name}
    raise Unfit(f"{name} is a {type(value).__name__}")


def decoded(value: Any) -> Any:
    """The argument of a JSON value. Raises ValueError."""
    import triton.language as tl

    if not isinstance(value, Mapping):
        if isinstance(value, list):
            raise ValueError("not an argument")
        return value
    match dict(value):
        case {"torch": str(name)} if isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        case {"tl": str(name)} if name in {*tl.dtype.SINT_TYPES, *tl.dtype.UINT_TYPES, *tl.dtype.FP_TYPES}:
            return tl.dtype(name)
    raise ValueError("not an argument")


def check_rules(rules: Any) -> dict[str, dict[str, Rule]]:
    """Rules as a file has them: kernel (a pattern) → argument → how it is made and what the kernel does to it.

    Raises UsageError."""
    if not isinstance(rules, dict):
        raise UsageError("rules are an object of kernels")
    for kernel, arguments in rules.items():
        for name, rule in arguments.items() if isinstance(arguments, dict) else [("", {})]:
            known = isinstance(rule, dict) and len(rule) > 0 and set(rule) <= {*_DISTRIBUTIONS, "role"}
            if not known or rule.get("role", "in") not in ROLES:
                kinds = ", ".join(_DISTRIBUTIONS)
                raise UsageError(f"rule {kernel} {name}: one of {kinds}, and a role of {', '.join(ROLES)}")
            try:
                shape = torch.tensor(rule["values"]).shape if "values" in rule else (1,)
                Tensor("float32", (1,), (1,))._values(shape, "cpu", torch.Generator(), rule)
            except (TypeError, ValueError, RuntimeError, IndexError) as wrong:
                raise UsageError(f"rule {kernel} {name}: {one_line(wrong)}") from None
    return rules
