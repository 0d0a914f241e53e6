"""What one call costs the host, in µs: tilebook's functions beside PyTorch's, at shapes too small to keep a GPU busy.

    python benchmarks/host_cost.py --out benchmarks/results/nvidia-h200/host_cost.json
    python benchmarks/host_cost.py --dry-run --out /tmp/tried.json      # on the CPU: does the program run to its end?

Calls are asynchronous and alternate; PyTorch's take part twice, and what the two differ by is the noise. Packs have
PyTorch's `varlen_attn` beside them where there is one. The extension is to be built first: `python -m tilebook.native`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compare import save
from small_models import turned

import tilebook
from tilebook import device as devices
from tilebook import native
from tilebook.kernels.delta_rule import pytorch as delta
from tilebook.kernels.linear_attention.pytorch import chunked

TURNS = 15

Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One public function and what people call instead. `leaves` have gradients in training, `others` have none.

    placed: are ours PyTorch's own functions, after `tilebook.enable()`?
    """

    name: str
    theirs: Function
    ours: Function
    leaves: list[torch.Tensor]
    others: tuple[torch.Tensor, ...] = ()
    trains: bool = True
    placed: bool = False


def _mlstm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """As the paper writes it, over all pairs of tokens."""
    forgotten = F.logsigmoid(f).cumsum(-1)
    gates = forgotten[..., :, None] - forgotten[..., None, :] + i[..., None, :]
    gates = gates.masked_fill(~torch.ones(gates.shape[-2:], dtype=torch.bool, device=q.device).tril(), -torch.inf)
    most = gates.amax(-1, keepdim=True)
    weights = (q @ k.mT) * q.shape[-1] ** -0.5 * (gates - most).exp()
    return ((weights / torch.maximum(weights.sum(-1, keepdim=True).abs(), (-most).exp())).to(v.dtype)) @ v


def _mlstm_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: torch.Tensor, f: torch.Tensor,
    memory: torch.Tensor, n: torch.Tensor, m: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    kept = F.logsigmoid(f) + m
    top = torch.maximum(kept, i)
    kept, written = (kept - top).exp()[..., None], k.float() * (i - top).exp()[..., None]
    memory, n = memory * kept[..., None] + written[..., None] * v[..., None, :], n * kept + written
    asked = q.float() * q.shape[-1] ** -0.5
    divisor = torch.maximum((asked * n).sum(-1, keepdim=True).abs(), (-top).exp()[..., None])
    return ((asked[..., None, :] @ memory).squeeze(-2) / divisor).to(v.dtype)


