"""A recorded call does the same again with other tensors, and only where that is safe."""

import ctypes
import gc
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.runtime._allocation import _allocator

from tilebook.launch import launch
from tilebook.replay import record


def _at(address):
    """The 8 × 8 floats at an address, as a kernel sees them."""
    return torch.frombuffer((ctypes.c_float * 64).from_address(address), dtype=torch.float32).view(8, 8)


class Compiled:
    asm, function, packed_metadata = (), 7, "metadata"

    def __init__(self, function, starts):
        self.compute, self.starts = function, starts

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        assert (stream, function, metadata) == ("stream", 7, "metadata")
        self.starts.append((x, y, z))
        self.compute(*map(_at, args[:2]), *args[2:])


class Driver:
    class active:  # noqa: N801
        get_current_device = staticmethod(lambda: -1)
        get_current_stream = staticmethod(lambda device: "stream")


@pytest.fixture(autouse=True)
def _driver(monkeypatch):
    monkeypatch.setattr("triton.runtime.driver", Driver)


class Kernel:
    """Stands for a Triton kernel y = scale · x; counts how often it goes through the JIT."""

    arg_names = ("x", "y", "scale", "BLOCK")

    def __init__(self, compiled=True):
        self.jit, self.starts, self.compiled = 0, [], compiled

    @staticmethod
    def compute(x, y, scale, block):
        assert block == 16
        y.copy_(x * scale)

    def __getitem__(self, grid):
        def run(x, y, scale, *, BLOCK, num_warps):
            self.jit += 1
            self.compute(x.as_subclass(torch.Tensor), y, scale, BLOCK)
            return Compiled(self.compute, self.starts) if self.compiled else None

        return run


class Quiet(Kernel):
    """Its arithmetic is the GPU's, out of PyTorch's sight."""

    @staticmethod
    def compute(x, y, scale, block):
        with torch._C.DisableTorchFunction():
            Kernel.compute(x, y, scale, block)


def launcher(kernel, scale=2.0):
    def call(x):
        half, y = torch.empty_like(x), x.new_empty(x.shape)
        launch(kernel, (4,), x, half, scale, BLOCK=16, num_warps=4)
        launch(kernel, (4,), half, y, scale, BLOCK=16, num_warps=4)
        return (y,)

    return call


def test_plan_repeats_the_launches_on_new_tensors_without_the_jit():
    kernel, x = Quiet(), torch.randn(8, 8)
    (y,), plan = record(launcher(kernel), (x,))
    assert torch.equal(y, 4 * x)
    assert plan is not None
    fresh = torch.randn(8, 8)
    (again,) = plan((fresh,))
    assert torch.equal(again, 4 * fresh)
    assert again.data_ptr() != y.data_ptr()
    assert kernel.jit == 2
    assert kernel.starts == [(4, 1, 1), (4, 1, 1)]


def test_a_tensor_that_was_given_twice_is_two_when_it_is_repeated():
    """What a launcher passes on of the second must be the second's, whatever it was when the call was recorded."""

    def call(x, other):
        y = torch.empty_like(x)
        launch(kernel, (4,), other, y, 2.0, BLOCK=16, num_warps=4)
        return (y,)

    kernel, x, other = Quiet(), torch.randn(8, 8), torch.randn(8, 8)
    (y,), plan = record(call, (x, x))
    assert torch.equal(y, 2 * x)
    assert torch.equal(plan((x, other))[0], 2 * other)


class Fields(NamedTuple):
    x: Any
    y: Any
    scale: Any
    bias: Any = None


class Struct(Quiet):
    """The same with its tensors and the scale in a struct, beside one of numbers."""

    arg_names = ("sizes", "fields")

    def __getitem__(self, grid):
        def run(sizes, fields, *, num_warps):
            self.jit += 1
            self.compute(*fields[:3], 16)
            compiled = Compiled(None, self.starts)
            compiled.run = lambda *args: self._again(*args[9:])
            return compiled

        return run

    def _again(self, sizes, fields):
        x, y, scale, bias = fields
        assert (sizes, bias) == (((1, 2), (3, 4)), None)
        self.compute(_at(x), _at(y), scale, 16)


def _with_structs(kernel, sizes):
    def call(x):
        y = torch.empty_like(x)
        launch(kernel, (4,), sizes, Fields(x, y, 3.0), num_warps=4)
        return (y,)

    return call


