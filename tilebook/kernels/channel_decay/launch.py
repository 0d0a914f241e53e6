"""How the kernels of decays by channel are started."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tilebook.kernels.attention.layout import addressable, like
from tilebook.kernels.bidirectional.tiles import Rows
from tilebook.kernels.channel_decay.kernels import (
    gradients_kernel,
    outputs_kernel,
    pairs_kernel,
    scan_kernel,
    states_kernel,
    sums_kernel,
)
from tilebook.kernels.channel_decay.tiles import Tile
from tilebook.kernels.delta_rule.tiles import Given
from tilebook.kernels.linear_attention.layout import new_state
from tilebook.kernels.linear_attention.space import walks
from tilebook.launch import launch
from tilebook.op import Config

_SCANNED = 512
"""Numbers of a state that a program of the scan takes."""

_NOTHING = Given(None, 0, 0, 0, 0)


def _given(x: torch.Tensor | None) -> Given:
    return _NOTHING if x is None else Given(x, *x.stride())


def _rows(x: torch.Tensor) -> Rows:
    return Rows(x, *x.stride()[:3])


class _Call:
    """What all kernels of one call are told."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, scale: float, config: Config
    ) -> None:
        self.q, self.k, self.g, self.scale, self.config = q, k, g, scale, config
        self.batch, self.heads, self.n, self.width = q.shape
        self.columns, self.chunk = v.shape[-1], config.number("CHUNK")
        self.pairs, self.chunks = self.batch * self.heads, triton.cdiv(self.n, self.chunk)
        self.wide = max(16, triton.next_power_of_2(self.width))
        self.asking, self.leaving = (self.empty(tuple(q.shape), q.dtype) for _ in range(2))
        self.kept = self.empty((self.pairs, self.chunks, self.width), torch.float32)
        self.scores = self.empty((self.pairs, self.chunks, self.chunk, self.chunk), q.dtype)
        self.sums = self.empty(tuple(q.shape), torch.float32)
        self.rests = self.empty(tuple(q.shape), torch.float32) if q.dtype == torch.float32 else None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def tile(self, block_v: int) -> Any:
        constants = {
            "CHUNK": self.chunk, "LEVELS": self.chunk.bit_length() - 1, "D": self.width, "V": self.columns,
            "WIDE": self.wide, "SLICE": self.config.number("SLICE"), "BLOCK_V": block_v,
            "EXACT": self.q.dtype == torch.float32,
        }  # fmt: skip
        return Tile(**{name: tl.constexpr(constants[name]) for name in Tile._fields})

    def grid(self, block_v: int, walk: int) -> tuple[int, int]:
        return triton.cdiv(self.columns, block_v) * self.pairs, triton.cdiv(self.chunks, walk)

    @property
    def slices(self) -> tuple[int, int, int]:
        """A program for each slice of each chunk's channels."""
        return self.pairs, self.chunks, triton.cdiv(self.width, self.config.number("SLICE"))

    def find_pairs(self) -> None:
        tile = self.tile(16)
        launch(
            sums_kernel, self.slices, _rows(self.g), self.sums, self.rests, self.heads, self.n, tile, num_warps=4,
            num_stages=1,
        )  # fmt: skip
        launch(
            pairs_kernel, (self.pairs, self.chunks), _rows(self.q), _rows(self.k), self.sums, self.rests,
            _rows(self.asking), _rows(self.leaving), self.kept, self.scores, self.heads, self.n, self.scale, tile,
            num_warps=self.config["PAIR_WARPS"], num_stages=1,
        )  # fmt: skip

    def states(
        self, x: torch.Tensor, y: torch.Tensor, init: Given, final: Given, every: int, walk: int, reverse: bool = False
    ) -> torch.Tensor:
        """The states in front of every `every` chunks, or behind where `reverse`, found by walks of `walk` chunks."""
        block_v = self.config.number("STATE_V")
        grid, options = self.grid(block_v, walk), {"num_warps": self.config["STATE_WARPS"], "num_stages": 2}
        size, starts = self.columns * self.width, None

        def walked(init: Given, starts: Any, states: Any, totals: Any, final: Given, store: bool) -> None:
            launch(
                states_kernel, grid, _rows(x), _rows(y), self.kept, init, starts, states, totals, final, self.heads,
                self.n, walk, every, self.tile(block_v), STORE=store, REVERSE=reverse, **options,
            )  # fmt: skip

        if grid[1] > 1:
            starts = self.empty((self.pairs, grid[1], size), torch.float32)
            totals = self.empty((self.pairs, grid[1], self.width), torch.float32)
            walked(_NOTHING, None, starts, totals, _NOTHING, store=False)
            launch(
                scan_kernel, (self.pairs, triton.cdiv(size, _SCANNED)), starts, totals, init, final, self.heads,
                grid[1], D=self.width, SIZE=size, BLOCK=_SCANNED, REVERSE=reverse, num_warps=4,
            )  # fmt: skip
            if every == walk:
                return starts
            final = _NOTHING
        # Of one chunk's products they are factors, in the dtype of the others; fp16 has not the range.
        narrow = every == 1 and self.q.dtype == torch.bfloat16
        dtype = torch.bfloat16 if narrow else torch.float32
        states = self.empty((self.pairs, triton.cdiv(self.chunks, every), size), dtype)
        walked(init, starts, states, None, final, store=True)
        return states

    def outputs(
        self, x: torch.Tensor, y: torch.Tensor, init: Given, starts: Any, final: Given, o: torch.Tensor, walk: int, *,
        turned: bool, block_v: int, **options: Any,
    ) -> None:  # fmt: skip
        launch(
            outputs_kernel, self.grid(block_v, walk), _rows(x), _rows(y), _rows(self.leaving), self.kept, self.scores,
            init, starts, final, _rows(o), self.heads, self.n, walk, self.tile(block_v),
            ONE=walk == 1 and final is _NOTHING, TURNED=turned, **options,
        )  # fmt: skip