def cases(device: str) -> list[Case]:
    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def heads(batch: int, heads: int, heads_kv: int, length: int, head_dim: int, keys: int = 0) -> list[torch.Tensor]:
        key = (batch, heads_kv, keys or length, head_dim)
        return [random(batch, heads, length, head_dim), random(*key), random(*key)]

    sdpa, drop_in = F.scaled_dot_product_attention, tilebook.scaled_dot_product_attention
    seen = torch.arange(128, device=device) < torch.tensor([90, 128], device=device)[:, None, None, None]
    cu = torch.tensor([0, 100, 128], dtype=torch.int32, device=device)

    def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return tilebook.attention(q, k, v, bias=bias)

    def padded(function: Function) -> Function:
        return lambda q, k, v, mask: function(q, k, v, mask)

    def grouped(function: Function) -> Function:
        return lambda q, k, v: function(q, k, v, is_causal=True, enable_gqa=True)

    def autocast(function: Function) -> Function:
        def inside(*given: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16):
                return function(*given)

        return inside

    def norm(x: torch.Tensor, *vectors: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], *vectors)

    def root(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)

    def vectors(rows: int, width: int, count: int) -> list[torch.Tensor]:
        return [random(rows, width, dtype=torch.float32), *[random(width, dtype=torch.float32) for _ in range(count)]]

    placed: list[tuple[str, Function, list[torch.Tensor], tuple[torch.Tensor, ...]]] = [
        ("attention B1,H2,S64,D64", sdpa, heads(1, 2, 2, 64, 64), ()),
        ("attention B8,H6,S196,D64", sdpa, heads(8, 6, 6, 196, 64), ()),
        ("attention B1,H8,Hkv2,S128,D128,causal", grouped(sdpa), heads(1, 8, 2, 128, 128), ()),
        ("attention B2,H12,S128,D64,maskbk", padded(sdpa), heads(2, 12, 12, 128, 64), (seen,)),
        ("layer_norm M16,N1024 fp32", norm, vectors(16, 1024, 2), ()),
        ("layer_norm M2048,N384 fp32", norm, vectors(2048, 384, 2), ()),
        ("rms_norm M16,N1024 fp32", root, vectors(16, 1024, 1), ()),
        ("cross_entropy M16,V1024", F.cross_entropy, [random(16, 1024)], (torch.arange(16, device=device),)),
    ]
    found = [Case(f"in PyTorch's place: {name}", call, call, *rest, placed=True) for name, call, *rest in placed]
    found += [
        Case("attention B1,H2,S64,D64", sdpa, tilebook.attention, heads(1, 2, 2, 64, 64)),
        Case("attention B8,H6,S196,D64", sdpa, tilebook.attention, heads(8, 6, 6, 196, 64)),
        Case(
            "attention B1,H8,Hkv2,S128,D128,causal",
            grouped(sdpa),
            lambda q, k, v: tilebook.attention(q, k, v, causal=True),
            heads(1, 8, 2, 128, 128),
        ),
        Case("scaled_dot_product_attention B8,H6,S196,D64", sdpa, drop_in, heads(8, 6, 6, 196, 64)),
        Case("attention B2,H8,S128,D64,dbiashqk", sdpa, biased, [*heads(2, 8, 8, 128, 64), random(1, 8, 128, 128)]),
        Case(
            "scaled_dot_product_attention B1,H8,Hkv2,S128,D128,causal",
            grouped(sdpa),
            grouped(drop_in),
            heads(1, 8, 2, 128, 128),
        ),
        Case(
            "scaled_dot_product_attention B2,H12,S128,D64,maskbk",
            padded(sdpa),
            padded(drop_in),
            heads(2, 12, 12, 128, 64),
            (seen,),
        ),
        Case(
            "attention_decode B2,H8,Hkv2,S1,Sk256,D128",
            lambda q, k, v: sdpa(q, k, v, enable_gqa=True),
            tilebook.attention_decode,
            heads(2, 8, 2, 1, 128, 256),
            trains=False,
        ),
        Case(
            "cross_entropy M16,V1024",
            lambda x, target: F.cross_entropy(x, target),
            lambda x, target: tilebook.cross_entropy(x, target),
            [random(16, 1024)],
            (torch.arange(16, device=device),),
        ),
        Case(
            "layer_norm M16,N1024",
            lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5),
            tilebook.layer_norm,
            [random(16, 1024), random(1024), random(1024)],
        ),
        Case(
            "linear_cross_entropy M16,H64,V1024",
            lambda x, w, target: F.cross_entropy(F.linear(x, w), target),
            tilebook.linear_cross_entropy,
            [random(16, 64), random(1024, 64)],
            (torch.arange(16, device=device),),
        ),
        Case(
            "add_layer_norm M16,N1024",
            lambda x, r, w, b: F.layer_norm(x + r, w.shape, w, b, 1e-5),
            lambda *given: tilebook.add_layer_norm(*given)[0],
            [random(16, 1024), random(16, 1024), random(1024), random(1024)],
        ),
        Case(
            "add_rms_norm M16,N1024",
            lambda x, r, w: F.rms_norm(x + r, w.shape, w, 1e-6),
            lambda *given: tilebook.add_rms_norm(*given)[0],
            [random(16, 1024), random(16, 1024), random(1024)],
        ),
        Case(
            "mlp M32,H64,I128",
            lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
            tilebook.mlp,
            [random(32, 64), random(128, 64), random(128), random(64, 128), random(64)],
        ),
        Case(
            "mlp B2,S16,H64,I128 relu",
            lambda x, w1, b1, w2, b2: F.linear(F.relu(F.linear(x, w1, b1)), w2, b2),
            lambda *given: tilebook.mlp(*given, activation="relu"),
            [random(2, 16, 64), random(128, 64), random(128), random(64, 128), random(64)],
        ),
        Case(
            "mlp M32,H64,I128 under autocast",
            autocast(lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)),
            autocast(tilebook.mlp),
            [random(*shape, dtype=torch.float32) for shape in ((32, 64), (128, 64), (128,), (64, 128), (64,))],
        ),
    ]
    weights = [random(128, 64), random(128, 64), random(64, 128)]
    turn = torch.randn(1, 128, 32, device=device).repeat(1, 1, 2)
    angles = turn.cos().bfloat16(), turn.sin().bfloat16()
    found += [
        Case("glu M32,F128", lambda g, u: F.silu(g) * u, tilebook.glu, [random(32, 128), random(32, 128)]),
        Case(
            "swiglu M32,H64,F128",
            lambda x, g, u, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d),
            tilebook.swiglu,
            [random(32, 64), *weights],
        ),
        Case(
            "geglu M32,H64,F128",
            lambda x, g, u, d: F.linear(F.gelu(F.linear(x, g), approximate="tanh") * F.linear(x, u), d),
            tilebook.geglu,
            [random(32, 64), *weights],
        ),
        Case(
            "apply_rope B1,H8,Hkv2,S128,D64",
            lambda q, k, cos, sin: torch.cat([turned(x, cos, sin) for x in (q, k)], 1),
            lambda q, k, cos, sin: torch.cat(tilebook.apply_rope(q, k, cos, sin), 1),
            heads(1, 8, 2, 128, 64)[:2],
            angles,
        ),
        Case(
            "gated_linear_attention B1,H4,S128,D64",
            lambda q, k, v: chunked(q, k, v, None, None, 0.125, False, 0.0)[0],
            tilebook.gated_linear_attention,
            heads(1, 4, 4, 128, 64),
        ),
        Case(
            "linear_attention B1,H4,S128,D64",
            lambda q, k, v: tilebook.linear_attention(q, k, v),
            lambda q, k, v: tilebook.linear_attention(q, k, v, causal=True),
            heads(1, 4, 4, 128, 64),
        ),
        Case(
            "linear_attention_step B16,H8,D64",
            lambda q, k, v, h: (
                (q[..., None, :].float() * 0.125) @ (h + k[..., None].float() * v[..., None, :].float())
            )[..., 0, :].to(v.dtype),
            lambda q, k, v, h: tilebook.linear_attention_step(q, k, v, h)[0],
            [random(16, 8, 64) for _ in range(3)],
            (random(16, 8, 64, 64, dtype=torch.float32),),
        ),
        Case(
            "gated_delta_rule B1,H4,S128,D64",
            lambda q, k, v, beta: delta.chunked(q, k, v, None, beta, None, 0.125, True)[0],
            lambda q, k, v, beta: tilebook.gated_delta_rule(q, k, v, None, beta, normalize_qk=True),
            heads(1, 4, 4, 128, 64),
            (random(1, 4, 128, dtype=torch.float32).sigmoid(),),
        ),
        Case(
            "gated_delta_rule_step B16,H8,D64",
            lambda q, k, v, h, beta: delta.step(q, k, v, h, None, beta, 0.125, True)[0],
            lambda q, k, v, h, beta: tilebook.gated_delta_rule_step(q, k, v, h, None, beta, normalize_qk=True)[0],
            [random(16, 8, 64) for _ in range(3)],
            (random(16, 8, 64, 64, dtype=torch.float32), random(16, 8, dtype=torch.float32).sigmoid()),
        ),
        Case(
            "mlstm B1,H4,S128,D64",
            _mlstm,
            tilebook.mlstm,
            heads(1, 4, 4, 128, 64),
            tuple(random(1, 4, 128, dtype=torch.float32) for _ in range(2)),
        ),
        Case(
            "mlstm_step B16,H8,D64",
            _mlstm_step,
            lambda q, k, v, i, f, *state: tilebook.mlstm_step(q, k, v, i, f, state)[0],
            [random(16, 8, 64) for _ in range(3)],
            (*(random(16, 8, *shape, dtype=torch.float32) for shape in ((), (), (64, 64), (64,), ())),),
        ),
    ]
    for dtype in (torch.bfloat16, torch.float32):
        found.append(
            Case(
                f"rms_norm M16,N1024 {str(dtype).removeprefix('torch.')}",
                lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
                tilebook.rms_norm,
                [random(16, 1024, dtype=dtype), random(1024, dtype=dtype)],
            )
        )
    packed = _varlen_attn()
    if packed is not None and device == "cuda":
        found.append(
            Case(
                "attention_varlen B2,H4,T128,S100,D64",
                lambda q, k, v, cu: packed(q, k, v, cu, cu, 100, 100),
                lambda q, k, v, cu: tilebook.attention_varlen(q, k, v, cu, cu, max_seqlen_q=100, max_seqlen_k=100),
                [random(128, 4, 64) for _ in range(3)],
                (cu,),
            )
        )
    return found


