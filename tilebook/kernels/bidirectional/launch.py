"""How the kernels are started."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tilebook.kernels.attention.layout import addressable, like
from tilebook.kernels.bidirectional.form import PERFORMER
from tilebook.kernels.bidirectional.kernels import Tile, gather_kernel, join_kernel, read_kernel, spread_kernel
from tilebook.kernels.bidirectional.layout import new_state, outputs
from tilebook.kernels.bidirectional.tiles import Rows
from tilebook.launch import launch
from tilebook.op import Config

_JOINED = 16
"""Rows of a state that a program adds up."""


def _rows(x: torch.Tensor) -> Rows:
    return Rows(x, *x.stride()[:3])


class _Call:
    """What all kernels of one call are told."""

    def __init__(
        self, q: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, omega: torch.Tensor | None, feature_map: str,
        scale: float, eps: float, config: Config,
    ) -> None:  # fmt: skip
        self.q, self.mask, self.omega, self.map = q, mask, omega, feature_map
        self.scale, self.eps, self.config = scale, eps, config
        self.batch, self.heads, _, self.width = q.shape
        self.columns, self.features = v.shape[-1], self.width if omega is None else omega.shape[1]
        self.chunk, self.block = config.number("CHUNK"), config.number("BLOCK_V")
        keys = v.shape[2] * self.features
        self.room = 2.0 ** (keys.bit_length() // 2) if q.dtype == torch.float16 else 1.0
        steps = (0, 0) if mask is None else mask.stride()
        self.masked = *steps, self.heads
        self.options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
        wide, wide_f = (max(16, triton.next_power_of_2(n)) for n in (self.width, self.features))
        constants = {
            "CHUNK": self.chunk, "D": self.width, "V": self.columns, "F": self.features, "WIDE": wide,
            "WIDE_F": wide_f, "BLOCK_V": self.block, "MAP": feature_map, "EXACT": q.dtype == torch.float32,
        }  # fmt: skip
        self.wide_f, self.tile = wide_f, Tile(**{name: tl.constexpr(value) for name, value in constants.items()})

    def grid(self, n: int, apart: bool) -> tuple[int, int]:
        tiles = triton.cdiv(self.columns, self.block) if apart else 1
        return tiles * self.batch * self.heads, triton.cdiv(n, self.chunk)

    def gathered(
        self, x: torch.Tensor, y: torch.Tensor, known: Any = None, den: Any = None, extra: Any = None
    ) -> torch.Tensor:
        """The state of keys x and values y; with what is `known` of them, of queries and gradients of outputs."""
        programs, chunks = self.grid(x.shape[2], True)
        walk = self.config.number("WALK") or chunks
        parts, queries = triton.cdiv(chunks, walk), known is not None
        found = new_state(self.q, self.columns, self.features, parts)
        launch(
            gather_kernel, (programs, parts), _rows(x), _rows(y), None if queries else self.mask, self.omega, known,
            den, extra, found, *self.masked, x.shape[2], walk, self.scale, self.eps, self.room, self.tile,
            QUERIES=queries, **self.options,
        )  # fmt: skip
        if parts == 1:
            return found
        whole = new_state(self.q, self.columns, self.features)
        launch(
            join_kernel, (self.batch * self.heads, triton.cdiv(self.columns + 1, _JOINED)), found, whole, parts,
            V=self.columns, F=self.features, BLOCK=_JOINED, WIDE_F=self.wide_f,
            TOPS=self.map == PERFORMER and not queries, num_warps=4,
        )  # fmt: skip
        return whole


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, omega: torch.Tensor | None,
    feature_map: str, scale: float, eps: float, *, config: Config,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v = addressable(q), addressable(k), addressable(v)
    call = _Call(q, v, mask, omega, feature_map, scale, eps, config)
    state = call.gathered(k, v)
    o, den = outputs(q, v), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch(
        read_kernel, call.grid(q.shape[2], True), _rows(q), omega, state, _rows(o), den, call.heads, q.shape[2], scale,
        eps, call.tile, **call.options,
    )  # fmt: skip
    return o, state, den


def backward(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
    omega: torch.Tensor | None, o: torch.Tensor, state: torch.Tensor, den: torch.Tensor, feature_map: str, scale: float,
    eps: float, *, config: Config,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    do, q, k, v, o = (addressable(x) for x in (do, q, k, v, o))
    call = _Call(q, v, mask, omega, feature_map, scale, eps, config)
    dq, dk, dv, extra = like(q), like(k), like(v), torch.empty_like(den)

    def spread(x: torch.Tensor, y: torch.Tensor, grads: torch.Tensor, dx: torch.Tensor, queries: bool) -> None:
        launch(
            spread_kernel, call.grid(x.shape[2], False), _rows(x), _rows(y), _rows(o), None if queries else mask, omega,
            state, grads, den, extra, _rows(dx), _rows(dv), *call.masked, x.shape[2], scale, eps, call.room, call.tile,
            QUERIES=queries, **call.options,
        )  # fmt: skip

    spread(q, do, state, dq, True)
    grads = call.gathered(q, do, state, den, extra)
    spread(k, v, grads, dk, False)
    return dq, dk, dv
