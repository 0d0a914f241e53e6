"""How the kernels of the gated delta rule are started."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tilebook import device as devices
from tilebook.kernels.attention.layout import addressable, like
from tilebook.kernels.bidirectional.tiles import Rows
from tilebook.kernels.delta_rule.backward import changes_kernel, gradients_kernel, return_kernel
from tilebook.kernels.delta_rule.kernels import answers_kernel, pairs_kernel, walk_kernel
from tilebook.kernels.delta_rule.tiles import Given, Tile
from tilebook.kernels.linear_attention.layout import new_state
from tilebook.launch import launch
from tilebook.op import Config

_NOTHING = Given(None, 0, 0, 0, 0)
_NO_ROWS = Rows(None, 0, 0, 0)


def _given(x: torch.Tensor | None) -> Given:
    return _NOTHING if x is None else Given(x, *x.stride())


def _rows(x: torch.Tensor) -> Rows:
    return Rows(x, *x.stride()[:3])


def _merging(q: torch.Tensor) -> str:
    """The precision of products that inverses are made of: rounded to tf32 once they would be coarser than fp16."""
    exact = q.dtype == torch.float32 or q.is_cpu or devices.current(q.device.index or 0).backend != "cuda"
    return "ieee" if exact else "tf32x3"


class _Call:
    """What all kernels of one call are told."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, normalize: bool, config: Config
    ) -> None:
        self.q, self.k, self.v, self.scale, self.config = q, k, v, scale, config
        self.batch, self.heads, self.n, self.width = q.shape
        self.columns, self.chunk = v.shape[-1], config.number("CHUNK")
        self.pairs, self.chunks = self.batch * self.heads, triton.cdiv(self.n, self.chunk)
        wide = max(16, triton.next_power_of_2(self.width))
        self.constants = {
            "CHUNK": self.chunk, "D": self.width, "V": self.columns, "WIDE": wide, "SLICE": min(wide, 64),
            "NORM": normalize, "EXACT": q.dtype == torch.float32, "MERGE": _merging(q),
        }  # fmt: skip
        squares = self.pairs, self.chunks, self.chunk, self.chunk
        self.lines = self.empty((self.pairs, 5 if normalize else 3, self.n), torch.float32)
        self.inverse, self.scores = self.empty(squares, q.dtype), self.empty(squares, q.dtype)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def states(self) -> torch.Tensor:
        """A place for one of each chunk: in bf16, as factors of products are; fp16 has not the range."""
        narrow = torch.bfloat16 if self.q.dtype == torch.bfloat16 else torch.float32
        return self.empty((self.pairs, self.chunks, self.columns, self.width), narrow)

    def tile(self, block_v: int) -> Any:
        constants = {**self.constants, "BLOCK_V": block_v}
        return Tile(**{name: tl.constexpr(constants[name]) for name in Tile._fields})

    def find_pairs(self, g: torch.Tensor | None, beta: torch.Tensor) -> None:
        steps = (0, 0, 0) if g is None else g.stride()
        launch(
            pairs_kernel, (self.pairs, self.chunks), _rows(self.q), _rows(self.k), self.q if g is None else g, beta,
            self.lines, self.inverse, self.scores, *steps, *beta.stride(), self.heads, self.n, self.scale,
            self.tile(16), DECAY=g is not None, num_warps=self.config["PAIR_WARPS"], num_stages=1,
        )  # fmt: skip

    @property
    def walks(self) -> tuple[tuple[int], Any, dict[str, Any]]:
        """Grid, constants and options of kernels that walk along all chunks."""
        block_v = self.config.number("BLOCK_V")
        options = {axis: self.config[axis] for axis in ("num_warps", "num_stages")}
        return (triton.cdiv(self.columns, block_v) * self.pairs,), self.tile(block_v), options

    def walk(self, init: Given, final: Given, states: Any, written: Any, o: Any) -> None:
        grid, tile, options = self.walks
        launch(
            walk_kernel, grid, _rows(self.q), _rows(self.k), _rows(self.v), self.lines, self.inverse, self.scores, init,
            final, states, _NO_ROWS if written is None else _rows(written), _NO_ROWS if o is None else _rows(o),
            self.heads, self.n, self.scale, tile, KEEP=states is not None, ANSWER=o is not None, **options,
        )  # fmt: skip


def gated_delta_rule_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, beta: torch.Tensor,
    state: torch.Tensor | None, scale: float, normalize: bool, *, config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v = addressable(q), addressable(k), addressable(v)
    call = _Call(q, k, v, scale, normalize, config)
    o, final = like(v), new_state(q, v, False)
    call.find_pairs(g, beta)
    if not config["APART"]:
        call.walk(_given(state), _given(final), None, None, o)
        return o, final
    states, written = call.states(), call.empty(v.shape, v.dtype)
    call.walk(_given(state), _given(final), states, written, None)
    block_v = config.number("CHUNK_V")
    launch(
        answers_kernel, (triton.cdiv(call.columns, block_v) * call.pairs, call.chunks), _rows(q), call.lines,
        call.scores, states, _rows(written), _rows(o), call.heads, call.n, scale, call.tile(block_v),
        num_warps=config["CHUNK_WARPS"], num_stages=1,
    )  # fmt: skip
    return o, final


def gated_delta_rule_bwd(
    do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    g: torch.Tensor | None, beta: torch.Tensor, state: torch.Tensor | None, scale: float, normalize: bool, *,
    config: Config,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    do, q, k, v = addressable(do), addressable(q), addressable(k), addressable(v)
    call = _Call(q, k, v, scale, normalize, config)
    nothing = torch.empty(0, dtype=torch.float32, device=q.device)
    dq, dk, dv = like(q), like(k), like(v)
    dg = nothing if g is None else call.empty(q.shape[:3], torch.float32)
    dbeta = call.empty(q.shape[:3], torch.float32)
    dinit = nothing if state is None else new_state(q, v, False)
    states, grads = call.states(), call.states()
    written, dz = (call.empty(v.shape, v.dtype) for _ in range(2))
    call.find_pairs(g, beta)
    call.walk(_given(state), _NOTHING, states, written, None)
    grid, tile, options = call.walks
    launch(
        return_kernel, grid, _rows(do), _rows(q), _rows(k), call.lines, call.inverse, call.scores, _given(dstate),
        _NOTHING if state is None else _given(dinit), grads, _rows(dz), _rows(dv), call.heads, call.n, scale, tile,
        **options,
    )  # fmt: skip
    asked, changed = torch.empty_like(call.scores), torch.empty_like(call.scores)
    along = call.empty((call.pairs, 2, call.n), torch.float32) if normalize else nothing
    chunks, tile = (call.pairs, call.chunks), call.tile(config.number("CHUNK_V"))
    options = {"num_warps": config["CHUNK_WARPS"], "num_stages": config["CHUNK_STAGES"]}
    launch(
        changes_kernel, chunks, _rows(do), _rows(k), _rows(v), _rows(written), _rows(dz), call.lines, call.scores,
        asked, changed, dg, dbeta, along, call.heads, call.n, scale, tile, DECAY=g is not None, **options,
    )  # fmt: skip
    launch(
        gradients_kernel, chunks, _rows(do), _rows(q), _rows(k), _rows(written), _rows(dz), call.lines, asked, changed,
        states, grads, _rows(dq), _rows(dk), dg, dbeta, along, call.heads, call.n, scale, tile, DECAY=g is not None,
        **options,
    )  # fmt: skip
    return dq, dk, dv, dg, dbeta, dinit