def _varlen_attn() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # PyTorch before 2.10
        return None
    return varlen_attn


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def cost_us(call: Callable[[], Any], calls: int, device: str) -> float:
    """Host time of one asynchronous call."""
    call()  # as it has been running: what another left in the caches is gone
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = time.perf_counter() - start
    _synchronize(device)
    return seconds / calls * 1e6


def compare(
    theirs: Callable[[], Any], ours: Callable[[], Any], calls: int, device: str, turns: int = TURNS, on: bool = False
) -> dict[str, Any]:
    """In turns, so that what else the machine does meets all alike: medians, and quartiles of the ratio of a turn.

    on: is tilebook enabled for ours?
    """

    def turn() -> list[float]:
        before = cost_us(theirs, calls, device)
        with tilebook.enabled() if on else nullcontext():
            mine = cost_us(ours, calls, device)
        return [before, mine, cost_us(theirs, calls, device)]

    rows = [turn() for _ in range(turns + 1)][1:]
    other, mine, again = (statistics.median(each) for each in zip(*rows, strict=True))
    return {
        "pytorch": round(other, 1),
        "tilebook": round(mine, 1),
        "more": round(statistics.median(b - a for a, b, _ in rows), 1),
        "ratio": [round(r, 2) for r in statistics.quantiles([b / a for a, b, _ in rows], n=4, method="inclusive")],
        "noise": round(again / other, 3),
    }


