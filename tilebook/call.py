"""The way in: from a public function to PyTorch's dispatcher, or past it where that provably does the same.

Every differentiable family is one `Entry`. It registers two ops with PyTorch, `tilebook::<name>_fwd` and `_bwd`, with
all that PyTorch asks of an op, so that fake tensors, transforms, subclasses, `torch.compile` and export work because
PyTorch does it. A call of ordinary CUDA tensors outside of all of that goes the direct way: the same choice, the same
gradients, without the dispatcher's cost.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from tilebook import dispatch, torch_ops
from tilebook.frames import as_it_is
from tilebook.layout import rows
from tilebook.left import ORDINARY, keep, known, unsettled

Tensors = tuple[torch.Tensor | None, ...]
Way = Literal["direct", "op", "pytorch"]

_DISABLED = os.environ.get("TILEBOOK_DISABLE", "") not in ("", "0")

_functorch: Any = torch._C._functorch
_profiler: Any = torch.autograd.profiler
_saved_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks
_kept: Any = torch._C._autograd._get_current_graph_task_keep_graph


def disabled() -> bool:
    """Does `TILEBOOK_DISABLE=1` in the environment ask for plain PyTorch?"""
    return _DISABLED


def way(*tensors: torch.Tensor, optional: Sequence[torch.Tensor | None] = ()) -> Way:
    """How a call with these tensors is to run. Raises ValueError for what is no tensor; `optional` may be None.

    direct:  past the dispatcher. For CUDA tensors of PyTorch's own classes that are what their memory holds (a lazy
             negation is not), outside every mode, transform and trace.
    op:      as an op of PyTorch's, which knows what to do with all the rest.
    pytorch: as PyTorch's own functions: on the CPU, where the environment disables ours, and where an op of ours would
             lose something, as a forward-mode derivative, a derivative by `torch.func`, or a node of a script's graph.
    """
    first: Any = tensors[0]
    if torch.compiler.is_compiling():
        return "op" if (first.is_cuda and not _DISABLED) or dispatch.forced() else "pytorch"
    ordinary = True
    for each in (*tensors, *[x for x in optional if x is not None]):
        if type(each) not in ORDINARY or each.is_neg():
            if not isinstance(each, torch.Tensor):
                raise ValueError(f"expected a tensor, not {type(each).__name__}")
            ordinary = False
    if not ((first.is_cuda and not _DISABLED) or dispatch.forced()):
        return "pytorch"
    if forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None:
        return "pytorch"
    if _functorch.peek_interpreter_stack() is not None:
        return "pytorch" if _differentiating() else "op"
    # A profiler shows ops by name.
    usual = ordinary and not torch._C._len_torch_dispatch_stack() and not _profiler._is_profiler_enabled
    return "direct" if usual else "op"


@contextmanager
def untraced() -> Iterator[None]:
    """What is made inside is a constant of a script that is being traced, where it would be made in every run; sizes
    are numbers inside, and no tensors, of a branch on which a trace warns."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


def untraceable(route: Way, *tensors: torch.Tensor) -> Way:
    """The way of a call whose plain form reads numbers on the host, which no trace can: there the op stands for it."""
    unknown = watched() or any(x.is_meta or type(x) not in ORDINARY for x in tensors)
    return "op" if route == "pytorch" and unknown else route


def constant(name: str, number: Any) -> None:
    """Raises TypeError for a number that is to be learnt, which nothing here can do."""
    if isinstance(number, torch.Tensor) and number.requires_grad:
        raise TypeError(f"{name} must be a number, not a tensor: it would get no gradient")


def watched() -> bool:
    """Is a trace or a mode under way, which may have tensors without numbers?"""
    return torch.compiler.is_compiling() or bool(torch._C._len_torch_dispatch_stack())


def _differentiating() -> bool:
    """Is `torch.func.grad`, `vjp` or `jvp` among the transforms under way? They take PyTorch's functions apart."""
    kinds = _functorch.TransformType
    return any(each.key() in (kinds.Grad, kinds.Jvp) for each in _functorch.get_interpreter_stack() or ())


def left_whole(choice: Any, tensors: Sequence[torch.Tensor | None]) -> bool:
    """Is a call on the direct way left to PyTorch's own function, with its own gradients?

    Not where what is saved for the backward pass may come back otherwise: its kernels do not look at what they load.
    """
    return native(choice, tensors) and (_saved_hooks(True) is None or not recorded(tensors))


