"""How the kernels are started, for padded tensors (B, H, S, D) and for packed sequences (T, H, D)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tilebook.kernels.attention.form import Form, banded, extras, limits
from tilebook.kernels.attention.layout import addressable, describable, like
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd
from tilebook.kernels.attention.triton import columns as by_columns
from tilebook.kernels.attention.triton import forward as by_forward
from tilebook.kernels.attention.triton import rows as by_rows
from tilebook.kernels.attention.triton.args import (
    DESCRIBED,
    MADE,
    PACKED,
    POINTERS,
    VECTOR,
    Packs,
    Rules,
    Scores,
    Stats,
    Steps,
    Tile,
    rules,
)
from tilebook.kernels.attention.triton.backward_space import SPACE as BACKWARD_SPACE
from tilebook.kernels.attention.triton.backward_space import Half, halves
from tilebook.kernels.attention.triton.forward_space import MADE_BY_KERNEL, proven, supports
from tilebook.kernels.attention.triton.forward_space import SPACE as FORWARD_SPACE
from tilebook.kernels.attention.triton.tiles import PACKED_ROWS
from tilebook.launch import launch
from tilebook.op import Config

_ANY = 0x7FFF0000  # no limit on an axis


@dataclass(frozen=True)
class Asked:
    """What a call asks of every kernel: which rows, which limits, what is done to scores.

    n_batch: batches, or packed sequences. n_q, n_k: rows and columns of each, or of all sequences together.
    """

    packs: Packs | None
    n_batch: int
    heads: int
    heads_kv: int
    n_q: int
    n_k: int
    scale: float
    before: int | None
    after: int | None
    scores: Scores
    rules: Rules

    def sizes(self, heads: int) -> tuple[int, int, int, int, int]:
        """The arguments from `n_outer` to `n_k` of a kernel whose programs go over that many heads."""
        outer = self.n_batch * heads if self.packs is None else self.n_batch
        return outer, heads, self.heads // self.heads_kv, self.n_q, self.n_k

    def grid(self, length: int, block: int, heads: int) -> tuple[int]:
        """Programs that take `length` rows or columns by blocks; of packed ones, one a sequence may have no work."""
        if self.packs is None:
            return (triton.cdiv(length, block) * self.n_batch * heads,)
        return ((length // block + self.n_batch + 1) * heads,)


def asked(
    q: torch.Tensor, k: torch.Tensor, form: Form, scale: float, tensors: Sequence[torch.Tensor], dbias: Any = None
) -> Asked:
    """Of a padded call."""
    limited = banded(form)
    before, after = limits(form, q.shape[2], k.shape[2]) if limited else (None, None)
    bias, slopes, seed = extras(form, tensors)
    scores = Scores(softcap=form.softcap or None, seed=seed, dropout=form.dropout or None, dbias=dbias)
    if bias is not None:
        steps = (step if size > 1 else 0 for size, step in zip(bias.shape, bias.stride(), strict=True))
        scores = scores._replace(**dict(zip("bhmn", steps, strict=True)))
        scores = scores._replace(m=scores.m or None)
        if scores.m and scores.n == 1 and not any(x % VECTOR.value for x in (k.shape[2], scores.b, scores.h, scores.m)):
            scores = scores._replace(vectors=1)
        if form.bias == "mask":
            alike = scores.m is None and not scores.h
            scores = scores._replace(mask=bias, h=None if alike else scores.h)
        else:
            scores = scores._replace(bias=bias)
    if slopes is not None:
        each = slopes.stride(0) if slopes.ndim == 2 and slopes.shape[0] > 1 else 0
        scores = scores._replace(slopes=slopes, slope_b=each, slope_h=slopes.stride(-1))
    constants = rules(
        causal=form.causal and not limited,
        banded=limited,
        scored=_exact(q) or bool(form.softcap or form.alibi) or form.bias in ("bias", "dbias"),
        gaps=bool(limited or form.bias),
        tf32=_tf32(q, form),
    )
    (batch, heads, n_q, _), (heads_kv, n_k) = q.shape, k.shape[1:3]
    return Asked(None, batch, heads, heads_kv, n_q, n_k, scale, before, after, scores, constants)


def asked_of_packs(
    q: torch.Tensor, k: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, form: Form, scale: float
) -> Asked:
    """Of a call on packed sequences, each of which has limits of its own."""
    limited = form.left >= 0 or form.right >= 0
    constants = rules(
        causal=False,
        banded=limited,
        scored=_exact(q) or form.softcap > 0,
        gaps=limited,
        tf32=_tf32(q, form),
        bottom_right=form.bottom_right,
    )
    before, after = (side if side >= 0 else None for side in (form.left, form.right))
    (total_q, heads, _), (total_k, heads_kv, _) = q.shape, k.shape
    packs, scores = Packs(cu_q.contiguous(), cu_k.contiguous()), Scores(softcap=form.softcap or None)
    sizes = len(cu_q) - 1, heads, heads_kv, total_q, total_k
    return Asked(packs, *sizes, scale, before, after, scores, constants)


def _exact(q: torch.Tensor) -> bool:
    """In powers of two a score costs one instruction less, and a rounding more than fp32 has to spare."""
    return q.dtype == torch.float32


def _tf32(q: torch.Tensor, form: Form) -> bool:
    """The other dtypes are multiplied as they are; an interpreter multiplies fp32 in full, whatever is allowed."""
    return not _exact(q) or (form.tf32 and not q.is_cpu)


def steps(*tensors: torch.Tensor) -> tuple[Steps, ...]:
    return tuple(Steps(*(x.stride()[:3] if x.ndim == 4 else (x.stride(0), x.stride(1), x.stride(0)))) for x in tensors)


def describe(x: torch.Tensor, rows: int) -> Any:
    """A host-side descriptor for `load_tile`, whose blocks are `rows` rows of one head; wide as a power of two.

    Of packed sequences the steps of its first axis, taken PACKED_ROWS times, come to 2⁶⁴ elements less the rows that
    are too many.
    """
    width = triton.next_power_of_2(x.shape[-1])
    if x.ndim == 4:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, width])
    end = PACKED_ROWS.value
    step, head, _ = x.stride()
    shape = [_ANY, _ANY, x.shape[1], end, x.shape[2]]
    return TensorDescriptor(x, shape, [(1 << 64) // end - step, step, head, step, 1], [1, 1, 1, rows, width])


def _tile(q: torch.Tensor, rows: int, columns: int, heads: Any, descriptors: Any) -> Tile:
    width = q.shape[-1]
    padded, width, rows, columns, heads = map(
        tl.constexpr, (triton.next_power_of_2(width), width, rows, columns, heads)
    )
    return Tile(padded, width, rows, columns, heads, descriptors)


def _how(config: Config, *tensors: torch.Tensor) -> Any:
    """How these tensors are loaded, as the config has it where descriptors can address them."""
    if not config["DESCRIPTORS"] or not describable(*tensors):
        return POINTERS
    if config["DESCRIPTORS"] == MADE_BY_KERNEL:
        return MADE
    return DESCRIBED if tensors[0].ndim == 4 else PACKED


def _options(warps: int, stages: int, cap: int) -> dict[str, int]:
    """Launch options; a cap on registers a thread is none where it is 0."""
    return {"num_warps": warps, "num_stages": stages} | ({"maxnreg": cap} if cap else {})


def start_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Asked, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse, of tensors that are `addressable`."""
    o = like(q)
    lse = torch.empty((call.heads, call.n_q) if call.packs else q.shape[:3], dtype=torch.float32, device=q.device)
    rows, columns, how = config.number("BLOCK_M"), config.number("BLOCK_N"), _how(config, q, k, v)
    made_here = how.value in (DESCRIBED.value, PACKED.value)
    launch(
        by_forward.attention_fwd,
        call.grid(call.n_q, rows, call.heads),
        *((describe(q, rows), describe(k, columns), describe(v, columns)) if made_here else (q, k, v)),
        o,
        lse,
        steps(q, k, v, o),
        call.packs,
        *call.sizes(call.heads),
        call.scale,
        call.before,
        call.after,
        call.scores,
        call.rules,
        _tile(q, rows, columns, config["HEADS"], how),
        **_options(config.number("num_warps"), config.number("num_stages"), int(config.get("MAXNREG", 0))),
    )
    return o, lse


