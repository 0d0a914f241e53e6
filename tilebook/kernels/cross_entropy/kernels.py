"""Cross entropy's Triton kernels.

Of many classes a program takes one row, BLOCK columns at a time; of few it takes ROWS rows at once. Logits count in
units of 1 / log2(e), so that exponentials are powers of two.

A row need not start at a whole vector of VECTOR elements: with 50257 classes in bf16 most do not. Where `RAGGED`, what
comes before the first whole vector and after the last is taken apart, and the rest is loaded vector by vector.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    """To fp32's rounding: a series where 1 − 2 / (e²ˣ + 1) cancels."""
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    y = x * x
    near = x * (1.0 + y * (-0.3333333333 + y * (0.1333333333 + y * (-0.05396825397 + y * 0.02186948854))))
    return tl.where(tl.abs(x) < 0.15, near, far)


@triton.jit
def _logits(x, inside, softcap, CAPPED: tl.constexpr):
    """Numbers that were loaded as fp32, after the soft-cap; −∞ where there are none, `inside` None if all are there."""
    x = x.to(tl.float32)
    if CAPPED:
        x = softcap * _tanh(x / softcap)
        if inside is not None:
            x = tl.where(inside, x, -float("inf"))
    return x


@triton.jit
def _finite(top):
    """What is subtracted from a row before exponentials: its largest, but 0 where all are −∞."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _fold(x, inside, top, mass, total, SMOOTHED: tl.constexpr):
    """One more block: the largest so far, the sum of e^(x − largest) and of x, both by place in the block."""
    higher = tl.maximum(top, tl.max(x, 0))
    shift = _finite(higher)
    mass = mass * tl.exp2((top - shift) * LOG2E) + tl.exp2((x - shift) * LOG2E)
    if SMOOTHED:
        if inside is not None:
            x = tl.where(inside, x, 0.0)
        total += x
    return higher, mass, total


@triton.jit
def _whole(row, width, stride, VECTOR: tl.constexpr, RAGGED: tl.constexpr):
    """A row's first element in memory, how many come before its first whole vector, and how many are in whole ones."""
    start = row * stride
    if RAGGED:
        head = (VECTOR - start % VECTOR) % VECTOR
        head = tl.minimum(head, width).to(tl.int32)
        body = (width - head) // VECTOR * VECTOR
        body = tl.multiple_of(body, VECTOR)
    else:
        head = 0
        body = width
    return start, head, body


@triton.jit
def _vectors(start, head, VECTOR: tl.constexpr, RAGGED: tl.constexpr):
    """Where the whole vectors of a row begin."""
    first = start + head
    if RAGGED:
        first = tl.multiple_of(first, VECTOR)
    return first


@triton.jit
def _edges(head, body, width, VECTOR: tl.constexpr):
    """The columns outside of whole vectors, and which of 2 · VECTOR places are such a column."""
    e = tl.arange(0, 2 * VECTOR)
    c = tl.where(e < VECTOR, e, head + body + e - VECTOR)
    return c, tl.where(e < VECTOR, e < head, c < width)


@triton.jit
def _loss(mass, top, own, mean, valid, keep, smoothing, z_loss, SMOOTHED: tl.constexpr):
    """loss and lse from the sum of e^(x − top): 0 where a row is ignored, NaN where its target is no class."""
    shift = _finite(top)
    rest = tl.log2(mass) * LN2
    lse = shift + rest
    loss = rest + (shift - own)  # so that what is large cancels first
    if SMOOTHED:
        loss = (1.0 - smoothing) * loss + smoothing * (rest + (shift - mean))
    loss += z_loss * lse * lse
    return tl.where(keep, tl.where(valid, loss, float("nan")), 0.0), tl.where(keep, lse, 0.0)


