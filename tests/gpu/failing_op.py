"""Candidates that break on a GPU in ten ways. Imported by name in workers."""

import os
import signal
import time

import torch
import triton
import triton.language as tl
from injected import make_injected

from tilebook.launch import launch

SPIN_S = 25
"""How long the endless loop takes to end by itself, so that no GPU stays hung whatever happens to its process."""


def good(x, n):
    y, z = torch.empty_like(x), torch.empty_like(x)
    torch.mul(x, 3, out=y)
    torch.mul(x, 5, out=z)
    return y, z


@triton.jit
def broken_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.no_such_function(BLOCK))


@triton.jit
def greedy_kernel(a, c, n, BM: tl.constexpr, BK: tl.constexpr):
    """A product whose pipeline takes half a megabyte of shared memory."""
    rows, inner = tl.arange(0, BM), tl.arange(0, BK)
    acc = tl.zeros((BM, BM), tl.float32)
    for start in range(0, n, BK):
        left = tl.load(a + rows[:, None] * n + start + inner[None, :])
        right = tl.load(a + (start + inner)[:, None] * n + rows[None, :])
        acc = tl.dot(left, right, acc)
    tl.store(c + rows[:, None] * BM + rows[None, :], acc.to(c.dtype.element_ty))


@triton.jit
def wild_kernel(x, offset):
    tl.store(x + offset, 1.0)


@triton.jit
def misaligned_kernel(x):
    address = x.to(tl.int64) + 2
    tl.store(address.to(tl.pointer_type(tl.float32)), 1.0)


@triton.jit
def trap_kernel(x):
    value = tl.program_id(0)
    value = tl.inline_asm_elementwise("trap; mov.u32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(x, value.to(tl.float16))


@triton.jit
def spin_kernel(x, nanoseconds):
    start = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    now = start
    while now - start < nanoseconds:
        now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    tl.store(x, (now - start).to(tl.float16))


def compile_error(x, n):
    launch(broken_kernel, (1,), x, BLOCK=16 << n % 4)
    return good(x, n)


def out_of_resources(x, n):
    if n % 2:
        return torch.empty(1 << 46, dtype=x.dtype, device=x.device), x
    a, c = torch.zeros(64, 4096, dtype=x.dtype, device=x.device), x.new_empty(64, 64)
    launch(greedy_kernel, (1,), a, c, 4096, BM=64, BK=256, num_warps=4, num_stages=8)
    return good(x, n)


def illegal_access(x, n):
    launch(wild_kernel, (1,), x, (1 << 44) + n)
    return good(x, n)


def misaligned_access(x, n):
    launch(misaligned_kernel, (1,), torch.empty_like(x))
    return good(x, n)


def trap(x, n):
    launch(trap_kernel, (1,), torch.empty_like(x))
    return good(x, n)


def long_loop(x, n):
    launch(spin_kernel, (1,), torch.empty_like(x), SPIN_S * 10**9)
    return good(x, n)


def ignored_sigterm(x, n):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(600)
    return good(x, n)


def forked_child(x, n):
    """Stays in the process group, leaves it, or becomes a daemon."""
    if os.fork() == 0:
        if n % 3:
            os.setsid()
        if n % 3 == 2 and os.fork():
            os._exit(0)
        time.sleep(600)
        os._exit(0)
    return good(x, n)


class Unheard(Exception):
    pass


def unknown_exception(x, n):
    raise Unheard(f"of candidate {n}")


def killed_worker(x, n):
    os.kill(os.getpid(), signal.SIGKILL)


KINDS = (
    compile_error,
    out_of_resources,
    illegal_access,
    misaligned_access,
    trap,
    long_loop,
    ignored_sigterm,
    forked_child,
    unknown_exception,
    killed_worker,
)
FAILING = make_injected("failing", good, {kind.__name__: kind for kind in KINDS})