def channel_decay_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor | None, scale: float, *,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v, g = addressable(q), addressable(k), addressable(v), addressable(g)
    call = _Call(q, k, v, g, scale, config)
    o, end = like(v), new_state(q, v, False)
    call.find_pairs()
    walk, long = walks(call.chunks, config)
    init, final, starts = _given(state), _given(end), None
    if walk < call.chunks:
        starts, final = call.states(call.leaving, v, init, final, walk, long), _NOTHING
    call.outputs(
        call.asking, v, init, starts, final, o, walk, turned=False, block_v=config.number("BLOCK_V"),
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    return o, end


def channel_decay_bwd(
    do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
    state: torch.Tensor | None, scale: float, decayed: bool, *, config: Config,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    do, q, k, v, g = (addressable(x) for x in (do, q, k, v, g))
    call = _Call(q, k, v, g, scale, config)
    nothing = call.empty((0,), torch.float32)
    dq, dk, dv = like(q), like(k), like(v)
    dg = call.empty(tuple(q.shape), torch.float32) if decayed else nothing
    dinit = nothing if state is None else new_state(q, v, False)
    call.find_pairs()
    walk, end = walks(call.chunks, config)[1], _NOTHING if state is None else _given(dinit)
    states = call.states(call.leaving, v, _given(state), _NOTHING, 1, walk)
    grads = call.states(call.asking, do, _given(dstate), end, 1, walk, reverse=True)
    call.outputs(
        call.leaving, do, _NOTHING, grads, _NOTHING, dv, 1, turned=True, block_v=config.number("STATE_V"),
        num_warps=config["STATE_WARPS"], num_stages=1,
    )  # fmt: skip
    tile = call.tile(config.number("BLOCK_V"))
    launch(
        gradients_kernel, call.slices, _rows(do), _rows(q), _rows(k), _rows(v), call.sums, call.rests, states, grads,
        _rows(dq), _rows(dk), _rows(dg) if decayed else _rows(dq),
        call.heads, call.n, scale, tile, DECAYED=decayed, num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )  # fmt: skip
    return dq, dk, dv, dg, dinit
