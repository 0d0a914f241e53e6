"""What PyTorch is told of our ops: schema, shapes, gradients, autocast, vmap, operation counts, sharding."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tilebook.casting import autocast
from tilebook.frames import as_it_is

if TYPE_CHECKING:
    from tilebook.call import Entry, Tensors

_library: Any = torch.library.Library("tilebook", "FRAGMENT")  # type: ignore[no-untyped-call]

_BACKENDS = ("CPU", "CUDA")
_MOST_LAYOUTS = 4096

Layout = tuple[torch.Size, tuple[int, ...]]
"""A shape and its strides."""
Promises = Callable[["Tensors", tuple[Any, ...]], tuple[Layout, ...]]
"""Checks a call of tensors and options, and tells how its outputs are laid out."""


def register(entry: Entry) -> tuple[Any, Any]:
    """Makes `tilebook::<name>_fwd` and `tilebook::<name>_bwd` of an entry, and returns them."""
    forward, backward = names(entry)
    options = "".join(f", {option}" for option in entry.options)
    outs = ", ".join(f"Tensor {name}" for name in entry.outputs)
    promises = _promises(entry)
    _define(
        f"{forward}({_tensors(entry.tensors)}{options}) -> ({outs})", _forward(entry, promises), _fake_forward(entry)
    )
    torch.library.register_vmap(f"tilebook::{forward}", _batched(entry, forward, entry.tensors), lib=_library)
    if entry.backward is not None:
        kept = "".join(f", Tensor {entry.outputs[which]}" for which in entry.kept)
        kind = "Tensor?" if entry.results > 1 and not entry.linear else "Tensor"
        dys = ", ".join(f"{kind} {name}" for name in entry.directions)
        inputs = f"{dys}, {_tensors(entry.inputs)}{kept}{options}, bool[] needs"
        grads = ", ".join("Tensor" for _ in entry.inputs)
        _define(f"{backward}({inputs}) -> ({grads})", _backward(entry, promises), _fake_backward(entry))
        given = (*entry.directions, *entry.inputs, *(entry.outputs[which] for which in entry.kept))
        torch.library.register_vmap(f"tilebook::{backward}", _batched(entry, backward, given), lib=_library)
        torch.library.register_autograd(
            f"tilebook::{forward}", as_it_is(_gradients(entry)), setup_context=as_it_is(_keep(entry)), lib=_library
        )
        torch.library.register_autograd(f"tilebook::{backward}", as_it_is(_only_once(backward)), lib=_library)
    if entry.casts:
        for kind in ("cpu", "cuda"):
            _library.impl(forward, as_it_is(_cast(entry, kind)), f"Autocast{kind.upper()}")
    if entry.flops is not None:
        _count(entry)
    _unsharded.append(entry)
    ops = torch.ops.tilebook
    return getattr(ops, forward).default, getattr(ops, backward).default if entry.backward is not None else None


def _tensors(names: Sequence[str]) -> str:
    """As arguments in a schema."""
    return ", ".join(f"Tensor{'?' if name.endswith('?') else ''} {name.rstrip('?')}" for name in names)


def names(entry: Entry) -> tuple[str, str]:
    """Of the op, and of the op of its gradients."""
    return (entry.name, "") if entry.backward is None else (f"{entry.name}_fwd", f"{entry.name}_bwd")


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for backend in _BACKENDS:
        _library.impl(name, as_it_is(run), backend)
    torch.library.register_fake(f"tilebook::{name}", fake, lib=_library)


def _promises(entry: Entry) -> Promises:
    """(tensors, options as the schema has them) → how the forward op's outputs are laid out. Checks the call.

    On a GPU, where no check looks at numbers, both are done once for each kind of call.
    """
    known: dict[Any, tuple[Layout, ...]] = {}

    def promises(tensors: Tensors, options: tuple[Any, ...]) -> tuple[Layout, ...]:
        described = tuple(None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors)
        found, first = known.get((described, options)), tensors[0]
        if found is None or first is None or not first.is_cuda:
            entry.check(tensors, options)
            meta = tuple(each and torch.empty_strided(*each[:2], dtype=each[2], device="meta") for each in described)
            found = tuple((x.shape, x.stride()) for x in entry.fake(meta, options))
            if len(known) >= _MOST_LAYOUTS:
                known.clear()
            known[described, options] = found
        return found

    return promises


def _laid(made: torch.Tensor, shape: Sequence[int], strides: tuple[int, ...]) -> torch.Tensor:
    """`made`, laid out in memory as was promised while a graph was traced."""
    if made.stride() == strides or made.numel() == 0 or made.is_meta:
        return made
    return torch.empty_strided(shape, strides, dtype=made.dtype, device=made.device).copy_(made)


def several(made: Any) -> tuple[torch.Tensor, ...]:
    """The outputs of an op, which is a tensor where there is one only."""
    return (made,) if isinstance(made, torch.Tensor) else tuple(made)


def _returned(outputs: Sequence[torch.Tensor]) -> Any:
    """The outputs as an op returns them."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _forward(entry: Entry, promises: Promises) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        count = len(entry.tensors)
        tensors, options = tuple(args[:count]), tuple(args[count:])
        layouts = promises(tensors, options)
        outputs = entry.forward(None, tensors, entry.unpack(tensors, options))
        return _returned([_laid(made, *layout) for made, layout in zip(outputs, layouts, strict=True)])

    return run


