"""What may be wrong with a config: its `FAULT`, 0 for nothing, and how kernels come to have it."""

import functools
import random
import time

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

KINDS = {"silent": 1, "race": 2, "beyond": 3, "ragged": 4, "damage": 5, "hang": 6, "shaky": 7, "outside": 8}
"""Writes nothing; is wrong now and then; reads past the end; is wrong at a ragged end; changes its input; never ends;
gives other bits each time, all of them near enough; writes past the end."""

ALL = tuple(KINDS.values())
NAMES = {number: name for name, number in KINDS.items()}


def _dice():
    """A race, which an interpreter that runs one program after the other cannot have."""
    return float(random.random() < 0.3)


@triton.jit
def _clock():
    return (globaltimer() // 64 % 2).to(tl.float32)


def _rest():
    """What hangs need not keep a processor busy."""
    time.sleep(0.02)
    return 0.0


@triton.jit
def _nothing():
    return 0.0


INTERPRETED = triton.knobs.runtime.interpret
noise, pause = (_dice, _rest) if INTERPRETED else (_clock, _nothing)


@triton.jit
def bound(n, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    """Where stores end that should end at n."""
    if FAULT == 1:
        n = n * 0
    if FAULT == 4:
        n = n // BLOCK * BLOCK
    if FAULT == 8:
        n = n + 3
    return n


@triton.jit
def last(at, n, FAULT: tl.constexpr):
    """Where to load from: of the last element, past the end."""
    if FAULT == 3:
        at += (at == n - 1).to(tl.int32)
    return at


@triton.jit
def spoiled(value, STEP: tl.constexpr, FAULT: tl.constexpr):
    """STEP: what is within the tolerance."""
    if FAULT == 2:
        value += noise()
    if FAULT == 7:
        value *= 1 + STEP * noise()
    return value


@triton.jit
def ended(x, FAULT: tl.constexpr):
    """x: a floating-point input."""
    if FAULT == 5:
        tl.store(x, (tl.load(x).to(tl.float32) + 1).to(x.dtype.element_ty))
    if FAULT == 6:
        seen = tl.load(x).to(tl.float32)
        while seen < 1e30:
            seen = tl.load(x, volatile=True).to(tl.float32) + pause()


def unmeasured(call, quantiles):
    """Nothing is run to be timed, for some of it never ends: the first config wins."""
    return [1.0, 1.0, 1.0]


autotune = functools.partial(triton.autotune, do_bench=unmeasured)
WARPS = (1, 2, 4, 8)
BLOCKS = tuple({"BLOCK": block} for block in (16, 32, 64, 128))


def configs(faults=ALL, tiles=BLOCKS, warps=WARPS):
    """Right ones first, each tile with each number of warps; then one for each fault, of the second tile."""
    right = [triton.Config({**tile, "FAULT": 0}, num_warps=n) for tile in tiles for n in warps]
    return [*right, *(triton.Config({**tiles[1], "FAULT": fault}, num_warps=4) for fault in faults)]