@triton.jit(do_not_specialize=["rows", "ignored"])
def fwd_kernel(
    logits, target, loss, lse, rows, width, stride, stride_target, ignored, smoothing, softcap, z_loss,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, VECTOR: tl.constexpr, RAGGED: tl.constexpr,
    SMOOTHED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    if ROWS > 1:
        r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        c = tl.arange(0, BLOCK)[None, :]
        label = tl.load(target + r * stride_target, mask=r < rows, other=ignored)
        keep = (r < rows) & (label != ignored)
        inside = keep[:, None] & (c < width)
        x = tl.load(logits + r[:, None] * stride + c, mask=inside, other=-float("inf"))
        x = _logits(x, inside, softcap, CAPPED)
        top = tl.max(x, 1)
        mass = tl.where(keep, tl.sum(tl.exp2((x - _finite(top)[:, None]) * LOG2E), 1), 1.0)
        mean = 0.0
        if SMOOTHED:
            mean = tl.sum(tl.where(inside, x, 0.0), 1) / width
        valid = (label >= 0) & (label < width)
        own = tl.load(logits + r * stride + label, mask=keep & valid, other=0.0)
        own = _logits(own, None, softcap, CAPPED)
        found, sums = _loss(mass, top, own, mean, valid, keep, smoothing, z_loss, SMOOTHED)
        tl.store(loss + r, found, mask=r < rows)
        tl.store(lse + r, sums, mask=r < rows)
    else:
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(target + row * stride_target)
        if label == ignored:
            tl.store(loss + row, 0.0)
            tl.store(lse + row, 0.0)
        else:
            valid = (label >= 0) & (label < width)
            own = tl.load(logits + row * stride + label, mask=valid, other=0.0)
            own = _logits(own, None, softcap, CAPPED)
            start, head, body = _whole(row, width, stride, VECTOR, RAGGED)
            first = logits + _vectors(start, head, VECTOR, RAGGED)
            c = tl.arange(0, BLOCK)
            top = -float("inf")
            mass = tl.zeros((BLOCK,), tl.float32)
            total = tl.zeros((BLOCK,), tl.float32)
            full = body // BLOCK * BLOCK
            for at in tl.range(0, full, BLOCK, num_stages=STAGES):
                x = _logits(tl.load(first + at + c), None, softcap, CAPPED)
                top, mass, total = _fold(x, None, top, mass, total, SMOOTHED)
            if full < body:
                inside = full + c < body
                x = tl.load(first + full + c, mask=inside, other=-float("inf"))
                x = _logits(x, inside, softcap, CAPPED)
                top, mass, total = _fold(x, inside, top, mass, total, SMOOTHED)
            mass = tl.sum(mass, 0)
            mean = 0.0
            if SMOOTHED:
                mean = tl.sum(total, 0)
            if RAGGED:
                e, inside = _edges(head, body, width, VECTOR)
                x = tl.load(logits + start + e, mask=inside, other=-float("inf"))
                x = _logits(x, inside, softcap, CAPPED)
                higher = tl.maximum(top, tl.max(x, 0))
                shift = _finite(higher)
                mass = mass * tl.exp2((top - shift) * LOG2E) + tl.sum(tl.exp2((x - shift) * LOG2E), 0)
                top = higher
                if SMOOTHED:
                    mean += tl.sum(tl.where(inside, x, 0.0), 0)
            if SMOOTHED:
                mean = mean / width
            found, sums = _loss(mass, top, own, mean, valid, True, smoothing, z_loss, SMOOTHED)
            tl.store(loss + row, found)
            tl.store(lse + row, sums)


@triton.jit
def _gradient(x, c, label, lse, factor, flat, hit, softcap, CAPPED: tl.constexpr):
    """softmax(x) · factor − flat, and `hit` less at the target's class; through the soft-cap, if there is one."""
    x = x.to(tl.float32)
    if CAPPED:
        t = _tanh(x / softcap)
        x = softcap * t
    found = tl.exp2((x - lse) * LOG2E) * factor - flat
    found -= tl.where(c == label, hit, 0.0)
    if CAPPED:
        found *= 1.0 - t * t
    return found


@triton.jit(do_not_specialize=["rows", "ignored"])
def bwd_kernel(
    dloss, logits, target, lse, dlogits, rows, width, stride, stride_target, chunks, ignored, smoothing, softcap,
    z_loss,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, RAGGED: tl.constexpr, SAME: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """dlogits, dense. SAME: are the rows of logits dense, too?

    Of an ignored row no logit is read. One whose target is no class has NaN.
    """
    program = tl.program_id(0)
    if ROWS > 1:
        r = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        c = tl.arange(0, BLOCK)[None, :]
        label = tl.load(target + r * stride_target, mask=r < rows, other=ignored)
        keep = (r < rows) & (label != ignored)
        upper = tl.load(dloss + r, mask=keep, other=0.0)
        upper = tl.where((label < 0) | (label >= width), float("nan"), upper)
        sums = tl.load(lse + r, mask=keep, other=0.0)
        factor, flat, hit = upper * (1.0 + 2.0 * z_loss * sums), upper * smoothing / width, upper * (1.0 - smoothing)
        x = tl.load(logits + r[:, None] * stride + c, mask=keep[:, None] & (c < width), other=0.0)
        found = _gradient(
            x, c, label[:, None], sums[:, None], factor[:, None], flat[:, None], hit[:, None], softcap, CAPPED
        )
        found = tl.where(keep[:, None], found, 0.0)
        there = (r < rows)[:, None] & (c < width)
        tl.store(dlogits + r[:, None] * width + c, found.to(dlogits.dtype.element_ty), mask=there)
    else:
        row, at = (program // chunks).to(tl.int64), (program % chunks) * BLOCK
        label = tl.load(target + row * stride_target)
        keep = label != ignored
        upper = tl.load(dloss + row)
        upper = tl.where((label < 0) | (label >= width), float("nan"), upper)
        sums = tl.load(lse + row)
        factor, flat, hit = upper * (1.0 + 2.0 * z_loss * sums), upper * smoothing / width, upper * (1.0 - smoothing)
        start, head, body = _whole(row, width, stride, VECTOR, RAGGED)
        first = _vectors(start, head, VECTOR, RAGGED)
        if SAME:
            begin, out = start, first
        else:
            begin, out = row * width, row * width + head
        c = at + tl.arange(0, BLOCK)
        x = tl.load(logits + first + c, mask=c < tl.where(keep, body, 0), other=0.0)
        found = _gradient(x, c + head, label, sums, factor, flat, hit, softcap, CAPPED)
        found = tl.where(keep, found, 0.0)
        tl.store(dlogits + out + c, found.to(dlogits.dtype.element_ty), mask=c < body)
        if RAGGED:  # noqa: SIM102 (one is known when the kernel is compiled)
            if at == 0:
                e, inside = _edges(head, body, width, VECTOR)
                rest = tl.load(logits + start + e, mask=inside & (e < tl.where(keep, width, 0)), other=0.0)
                grad = _gradient(rest, e, label, sums, factor, flat, hit, softcap, CAPPED)
                grad = tl.where(keep, grad, 0.0)
                tl.store(dlogits + begin + e, grad.to(dlogits.dtype.element_ty), mask=inside)
