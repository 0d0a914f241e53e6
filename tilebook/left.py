"""Calls that are left to PyTorch's own function, known again at the least cost: the host often has no more to do.

What is remembered here is only who serves. The call that is made is PyTorch's, which is right for any arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch

from tilebook import dispatch
from tilebook.pace import Pace

__all__ = ["ORDINARY", "Left", "again", "gated", "keep", "known", "recall", "unsettled"]

# What PyTorch guards compiled code with: type, dtype, device, strides, … of several tensors at the cost of one call.
try:
    from torch._C._dynamo.guards import TensorGuards as _Guards
except ImportError:  # a call is then known by its key alone
    _Guards = None  # type: ignore[assignment, misc]

_MOST = 10_000
_MOST_LAYOUTS = 4
_FIRST_CALLS = 2  # the first compiles, the second is recorded
_SPAN = 16.0

_here = dispatch.here
_compiling, _capturing = torch.compiler.is_compiling, torch.cuda.is_current_stream_capturing
_deterministic, _recording = torch.are_deterministic_algorithms_enabled, torch.is_grad_enabled
_batched: Any = torch._C._functorch.peek_interpreter_stack
_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks
ORDINARY = frozenset({torch.Tensor, torch.nn.Parameter})

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Gated:
    """The functions that have calls answered without Python (see `tilebook.native.gates`), once anything is known."""

    def __init__(self) -> None:
        self.functions: list[tuple[Callable[..., Any], str]] = []
        self.begun = False
        self.settle: Callable[..., Any] | None = None

    def begin(self) -> None:
        self.begun = True
        from tilebook.native import gates

        self.settle = gates.open_for(self.functions)

    def put(self, function: Callable[..., Any], form: str) -> None:
        self.functions.append((function, form))
        if self.settle is not None:
            from tilebook.native import gates

            gates.put(function, form)


_gated = _Gated()


def gated(form: str) -> Callable[[_Function], _Function]:
    """Has calls of a public function that are known here answered without Python, where the extension is there.

    form: what `native/forms.cpp` calls the function. It stays what it is, and is called where anything is unusual.
    """

    def put(function: _Function) -> _Function:
        _gated.put(function, form)
        return function

    return put


class Left(NamedTuple):
    """Which calls of one kind are PyTorch's: without gradients, with them; and whether only outside of graphs.

    A `Pace` in a yes's or no's place asks the program's own steps.
    bounded: the GPU is done with such a call before the host has made the next, and PyTorch's costs the host least. A
    graph is replayed without the host.
    choice: whose calls they are, and which counts them: what nobody has tuned is weighed by how often it is asked for.
    """

    forward: bool
    training: bool | Pace
    bounded: bool
    choice: Any = None


def again(near: Hashable, *tensors: torch.Tensor) -> bool:
    """Is an eager call with these tensors PyTorch's, and all about them as in one that was recalled?

    near: what tells most calls apart, at little cost. Tensors are compared with those of earlier calls of the same.
    """
    if _compiling() or _here.forced is not None or _batched() is not None:
        return False
    for check, found, training in _here.seen.get(near, ()):
        if check(*tensors):
            address = 0
            for each in tensors:
                address |= each.data_ptr()
            if address & 15:
                return False
            return _allows(found, training and _recording(), tensors)
    return False


def recall(key: Hashable, near: Hashable, *tensors: torch.Tensor) -> bool:
    """Is an eager call of this kind with these tensors PyTorch's? False also where that is not known yet.

    near: what `again` is to know calls by that are like this one.
    """
    if _compiling() or _here.forced is not None or _batched() is not None:
        return False
    found = _here.left.get(key)
    if found is None:
        return False
    device, training, address = tensors[0].get_device(), False, 0
    for each in tensors:
        if type(each) not in ORDINARY or each.get_device() != device:
            return False
        address |= each.data_ptr()
        training |= each.requires_grad
    if address & 15:  # kernels of PyTorch's load whole vectors without looking
        return False
    if not _allows(found, training and _recording(), tensors):
        return False
    layouts = _here.seen.setdefault(near, [])
    if len(layouts) < _MOST_LAYOUTS and _Guards is not None:
        guards = _Guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        layouts.append((guards.check, found, training))
    return True


def _allows(found: Left, recorded: bool, tensors: tuple[torch.Tensor, ...]) -> bool:
    """Is a call with these tensors PyTorch's here and now? Counts it if so, and has others like it known by a gate."""
    side = found.training if recorded else found.forward
    if side is False or (recorded and _hooks(True) is not None):
        return False
    if _deterministic() or (found.bounded and _capturing()):
        return False
    if side is not True and not side.host_bound():
        return False
    if found.choice is not None:
        found.choice.calls += 1
    if _gated.settle is not None:
        _gated.settle(side, found.bounded, found.choice, tensors)
    return True


def unsettled(key: Hashable, choice: Any) -> bool:
    """Is it time to settle who serves calls of this kind, which are like this choice's?

    Kernels of ours run the first calls all the same, so that they are there when a graph is captured.
    """
    return key not in _here.left and bool(
        choice.kept and choice.aligned and not choice.open and (choice.native or choice.calls >= _FIRST_CALLS)
    )


def keep(key: Hashable, left: Left) -> None:
    """Remembers who serves calls of this kind. They must lie in memory as PyTorch's kernels take them."""
    if not _gated.begun:
        _gated.begin()
    if len(_here.left) >= _MOST:
        _here.left.clear()
        _here.seen.clear()
    _here.left[key] = left


def known(choice: Any, size: float, bounds: tuple[float, float]) -> Left:
    """Who serves calls like one whose choice and size are these.

    bounds: sizes up to which the host bounds a call without gradients, and one with them, in any program. Whether it
    bounds one with gradients that is up to `_SPAN` times as large depends on the program.
    """
    own = bool(choice.native)
    both = own and bool(dispatch.backward_of(choice).native)
    forward, training = own or size <= bounds[0], both or size <= bounds[1]
    if own and _here.prober is not None and (not _recording() or dispatch.backward_probed(choice)):
        return Left(True, False, False, choice)  # calls with gradients are looked at
    bounded = (forward and not own) or (training and not both)
    if not training and size <= _SPAN * bounds[1]:
        return Left(forward, Pace(), True, choice)
    return Left(forward, training, bounded, choice)