@pytest.mark.parametrize("structs", [False, True])
def test_a_plan_keeps_no_tensor_alive(structs):
    """One that was made while a graph was being recorded would lie in the graph's memory for ever."""
    x = torch.randn(8, 8)
    before = {id(each) for each in gc.get_objects() if type(each) is torch.Tensor}
    call = _with_structs(Struct(), ((1, 2), (3, 4))) if structs else launcher(Quiet())
    plan = record(call, (x,))[1]
    assert plan is not None
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is torch.Tensor and id(each) not in before]


def test_tensors_in_a_struct_are_new_each_time_like_any():
    kernel, x = Struct(), torch.randn(8, 8)
    (y,), plan = record(_with_structs(kernel, ((1, 2), (3, 4))), (x,))
    assert torch.equal(y, 3 * x)
    for _ in range(2):
        fresh = torch.randn(8, 8)
        (again,) = plan((fresh,))
        assert torch.equal(again, 3 * fresh)
        assert again.data_ptr() != y.data_ptr()
    assert kernel.jit == 1


def _passes_a_struct_of_structs(x):
    return _with_structs(Struct(), ((x, 2), (3, 4)))(x)


def _zeroes(x):
    y = torch.zeros_like(x)
    launch(Quiet(), (1,), x, y, 2.0, BLOCK=16, num_warps=4)
    return (y,)


def _post_processes(x):
    y = torch.empty_like(x)
    launch(Quiet(), (1,), x, y, 2.0, BLOCK=16, num_warps=4)
    return (y + 1,)


def _fills_in_place(x):
    y = torch.empty_like(x)
    y[0] = 0
    launch(Quiet(), (1,), x, y, 2.0, BLOCK=16, num_warps=4)
    return (y,)


def _passes_a_view(x):
    y = torch.empty_like(x)
    launch(Quiet(), (1,), x.t(), y, 2.0, BLOCK=16, num_warps=4)
    return (y,)


def _reads_a_number(x):
    y = torch.empty_like(x)
    launch(Quiet(), (1,), x, y, x[0, 0].item(), BLOCK=16, num_warps=4)
    return (y,)


def _branches_on_a_number(x):
    y = torch.empty_like(x)
    launch(Quiet(), (1,), x, y, 2.0 if torch.equal(x, x) else 3.0, BLOCK=16, num_warps=4)
    return (y,)


def _lists(x):
    y = torch.empty_like(x)
    launch(Quiet(), (1,), x, y, float(len(x.tolist())), BLOCK=16, num_warps=4)
    return (y,)


def _launches_nothing(x):
    return (torch.empty_like(x),)


SHY = (
    _zeroes, _post_processes, _fills_in_place, _passes_a_view, _passes_a_struct_of_structs, _reads_a_number,
    _branches_on_a_number, _lists, _launches_nothing,
)  # fmt: skip


@pytest.mark.parametrize("function", [*SHY, launcher(Quiet(False))])
def test_a_launcher_that_does_more_than_allocate_and_launch_gets_no_plan(function):
    outputs, plan = record(function, (torch.randn(8, 8),))
    assert plan is None
    assert len(outputs) == 1


def test_a_kernel_that_wants_memory_of_its_own_is_given_it_each_time_and_nobody_else_is():
    mine = object()
    triton.set_allocator(mine)
    found = []

    class Wants(Compiled):
        metadata = SimpleNamespace(global_scratch_size=384)

        def run(self, *args):
            found.append(_allocator.get())
            super().run(*args)

    class Asks(Quiet):
        def __getitem__(self, grid):
            started = super().__getitem__(grid)

            def run(*args, **meta):
                found.append(_allocator.get())
                started(*args, **meta)
                return Wants(self.compute, self.starts)

            return run

    kernel = Asks()

    def double(x):
        y = torch.empty_like(x)
        launch(kernel, (4,), x, y, 2.0, BLOCK=16, num_warps=4)
        return (y,)

    x = torch.randn(8, 8)
    _, plan = record(double, (x,))
    assert torch.equal(plan((x,))[0], 2 * x)
    assert (kernel.jit, len(kernel.starts), len(found)) == (1, 1, 2)
    assert mine not in found
    assert found[0] is found[1]
    assert _allocator.get() is mine