def native(choice: Any, tensors: Sequence[torch.Tensor | None]) -> bool:
    """Is a call PyTorch's own function's to serve, with the gradients that will be wanted?"""
    if not choice.native or choice.probed:
        return False
    return not recorded(tensors) or bool(
        dispatch.backward_of(choice).native and not (choice.kept and dispatch.backward_probed(choice))
    )


def recorded(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Will gradients of a call with these tensors be wanted?"""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def tf32_allowed() -> bool:
    """May products of fp32 tensors round their factors to tf32? As PyTorch's matrix products are told."""
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # set through the newer of two interfaces, which the older one refuses to read
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


@dataclass(eq=False)
class Entry:
    """One differentiable family: its tensors, how to run it forward and backward, and what it is in plain PyTorch.

    name:     of the ops, with _fwd and _bwd behind it.
    tensors:  the names of the arguments that are tensors, in order; "?" behind those that may be None.
    options:  the other arguments, as PyTorch's schemas write them.
    outputs:  the names of what a forward pass gives: the result, and statistics without gradient.
    kept:     which outputs a backward pass wants, beside the tensors.
    addends:  so many of the first tensors are added up, and nothing else is done with them: the second output is their
              sum, which is a result too. A backward pass has the sum in their place, and its gradient is that of each.
    forward:  (choice or None, tensors, options) → outputs, by dispatch.
    backward: (gradient of each result, None for one that has none, tensors, kept, options, needs) → gradients of the
              tensors, None where not needed, by dispatch; None for what has no gradients, whose one op then bears the
              name alone.
    last:     backward once more, or None: for a graph that is not kept, so that it may write over what was kept.
    check:    (tensors, options as the schema has them) → ValueError for what does not go together. Kernels believe the
              sizes they are told, and PyTorch's own checks would come too late.
    plain:    (tensors, options) → the result, or all results, in PyTorch's own functions.
    twice:    the same where gradients are differentiated again, if that is to be by others of them.
    fake:     (tensors, options as the schema has them) → empty outputs, laid out as those of the op are.
    pack, unpack: options as the family has them ↔ as the schema has them.
    casts:    the tensors that are factors of products, which autocast casts.
    fold:     may a batch of problems (see `torch.vmap`) be more of the first axis, if only these tensors have one?
    results:  how many outputs, the first ones, have gradients; of several `plain` gives a tuple.
    linear:   the tensors, one for each result, that results are linear in: nothing is kept of them, and a backward pass
              has the results' gradients in their places.
    flops:    (tensors, options as the schema has them, needs) → floating-point operations, as PyTorch counts its own:
              of a forward pass where needs is None, else of the gradients that are needed.
    shards:   (what DTensor says of the tensors, by name) → axes that may be cut over GPUs (see `tilebook.sharding`).
    """

    name: str
    tensors: tuple[str, ...]
    options: tuple[str, ...]
    outputs: tuple[str, ...]
    kept: tuple[int, ...]
    forward: Callable[[Any, Tensors, tuple[Any, ...]], tuple[torch.Tensor, ...]]
    backward: Callable[..., Tensors] | None
    check: Callable[[Tensors, tuple[Any, ...]], None]
    plain: Callable[[Tensors, tuple[Any, ...]], Any]
    fake: Callable[[Tensors, Any], tuple[torch.Tensor, ...]]
    addends: int = 0
    pack: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda options: options
    unpack: Callable[[Tensors, tuple[Any, ...]], tuple[Any, ...]] = lambda tensors, options: options
    casts: tuple[str, ...] = ()
    fold: tuple[str, ...] = ()
    results: int = 1
    linear: tuple[str, ...] = ()
    flops: Callable[[Tensors, Any, Sequence[bool] | None], int] | None = None
    shards: Callable[[dict[str, Any]], list[dict[str, int | None]]] | None = None
    last: Callable[..., Tensors] | None = None
    twice: Callable[[Tensors, tuple[Any, ...]], Any] | None = None

    op: Any = field(init=False)
    op_backward: Any = field(init=False)

    def __post_init__(self) -> None:
        self.op, self.op_backward = torch_ops.register(self)
        torch_ops.shard()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the tensors that a backward pass has."""
        return (self.outputs[1], *self.tensors[self.addends :]) if self.addends else self.tensors

    def saved(self, tensors: Tensors, outputs: Sequence[torch.Tensor]) -> Tensors:
        """What a backward pass has of a call: its tensors, None where results are linear in them, what is kept."""
        sums = (outputs[1],) if self.addends else ()
        held = (None if name in self.linear else x for name, x in zip(self.tensors, tensors, strict=True))
        return *sums, *list(held)[self.addends :], *[outputs[which] for which in self.kept]

    def filled(self, tensors: Tensors, dys: Tensors) -> Tensors:
        """The tensors of a backward pass, of which these were kept."""
        if not self.linear:
            return tensors
        given = iter(dys)
        return tuple(next(given) if name in self.linear else x for name, x in zip(self.tensors, tensors, strict=True))

    def needed(self, needs: Sequence[bool]) -> list[bool]:
        """Which of its tensors a backward pass is to find gradients of, by those of the forward pass that need them."""
        return [any(needs[: self.addends]), *needs[self.addends :]] if self.addends else list(needs)

    def spread(self, gradients: Tensors, needs: Sequence[bool]) -> Tensors:
        """Gradients of the forward pass's tensors, by those that a backward pass has found."""
        each = [gradients[0] if need else None for need in needs[: self.addends]]
        return (*each, *gradients[1:]) if self.addends else gradients

    def direct(self, choice: Any, tensors: Tensors, options: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        """The outputs, past the dispatcher; differentiable in the results where gradients are recorded."""
        if recorded(tensors):
            return _apply(self, choice, options, *tensors)  # type: ignore[no-any-return]
        return self.forward(choice, tensors, options)

    def serve(
        self, route: Way, forward: Any, tensors: Tensors, options: tuple[Any, ...], check: Callable[[], Any], *,
        args: tuple[Any, ...] | None = None, posed: Callable[[Any], tuple[Any, ...]] | None = None,
        own: Any = None, size: float = 0.0, bounds: tuple[float, float] = (0.0, 0.0), whole: Any = native,
    ) -> tuple[torch.Tensor, ...] | None:  # fmt: skip
        """The outputs of a call on the direct or the op's way; None where PyTorch's own function is to serve it.

        forward: the op of the forward pass. check: raises ValueError for what does not go together; true for what no
        kernel takes. A call like one before is not checked again. args: what it is known by, tensors and options if not
        given. posed: device → what poses its problem, if not args. own: what `left` is to know such calls by, None for
        those that it is not to; size and bounds are as `left.known` has them. whole: does PyTorch's function serve it?
        """
        args = (*tensors, *options) if args is None else args
        choice = dispatch.known(forward, args) if route == "direct" else None
        if choice is None:
            if check():
                return None
            if route == "op":
                pose: Callable[[Any], tuple[Any, ...]] = posed or (lambda device: args)
                if self.left_to_pytorch(lambda: (forward, forward.problem.of(*pose("meta"))), tensors):
                    return None
                return self.through(tensors, options)
            choice = dispatch.lookup(forward, args if posed is None else posed(tensors[0].device), args)  # type: ignore[union-attr]
        if own is not None and unsettled(own, choice):
            keep(own, known(choice, size, bounds))
        if whole(choice, tensors):
            choice.calls += 1
            return None
        return self.direct(choice, tensors, options)

    def through(self, tensors: Tensors, options: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        """The outputs, by PyTorch's dispatcher."""
        torch_ops.shard()
        return torch_ops.several(self.op(*tensors, *self.pack(options)))

    def left_to_pytorch(self, posed: Callable[[], tuple[Any, Any]], tensors: Tensors) -> bool:
        """Is a call on the op's way one that PyTorch's own function serves? `posed` gives its op and problem.

        A trace does not know: its graph serves other lengths, and other GPUs.
        """
        sizes = [n for x in tensors if x is not None for n in x.shape]
        if torch.compiler.is_compiling() or dispatch.forced() or not all(type(n) is int for n in sizes):
            return False
        if not torch.cuda.is_available():
            return False
        first = tensors[0]
        assert first is not None
        with _disable_current_modes():  # what problems cost is computed, not part of the program
            op, problem = posed()
            choice = dispatch.choose(op, problem, first.device)
        return native(choice, tensors)

    @property
    def directions(self) -> tuple[str, ...]:
        """What the backward op calls the gradients of the results."""
        return ("dy",) if self.results == 1 else tuple(f"d{name}" for name in self.outputs[: self.results])

    def gradients(
        self, dys: Tensors, tensors: Tensors, kept: Tensors, options: tuple[Any, ...], needs: Sequence[bool]
    ) -> Tensors:
        """Gradients of the tensors that need one, None for the others. `options` as the family has them."""
        assert self.backward is not None
        if self._differentiated():
            return self._differentiable(dys, tensors, options, needs)
        # No storage: a batch of cotangents, by a mechanism older than torch.func's.
        given = [dy for dy in dys if dy is not None]
        stored = torch.compiler.is_compiling() or all(torch._C._has_storage(dy) for dy in given)
        if not stored or given[0].is_meta or way(*given, optional=(*tensors, *kept)) == "op":
            return self._by_op(dys, tensors, kept, self.pack(options), needs)
        run = self.backward if self.last is None or _kept() else self.last
        return run(*_rows(dys), tensors, kept, options, needs)  # one may be expanded from a sum

    def gradients_of_op(
        self, dys: Tensors, tensors: Tensors, kept: Tensors, packed: tuple[Any, ...], needs: Sequence[bool]
    ) -> Tensors:
        """The same where what went forward was the op, and so is what goes backward. `packed` as the schema has them.

        In a trace nothing may look at them: lengths among them are symbols.
        """
        if self._differentiated():
            return self._differentiable(dys, tensors, self.unpack(tensors, packed), needs)
        return self._by_op(dys, tensors, kept, packed, needs)

    @staticmethod
    def _differentiated() -> bool:
        """Will gradients be differentiated again?"""
        if torch.is_grad_enabled():
            return True
        return not torch.compiler.is_compiling() and (forward_ad._current_level >= 0 or _differentiating())

    def _by_op(
        self, dys: Tensors, tensors: Tensors, kept: Tensors, packed: tuple[Any, ...], needs: Sequence[bool]
    ) -> Tensors:
        found = self.op_backward(*_rows(dys), *tensors, *kept, *packed, list(needs))
        return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))

    def _differentiable(
        self, dys: Tensors, tensors: Tensors, options: tuple[Any, ...], needs: Sequence[bool]
    ) -> Tensors:
        """Gradients that can be differentiated again, as far as PyTorch's own functions can be."""
        with torch.enable_grad():
            if self.linear:  # any point will do
                points = [torch.zeros_like(dy).requires_grad_() for dy in dys if dy is not None]
                tensors = self.filled(tensors, tuple(points))
            # Views stand for the tensors: one may have been made of another, or be given twice.
            apart = tuple(x.view_as(x) if need and x is not None else x for x, need in zip(tensors, needs, strict=True))
            wanted = [x for x, need in zip(apart, needs, strict=True) if need and x is not None]
            zeros = [torch.zeros_like(x) for x in apart[:1] if x is not None] * (self.addends - 1)
            made = (self.twice or self.plain)((*apart[:1], *zeros, *apart[1:]), options)
            results = made if self.results > 1 else (made,)
            given = [(y, dy) for y, dy in zip(results, dys, strict=True) if dy is not None]
            ys, gradients = zip(*given, strict=True)
            found = iter(
                torch.autograd.grad(ys, wanted, gradients, create_graph=True, materialize_grads=self.addends > 0)
            )
        return tuple(next(found) if need else None for need in needs)


def _rows(tensors: Tensors) -> Tensors:
    return tuple(None if x is None else rows(x) for x in tensors)


def _no_view(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself, but to autograd no view: into one that was made in a function of ours nobody could write."""
    return torch.ops.aten._unsafe_view(x, x.shape) if x._is_view() else x


class _Direct(torch.autograd.Function):
    """The autograd function of every family, for the direct way."""

    @staticmethod
    @as_it_is
    def forward(
        ctx: Any, entry: Entry, choice: Any, options: tuple[Any, ...], *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        made = entry.forward(choice, tensors, options)
        outputs = *(_no_view(x) for x in made[: entry.results]), *made[entry.results :]
        ctx.save_for_backward(*entry.saved(tensors, outputs))
        ctx.call = entry, options
        ctx.mark_non_differentiable(*outputs[entry.results :])
        ctx.set_materialize_grads(bool(entry.linear))
        return outputs

    @staticmethod
    @as_it_is
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[Any, ...]:
        entry, options = ctx.call
        needs, dys = ctx.needs_input_grad[3:], dys[: entry.results]
        if all(dy is None for dy in dys):
            return (None,) * (3 + len(needs))
        saved, count = ctx.saved_tensors, len(entry.inputs)
        tensors = entry.filled(saved[:count], dys)
        found = entry.gradients(dys, tensors, saved[count:], options, entry.needed(needs))
        return None, None, None, *entry.spread(found, needs)


_apply: Any = super(torch.autograd.Function, _Direct).apply
"""`_Direct.apply`, less what it does for transforms, of which there are none on the direct way."""
