"""How the kernels of linear attention are started."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tilebook import device as devices
from tilebook.arch import since_blackwell
from tilebook.kernels.attention.layout import addressable, like
from tilebook.kernels.bidirectional.tiles import Rows
from tilebook.kernels.linear_attention.kernels import (
    Gradients,
    States,
    Tile,
    backward_kernel,
    decays_kernel,
    forward_kernel,
    scan_kernel,
    states_kernel,
)
from tilebook.kernels.linear_attention.layout import new_state
from tilebook.kernels.linear_attention.space import walks
from tilebook.launch import launch
from tilebook.op import Config

_SCANNED = 512
"""Numbers of a state that a program of the scan takes."""

_SUMMED = 1024
"""Tokens whose log-decays a program sums up."""

_NOWHERE = States(None, 0, 0, 0, 0, 0)


def _given(x: torch.Tensor | None) -> States:
    """A state (B, H, D, W), if there is one, as what every walk begins or ends with."""
    if x is None:
        return _NOWHERE
    b, h, d, v = x.stride()
    return States(x, b, h, 0, d, v)


def _rows(x: torch.Tensor) -> Rows:
    return Rows(x, *x.stride()[:3])


def _nothing(q: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.float32, device=q.device)


class _Call:
    """What all kernels of one call are told."""

    def __init__(
        self, q: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, norm: bool, feature_map: str, config: Config
    ) -> None:
        self.q, self.config, self.g = q, config, q if g is None else g
        self.rests: torch.Tensor | None = None
        self.batch, self.heads, self.n, self.width = q.shape
        self.columns, self.chunk = v.shape[-1], config.number("CHUNK")
        self.chunks = triton.cdiv(self.n, self.chunk)
        self.size = (self.columns + norm) * self.width
        apart = not q.is_cpu and since_blackwell(devices.current(q.device.index or 0))
        self.constants = {
            "DECAY": g is not None, "NORM": norm, "EXACT": q.dtype == torch.float32, "APART": apart, "MAP": feature_map,
        }  # fmt: skip

    @property
    def sizes(self) -> tuple[int, ...]:
        """Steps of log-decays, then how many heads and tokens there are."""
        return *(self.g.stride()[:3] if self.constants["DECAY"] else (0, 0, 0)), self.heads, self.n

    def sum_decays(self) -> None:
        """In each chunk, once for all kernels: backward there are three that would."""
        if not self.constants["DECAY"]:
            return
        sums, self.rests = (torch.empty(self.q.shape[:3], dtype=torch.float32, device=self.q.device) for _ in range(2))
        grid = self.batch * self.heads, triton.cdiv(self.chunks, _SUMMED // self.chunk)  # of the second 65,535 at most
        launch(
            decays_kernel, grid, self.g, sums, self.rests, *self.sizes, CHUNK=self.chunk, CHUNKS=_SUMMED // self.chunk,
            num_warps=4,
        )  # fmt: skip
        self.g = sums

    def tile(self, block_v: int) -> Any:
        wide = max(16, triton.next_power_of_2(self.width))
        constants = dict(CHUNK=self.chunk, D=self.width, V=self.columns, WIDE=wide, BLOCK_V=block_v, **self.constants)
        return Tile(**{name: tl.constexpr(value) for name, value in constants.items()})

    def grid(self, block_v: int, walk: int) -> tuple[int, int]:
        return triton.cdiv(self.columns, block_v) * self.batch * self.heads, triton.cdiv(self.chunks, walk)

    def states(
        self, x: torch.Tensor, y: torch.Tensor, weight: Any, scale: float, init: States, final: States,
        every: int, walk: int, reverse: bool = False,
    ) -> States:  # fmt: skip
        """The states in front of every `every` chunks, or behind where `reverse`, found by walks of `walk` chunks."""
        config = self.config
        block_v, options = config.number("STATE_V"), {"num_warps": config["STATE_WARPS"], "num_stages": 2}
        grid = self.grid(block_v, walk)

        def place(parts: int, dtype: torch.dtype) -> States:
            made = torch.empty((self.batch, self.heads, parts, self.size), dtype=dtype, device=self.q.device)
            b, h, p, _ = made.stride()
            return States(made, b, h, p, 1, self.width)

        def walked(init: States, out: States, totals: Any, final: States, store: bool) -> None:
            launch(
                states_kernel, grid, _rows(x), _rows(y), weight, self.g, self.rests, init, out, totals, final,
                *self.sizes, walk, every, scale, self.tile(block_v), STORE=store, REVERSE=reverse, **options,
            )  # fmt: skip

        if grid[1] > 1:
            starts = place(grid[1], torch.float32)
            totals = torch.empty((self.batch * self.heads, grid[1]), dtype=torch.float32, device=self.q.device)
            walked(_NOWHERE, starts, totals, _NOWHERE, store=False)
            launch(
                scan_kernel, (self.batch * self.heads, triton.cdiv(self.size, _SCANNED)), starts, totals, init, final,
                self.heads, grid[1], D=self.width, SIZE=self.size, BLOCK=_SCANNED, REVERSE=reverse, num_warps=4,
            )  # fmt: skip
            if every == walk:
                return starts
            init, final = starts, _NOWHERE
        # Of one chunk's products they are factors, in the dtype of the others; fp16 has not the range. Products of two
        # states, which are in dg, lose by it less than a bf16 sum over pairs of tokens does.
        narrow = every == 1 and x.dtype == torch.bfloat16
        out = place(triton.cdiv(self.chunks, every), torch.bfloat16 if narrow else torch.float32)
        walked(init, out, None, final, store=True)
        return out


def linear_attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, state: torch.Tensor | None,
    scale: float, normalize: bool, eps: float, feature_map: str = "none", *, config: Config,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v = addressable(q), addressable(k), addressable(v)
    call = _Call(q, v, g, normalize, feature_map, config)
    o, final = like(v), new_state(q, v, normalize)
    den = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if normalize else _nothing(q)
    walk, long = walks(call.chunks, config)
    init, last, block_v = _given(state), _given(final), config.number("BLOCK_V")
    if walk < call.chunks:
        init, last = call.states(k, v, None, 1.0, init, last, walk, long), _NOWHERE
    launch(
        forward_kernel, call.grid(block_v, walk), _rows(q), _rows(k), _rows(v), call.g, None, init, _rows(o), den,
        last, *call.sizes, walk, scale, eps, call.tile(block_v), ONE=walk == 1 and last is _NOWHERE,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    return o, final, den


def linear_attention_bwd(
    do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    g: torch.Tensor | None, state: torch.Tensor | None, weight: torch.Tensor | None, scale: float, decayed: bool,
    feature_map: str = "none", *, config: Config,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    do, q, k, v = addressable(do), addressable(q), addressable(k), addressable(v)
    norm = weight is not None
    call, nothing = _Call(q, v, g, norm, feature_map, config), _nothing(q)
    call.sum_decays()
    dq, dk, dv = like(q), like(k), like(v)
    dg = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if decayed else nothing
    dinit = nothing if state is None else new_state(q, v, norm)
    walk, end = walks(call.chunks, config)[1], _NOWHERE if state is None else _given(dinit)
    states = call.states(k, v, None, 1.0, _given(state), _NOWHERE, 1, walk)
    grads = call.states(q, do, weight, scale, _given(dstate), end, 1, walk, reverse=True)
    launch(
        backward_kernel, (call.batch * call.heads, call.chunks), _rows(do), _rows(q), _rows(k), _rows(v), weight,
        call.g, call.rests, states, grads, Gradients(_rows(dq), _rows(dk), _rows(dv)), dg, *call.sizes, scale,
        call.tile(config.number("BLOCK_V")), DECAYED=decayed,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    return dq, dk, dv, dg, dinit