@attention_fwd.implementation("triton", space=FORWARD_SPACE, supports=supports, proven=proven)
def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, *tensors: torch.Tensor, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = addressable(q), addressable(k), addressable(v)
    return start_forward(q, k, v, asked(q, k, form, scale, tensors), config)


def start_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    call: Asked,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, of tensors that are `addressable`; and `call.scores.dbias`, where there is one."""
    dq, dk, dv = like(q), like(k), like(v)
    stats = Stats(lse, torch.empty_like(lse))
    by_column, by_row = halves(config)
    how = _how(config, do, q, k, v)

    def loaded(half: Half) -> tuple[Any, ...]:
        """q, k, v and do as that kernel loads them."""
        if how.value not in (DESCRIBED.value, PACKED.value):
            return q, k, v, do
        return describe(q, half.rows), describe(k, half.columns), describe(v, half.columns), describe(do, half.rows)

    def rest(half: Half, heads: int) -> tuple[Any, ...]:
        """The arguments behind the tensors and their steps."""
        tile = _tile(q, half.rows, half.columns, config["HEADS"], how)
        limits = call.before, call.after
        scores = call.scores if half is by_row else call.scores._replace(dbias=None)
        return call.packs, *call.sizes(heads), call.scale, *limits, scores, call.rules, tile

    # dq first: that kernel also makes the delta that the other one reads.
    launch(
        by_rows.attention_bwd_dq,
        call.grid(call.n_q, by_row.rows, call.heads),
        *loaded(by_row),
        o,
        stats,
        dq,
        steps(q, k, v, do, o, dq),
        *rest(by_row, call.heads),
        **_options(by_row.warps, by_row.stages, by_row.cap),
    )
    launch(
        by_columns.attention_bwd_dkdv,
        call.grid(call.n_k, by_column.columns, call.heads_kv),
        *loaded(by_column),
        stats,
        dk,
        dv,
        steps(q, k, v, do, dk, dv),
        *rest(by_column, call.heads_kv),
        **_options(by_column.warps, by_column.stages, by_column.cap),
    )
    return dq, dk, dv


@attention_bwd.implementation("triton", space=BACKWARD_SPACE, supports=supports, proven=proven)
def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    form: Form,
    scale: float,
    *tensors: torch.Tensor,
    config: Config,
) -> tuple[torch.Tensor, ...]:
    do, q, k, v, o = (addressable(x) for x in (do, q, k, v, o))
    dbias = None
    if form.bias == "dbias":
        dbias = torch.empty((*q.shape[:3], k.shape[2]), dtype=tensors[0].dtype, device=q.device)
    call = asked(q, k, form, scale, tensors, dbias)
    found = start_backward(do, q, k, v, o, lse.contiguous(), call, config)
    if dbias is None:
        return found
    shape = tensors[0].shape
    across = [axis for axis, (n, size) in enumerate(zip(shape, dbias.shape, strict=True)) if n != size]
    return *found, dbias.sum(across, keepdim=True) if across else dbias
