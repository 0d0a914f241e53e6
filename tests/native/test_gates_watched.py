"""Where a mode, a transform, a trace or a profile is to see calls of public functions, no gate answers them."""

import contextlib
import cProfile
import sys
from functools import partial

import pytest
import torch
from gate_samples import heads, rows
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tilebook
from tilebook import dispatch


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Ops(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def tracing(what):
    before = (sys.gettrace, sys.getprofile)[what is sys.setprofile]()
    what(lambda *_: None)
    try:
        yield
    finally:
        what(before)


@contextlib.contextmanager
def monitoring(code=None):
    """Events of all code, or of this one, are asked for, as profiles of Python's and debuggers do."""
    if not hasattr(sys, "monitoring"):
        pytest.skip("from Python 3.12 on")
    tools = sys.monitoring
    started = tools.events.PY_START
    tools.use_tool_id(4, "a test")
    try:
        tools.set_local_events(4, code, started) if code else tools.set_events(4, started)
        yield
    finally:
        tools.set_events(4, 0)
        if code:
            tools.set_local_events(4, code, 0)
        tools.free_tool_id(4)


@contextlib.contextmanager
def compiling(name="_is_compiling_flag"):
    before = getattr(torch.compiler, name)
    setattr(torch.compiler, name, True)
    try:
        yield
    finally:
        setattr(torch.compiler, name, before)


@contextlib.contextmanager
def frames():
    """Frames are looked at by a compiler, which leaves all as they are."""
    before = torch._C._dynamo.eval_frame.set_eval_frame(False)
    try:
        yield
    finally:
        torch._C._dynamo.eval_frame.set_eval_frame(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def transformed(transform):
    """Within a transform of another tensor."""
    with contextlib.ExitStack() as stack:
        layer = torch._C._functorch
        if transform == "vmap":
            layer._vmap_increment_nesting(2, "error")
            stack.callback(layer._vmap_decrement_nesting)
        else:
            layer._grad_increment_nesting()
            stack.callback(layer._grad_decrement_nesting)
        yield


def without(key):
    """No calls of this key of the dispatcher's."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))


UNUSUAL = {
    "a mode of functions": Functions,
    "a default device": lambda: torch.device("cpu"),
    "a mode of ops": Ops,
    "vmap": partial(transformed, "vmap"),
    "grad": partial(transformed, "grad"),
    "deterministic algorithms": deterministic,
    "an excluded key": lambda: without(torch._C.DispatchKey.FuncTorchBatched),
    "a profiler": lambda: torch.autograd.profiler.profile(),
    "a debugger": partial(tracing, sys.settrace),
    "a profile of Python's": partial(tracing, sys.setprofile),
    "Python's profiler": cProfile.Profile,
    "a monitor": monitoring,
    "a monitor of the function": lambda: monitoring(tilebook.attention.__code__),
    "a trace by the compiler": compiling,
    "frames of the compiler": frames,
    "a forced implementation": lambda: dispatch.here.use("torch"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_where_anything_is_unusual_the_function_is_called(gated, name):
    given = heads()
    gated.known(tilebook.attention, *given)
    with UNUSUAL[name]():
        assert all(gated.looked_at(tilebook.attention, *given) for _ in range(3))
    gated.known(tilebook.attention, *given)
    assert gated.answered(tilebook.attention, *given)[0]


@pytest.mark.skipif(not hasattr(torch._C, "_skip_one_hop_torch_function"), reason="of newer versions of PyTorch")
def test_a_call_past_one_mode_is_looked_at(gated):
    given = rows(1)
    gated.known(tilebook.rms_norm, *given)
    gated.here._tell("counted")
    with Functions():
        torch._C._skip_one_hop_torch_function(tilebook.rms_norm, (), tuple(given), {})
    torch._C._skip_one_hop_torch_function(tilebook.rms_norm, (), tuple(given), {})
    assert not gated.extension.gates_counted()
