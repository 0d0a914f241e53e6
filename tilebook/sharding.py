"""How DTensor may split our ops over GPUs: which axes of every tensor may be cut together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilebook.call import Entry

Axes = dict[str, int | None]
"""Tensor → the axis that is cut; a tensor that is not named, or None, is whole on every GPU."""


def register(entry: Entry) -> None:
    """Registers the rules of an entry's two ops with DTensor."""
    from torch.distributed.tensor.experimental import register_sharding

    names = [name.rstrip("?") for name in entry.tensors]
    saved = [name.rstrip("?") for name in entry.inputs]
    kept = [entry.outputs[which] for which in entry.kept]
    above = dict(zip(entry.directions, entry.outputs, strict=False))

    def forward(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        return [
            (_placed(entry.outputs, cut), [*_given(names, args, cut), *_options(args[len(names) :])])
            for cut in _cuts(entry, dict(zip(names, args, strict=False)))
        ]

    def backward(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        inputs = [*above, *saved, *kept]
        found = []
        for cut in _cuts(entry, dict(zip(inputs, args, strict=False))):
            cut = {**cut, **{dy: cut.get(result) for dy, result in above.items()}}
            given = [*_given(inputs, args, cut), *_options(args[len(inputs) :])]
            found.append((_gradients(saved, cut, args[-1]), given))
        return found

    register_sharding(entry.op)(forward)
    if entry.op_backward is not None:
        register_sharding(entry.op_backward)(backward)


def _cuts(entry: Entry, tensors: dict[str, Any]) -> list[Axes]:
    """All whole, and what the family allows for these tensors."""
    return [{}, *(entry.shards(tensors) if entry.shards is not None else [])]


def _place(axis: int | None) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    return Replicate() if axis is None else Shard(axis)


def _placed(names: Sequence[str], cut: Axes) -> list[Any]:
    return [_place(cut.get(name)) for name in names]


def _given(names: Sequence[str], args: Sequence[Any], cut: Axes) -> list[Any]:
    return [None if arg is None else _place(cut.get(name)) for name, arg in zip(names, args, strict=False)]


def _options(args: Sequence[Any]) -> list[None]:
    return [None for _ in args]


def _gradients(names: Sequence[str], cut: Axes, needs: Sequence[bool]) -> list[Any]:
    """A gradient lies as its tensor does; of a tensor that is whole, each GPU has its part of the sum."""
    from torch.distributed.tensor import Partial, Replicate

    if not any(axis is not None for axis in cut.values()):
        return [Replicate() for _ in names]
    found: list[Any] = []
    for name, need in zip(names, needs, strict=True):
        axis = cut.get(name)
        found.append(_place(axis) if axis is not None else Partial() if need else Replicate())
    return found


def divides(spec: Any, axis: int) -> bool:
    """Can the axis of a tensor be cut into equal parts over its mesh?"""
    return bool(spec.shape[axis] % spec.mesh.size() == 0)