def _fake_forward(entry: Entry) -> Callable[..., Any]:
    def fake(*args: Any) -> Any:
        count = len(entry.tensors)
        return _returned(entry.fake(tuple(args[:count]), args[count:]))

    return fake


def _parts(entry: Entry, args: Sequence[Any]) -> tuple[Tensors, Tensors, Tensors, tuple[Any, ...], list[bool]]:
    """(gradients, tensors, kept, options as the schema has them, needs) of a backward op's arguments."""
    first, kept = entry.results + len(entry.inputs), len(entry.kept)
    dys, tensors, rest = tuple(args[: entry.results]), tuple(args[entry.results : first]), args[first + kept :]
    return dys, tensors, tuple(args[first : first + kept]), tuple(rest[:-1]), rest[-1]


def _backward(entry: Entry, promises: Promises) -> Callable[..., Any]:
    def run(*args: Any) -> tuple[torch.Tensor, ...]:
        dys, tensors, kept, options, needs = _parts(entry, args)
        layouts = promises((*tensors[:1] * (entry.addends - 1), *tensors), options)
        told = zip((*dys, *kept), (*range(entry.results), *entry.kept), strict=True)
        there = [(each.shape, layouts[which][0]) for each, which in told if each is not None]
        given = [shape for shape, _ in there]
        if given != [shape for _, shape in there]:
            shapes, first = ", ".join(str(tuple(shape)) for shape in given), tensors[0]
            assert first is not None
            raise ValueError(f"gradient and outputs {shapes} are not of {entry.tensors[0]} {tuple(first.shape)}")
        assert entry.backward is not None
        found = entry.backward(*dys, tensors, kept, entry.unpack(tensors, options), needs)
        (model, *_) = (dy for dy in dys if dy is not None)
        return tuple(
            _gradient(x, grad if need else None, model) for x, grad, need in zip(tensors, found, needs, strict=True)
        )

    return run


def _gradient(x: torch.Tensor | None, grad: torch.Tensor | None, dy: torch.Tensor) -> torch.Tensor:
    """`grad` laid out as promised: as PyTorch lays out what is like its tensor; nothing where it is not needed."""
    if x is None or grad is None:
        return dy.new_empty(0)
    if grad.numel() and grad.stride() == x.stride() and x.is_contiguous():
        return grad
    model = torch.empty_like(x, device="meta")
    return _laid(grad, model.shape, model.stride()) if grad.numel() else torch.empty_like(x)


def _fake_backward(entry: Entry) -> Callable[..., Any]:
    def fake(*args: Any) -> tuple[torch.Tensor, ...]:
        dys, tensors, _, _, needs = _parts(entry, args)
        (model, *_) = (dy for dy in dys if dy is not None)
        return _empty_gradients(tensors, needs, model)

    return fake


