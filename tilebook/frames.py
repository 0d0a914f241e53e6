"""Functions of ours that PyTorch calls by itself, as kernels, gradients and hooks, and Dynamo is to run as they are."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

try:
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
except ImportError:  # before PyTorch 2.7

    def _leave(code: CodeType) -> None: ...

else:
    _AS_IT_IS: Any = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)

    def _leave(code: CodeType) -> None:
        set_code_exec_strategy(code, _AS_IT_IS)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def as_it_is(function: _Function) -> _Function:
    """Returns the function, which Dynamo runs as it is from now on, with all that it calls.

    Where Dynamo gives up a frame, it looks at each function that is called from there, whoever calls it. What is found
    out about a call then becomes graphs of its own, which break, are compiled anew for each shape, and fail. The
    compiler is not loaded, as `torch.compiler.disable` would. A graph that calls the function by its name is not
    changed: no frame of it is made.
    """
    _leave(function.__code__)
    return function