def measure(case: Case, device: str, calls: int, turns: int) -> dict[str, Any]:
    with torch.no_grad():
        found = {
            "forward": compare(
                lambda: case.theirs(*case.leaves, *case.others),
                lambda: case.ours(*case.leaves, *case.others),
                calls,
                device,
                turns,
                case.placed,
            )
        }
    if not case.trains:
        return found
    leaves = [x.clone().requires_grad_() for x in case.leaves]
    dy = torch.randn_like(case.theirs(*leaves, *case.others)).detach()

    def step(function: Function) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*leaves, *case.others), leaves, dy)

    return {
        **found,
        "forward+backward": compare(step(case.theirs), step(case.ours), max(2, calls // 2), device, turns, case.placed),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--dry-run", action="store_true", help="a few calls, on the CPU")
    arguments.add_argument("--only", nargs="*", default=[""], help="cases whose names begin so")
    given = arguments.parse_args()
    device, calls, turns = ("cpu", 2, 2) if given.dry_run else ("cuda", 200, TURNS)
    if device == "cuda" and not native.available():
        raise SystemExit("the extension is not built: python -m tilebook.native")
    results: dict[str, Any] = {}
    for case in cases(device):
        if not case.name.startswith(tuple(given.only)):
            continue
        results[case.name] = measure(case, device, calls, turns)
        for step, found in results[case.name].items():
            print(f"{found['more']:+7.1f} µs  {case.name} {step}: {found}", flush=True)
        name = "cpu" if given.dry_run else devices.current().name
        save(given.out, "host cost, microseconds a call", name, results=results)


if __name__ == "__main__":
    main()
