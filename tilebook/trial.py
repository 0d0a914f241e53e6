"""What a module computes, tried on random numbers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from tilebook.dispatch import here

Function = Callable[..., Any]


class Forward(partial[Any]):
    """What a module calls instead of its class's `forward`: a function of the module and more, then of the call's
    arguments. Programs that ask what it takes are told what its class's takes, and pass that.

    told: who is told of copies, of which nobody has asked for the change; None where somebody has.
    """

    told: Callable[[Forward], None] | None = None

    @property
    def __signature__(self) -> inspect.Signature:
        module = self.args[0]
        return inspect.signature(type(module).forward.__get__(module))

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if self.told is not None:
            self.told(self)


class Left(Exception):
    """The module stays as it is; the text says why."""


def served(x: Any) -> bool:
    """May a call be other than plain PyTorch's? Where not, a module's own forward costs the host less."""
    return bool(getattr(x, "is_cuda", False) or here.forced is not None)


def served_with(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """The same of a call with these arguments: of the first tensor among them."""
    for each in (*args, *kwargs.values()):
        if isinstance(each, torch.Tensor):
            return served(each)
    return False


def undisturbed() -> bool:
    """Can a module be tried now? Not while a program is traced, transformed, watched by a mode, or captured."""
    state: Any = torch._C
    cuda: Any = torch.cuda
    return not (
        torch.compiler.is_compiling()
        or state._get_tracing_state() is not None
        or state._len_torch_dispatch_stack()
        or state._functorch.peek_interpreter_stack() is not None
        or (cuda.is_initialized() and cuda.is_current_stream_capturing())
    )


def drawn() -> Function:
    """Draws random numbers of a shape, in fp32 on the CPU, whatever a program's defaults are."""
    return partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


def standing(module: nn.Module, layers: Mapping[str, nn.Module], training: bool) -> nn.Module:
    """The same module in training, dropouts and all, or not; but for these layers, and with buffers of its own."""
    other = copy.copy(module)
    children = module._modules.items()
    inner = {name: layers.get(name) or (each and standing(each, {}, training)) for name, each in children}
    buffers = {name: each if each is None else each.clone() for name, each in module._buffers.items()}
    other.__dict__.update(training=training, _modules=inner, _buffers=buffers)
    return other


def called(module: nn.Module, other: nn.Module, x: torch.Tensor) -> Any:
    """What another module like this one gives. Raises Left where it does not take one tensor, or keeps some of it."""
    found = result(type(module).forward, other, x)
    for mine, its in zip(module.buffers(), other.buffers(), strict=False):
        if not mine.is_meta and not torch.equal(mine, its):
            raise Left("changes buffers of its own")
    return found


def result(function: Function, *args: Any) -> Any:
    """What a module gives, without gradients. Raises Left where it does not take one tensor."""
    try:
        with torch.no_grad(), torch._C._DisableAutocast(), torch.random.fork_rng([]):
            return function(*args)
    except Exception as broken:
        raise Left(f"cannot be tried: {type(broken).__name__}") from None


def alike(theirs: Any, ours: torch.Tensor) -> bool:
    """Are these the same numbers but for a few roundings?"""
    if not isinstance(theirs, torch.Tensor) or (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype):
        return False
    size = theirs.float().abs().max().item()
    allowed = 8 * torch.finfo(theirs.dtype).eps * size
    return size > 0 and bool((theirs.float() - ours.float()).abs().max().item() <= allowed)