def _empty_gradients(tensors: Sequence[Any], needs: Sequence[bool], dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A gradient's place for each tensor that needs one, nothing for the others."""
    return tuple(
        torch.empty_like(x) if need and x is not None else dy.new_empty(0)
        for x, need in zip(tensors, needs, strict=True)
    )


def _keep(entry: Entry) -> Callable[..., None]:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        count, output = len(entry.tensors), several(output)
        ctx.save_for_backward(*entry.saved(inputs[:count], output))
        ctx.options = inputs[count:]
        ctx.set_materialize_grads(bool(entry.linear))
        ctx.mark_non_differentiable(*output[entry.results :])

    return setup


def _gradients(entry: Entry) -> Callable[..., Any]:
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[Any, ...]:
        needs, dys = list(ctx.needs_input_grad), dys[: entry.results]
        if all(dy is None for dy in dys):
            return (None,) * len(needs)
        saved, count = ctx.saved_tensors, len(entry.inputs)
        wanted = needs[: len(entry.tensors)]
        tensors = entry.filled(saved[:count], dys)
        found = entry.gradients_of_op(dys, tensors, saved[count:], ctx.options, entry.needed(wanted))
        return *entry.spread(found, wanted), *[None] * (len(needs) - len(wanted))

    return backward


def _only_once(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"tilebook::{name} cannot be differentiated again")

    return backward


def _batched(entry: Entry, name: str, names: Sequence[str]) -> Callable[..., Any]:
    """A batch of problems as more of the first axis where all that has a batch may have it so; else one by one."""
    foldable = {*entry.fold, *entry.directions, *entry.outputs}

    def run(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        op = getattr(torch.ops.tilebook, name)
        tensors, options = args[: len(names)], args[len(names) :]
        dims = in_dims[: len(names)]
        size = info.batch_size
        with_batch = [each.rstrip("?") in foldable for each, dim in zip(names, dims, strict=True) if dim is not None]
        others = [
            x for each, x, dim in zip(names, tensors, dims, strict=True)
            if x is not None and each.rstrip("?") not in foldable
        ]  # fmt: skip
        if all(with_batch) and not others and entry.fold:
            folded = [
                x if x is None else _moved(x, dim, size).flatten(0, 1) for x, dim in zip(tensors, dims, strict=True)
            ]
            outputs: Any = several(op(*folded, *options))
            made = [x if x.ndim == 1 and not x.numel() else x.unflatten(0, (size, -1)) for x in outputs]
            return _batch(made, [None if x.ndim == 1 and not x.numel() else 0 for x in made])
        chosen = [
            [x if dim is None else x.select(dim, at) for x, dim in zip(tensors, dims, strict=True)]
            for at in range(size)
        ]
        each_one = [several(op(*some, *options)) for some in chosen]
        return _batch([torch.stack(parts) for parts in zip(*each_one, strict=True)], [0] * len(each_one[0]))

    return run


def _batch(made: Sequence[torch.Tensor], dims: Sequence[int | None]) -> tuple[Any, Any]:
    """Outputs and where their batch is, as PyTorch wants to be told."""
    return (made[0], dims[0]) if len(made) == 1 else (tuple(made), tuple(dims))


def _moved(x: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _cast(entry: Entry, kind: str) -> Callable[..., Any]:
    key = getattr(torch._C.DispatchKey, f"Autocast{kind.upper()}")

    def run(*args: Any) -> Any:
        count = len(entry.tensors)
        cast = autocast(*args[:count])
        names = [name.rstrip("?") for name in entry.tensors]
        tensors = [to if name in entry.casts else x for name, x, to in zip(names, args, cast, strict=False)]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return entry.op(*tensors, *args[count:])

    return run


def _count(entry: Entry) -> None:
    from torch.utils.flop_counter import register_flop_formula

    count, inputs, kept, flops = len(entry.tensors), len(entry.inputs), len(entry.kept), entry.flops
    assert flops is not None

    def forward(*args: Any, out_val: Any = None) -> int:
        return flops(args[:count], args[count:], None)

    def backward(*args: Any, out_val: Any = None) -> int:
        given = args[entry.results :]
        return flops(given[:inputs], given[inputs + kept : -1], given[-1])

    for name, formula in zip(names(entry), (forward, backward), strict=True):
        if name:
            registered: Any = register_flop_formula(getattr(torch.ops.tilebook, name), get_raw=True)
            registered(formula)


@contextmanager
def recording() -> Iterator[None]:
    """Inside the block autograd records, also inside an op, where PyTorch passes it by."""
    keys = (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA, torch._C.DispatchKey.ADInplaceOrView)
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (*keys, torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


_unsharded: list[Entry] = []


def shard() -> bool:
    """Tells DTensor how our ops may be split, once there is a DTensor; has it been told?"""
    if not _unsharded or "torch.distributed.tensor" not in sys.modules:
        return not _unsharded
    from tilebook.sharding import register as register_sharding

    while _unsharded:
        register_sharding(_unsharded.pop())
    return True


# A call that is compiled does so while it is traced, as `torch.compiler.assume_constant_result` has it, which would
# load the compiler.
shard._dynamo_marked_constant = True  # type: ignore[attr-defined]
