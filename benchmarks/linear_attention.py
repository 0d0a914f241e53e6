"""Causal linear attention, forward and with backward, by lengths: ours, PyTorch by chunks, compiled, fla, and exact.

    python benchmarks/linear_attention.py --out benchmarks/results/nvidia-h200/linear_attention.json
    python benchmarks/linear_attention.py --device cpu --tiny --out /tmp/tried.json    # does it run to its end?

    python benchmarks/linear_attention.py --maps elu+1 relu --out …    # features made in the kernels, and before them
    python benchmarks/linear_attention.py --channels --profile --out …    # with a decay of each channel, as GLA

Every contender but exact attention computes the same, and its output is compared with that of fp32 on the first heads.
Timed by events around several calls from Python, in rounds in which the contenders take turns. `fla` where `fla-core`
is installed. `--kernels` forces our kernels with their default config; `--profile` prints how long each of our kernels
takes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare import rms_off, save

import tilebook
from tilebook import device as devices
from tilebook import dispatch
from tilebook.kernels.bidirectional.features import NAMED
from tilebook.kernels.bidirectional.form import MAPPED
from tilebook.kernels.channel_decay.pytorch import chunked as by_channel
from tilebook.kernels.linear_attention.pytorch import chunked
from tilebook.tuner.judge.turns import in_turns, peak_mib

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
TINY = (96, 130)
TOKENS = 1 << 18
"""Of a batch, as long as the sequence is shorter."""

Function = Callable[..., torch.Tensor]


def plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Any) -> torch.Tensor:
    """o by chunks in PyTorch's functions."""
    scale = q.shape[-1] ** -0.5
    if g is not None and g.ndim == 4:
        return by_channel(q, k, v, g, None, scale)[0]
    return chunked(q, k, v, g, None, scale, False, 0.0)[0]


def contenders(compiled: bool) -> dict[str, Function]:
    """Name → o of q, k, v and log-decays or None."""

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Any) -> torch.Tensor:
        o: torch.Tensor = tilebook.gated_linear_attention(q, k, v, g)
        return o

    def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Any) -> torch.Tensor:
        return tilebook.attention(q, k, v, causal=True)

    found: dict[str, Function] = {
        "tilebook": ours,
        "pytorch": plainly,
        "exact attention": exact,
        "tilebook again": ours,
    }
    if compiled:
        found["torch.compile"] = torch.compile(plainly, dynamic=False)
    try:
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return found

    def fla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Any) -> torch.Tensor:
        """Of the same views (B, H, S, D): its own layout is (B, S, H, D), see `laid`."""
        turned = [None if x is None else x.transpose(1, 2) for x in (q, k, v, g)]
        run = chunk_gla if g is not None and g.ndim == 4 else chunk_simple_gla
        o: torch.Tensor = run(*turned, scale=q.shape[-1] ** -0.5)[0].transpose(1, 2)
        return o

    return found | {"fla": fla}


def by_map(name: str) -> dict[str, Function]:
    """Name → o of q, k and v, normalized, whose features are made in the kernels, or by PyTorch before them."""

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Any) -> torch.Tensor:
        o: torch.Tensor = tilebook.linear_attention(q, k, v, feature_map=name, causal=True)
        return o

    def apart(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Any) -> torch.Tensor:
        mapped = NAMED[name](q), NAMED[name](k)
        o: torch.Tensor = tilebook.linear_attention(*mapped, v, feature_map=None, causal=True)
        return o

    return {"tilebook": fused, "map before": apart, "tilebook again": fused, "map before again": apart}


def exactly(feature_map: str) -> Function:
    """o by chunks in PyTorch's functions, of what the contenders compute."""

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Any) -> torch.Tensor:
        return chunked(q, k, v, g, None, 1.0, True, 1e-6, feature_map)[0]

    return plainly if feature_map == "none" else plain


def drawn(n: int, width: int, how: str, device: str, tiny: bool) -> list[torch.Tensor | None]:
    """q, k, v as views of (B, S, H, D), as a model's projections give them, and as fla wants them."""
    batch, heads = (1, 2) if tiny else (max(1, min(8, TOKENS // n)), 16)
    source = torch.Generator(device).manual_seed(0)
    made = [torch.randn(batch, n, heads, width, generator=source, device=device) for _ in range(3)]
    q, k, v = (x.to(torch.bfloat16).transpose(1, 2).requires_grad_() for x in made)
    gates = torch.randn(batch, n, heads, *([width] if how == "channels" else []), generator=source, device=device)
    decayed = how in ("decay", "channels")
    g = torch.nn.functional.logsigmoid(gates + 4).transpose(1, 2).requires_grad_() if decayed else None
    return [q, k, v, g]


def run_once(function: Function, tensors: list[torch.Tensor | None], do: torch.Tensor | None) -> Any:
    if do is None:
        with torch.no_grad():
            return function(*tensors)
    o = function(*tensors)
    wanted = [x for x in tensors if x is not None]
    return torch.autograd.grad(o, wanted, do, allow_unused=True)


def off_by(function: Function, plain: Function, tensors: list[torch.Tensor | None]) -> float:
    """RMS difference from fp32 by chunks, on the first sequence's first heads, relative to the RMS."""
    with torch.no_grad():
        found = function(*tensors)[:1, :2].float()
        right = plain(*(None if x is None else x[:1, :2].float() for x in tensors))  # type: ignore[arg-type]
    return rms_off(found, right)


def measure(
    functions: dict[str, Function], plain: Function, tensors: list[torch.Tensor | None], backward: bool, device: str,
    turns: int,
) -> dict[str, Any]:  # fmt: skip
    """Name → ms and quartiles, peak memory and error; or why it could not run."""
    v = tensors[2]
    assert v is not None
    do = torch.randn_like(v) if backward else None
    found, running = dict[str, Any](), dict[str, Callable[[], Any]]()
    for name, function in functions.items():
        run = functools.partial(run_once, function, tensors, do)
        try:
            run()
            wrong = None if name == "exact attention" else off_by(function, plain, tensors)
            if wrong is not None and not wrong <= 2e-2:
                raise RuntimeError(f"off by {wrong}")
            found[name] = {"error": wrong, "peak_mib": peak_mib(run, device)}
        except Exception as broken:
            found[name] = {"failed": f"{type(broken).__name__}: {broken}"[:300]}
            continue
        running[name] = run
    for name, times in in_turns(running, turns, 1 if turns < 5 else 3, device).items():
        found[name] |= times
    return found


def profiled(tensors: list[torch.Tensor | None], backward: bool) -> None:
    """Prints the GPU time of each of our kernels, of one call."""
    ours, calls = contenders(False)["tilebook"], 10
    do = torch.randn_like(tensors[2]) if backward else None  # type: ignore[arg-type]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run_once(ours, tensors, do)
        torch.cuda.synchronize()
    for each in sorted(profile.key_averages(), key=lambda each: -each.self_device_time_total):
        print(f"    {each.self_device_time_total / calls:9.1f} µs  {each.key[:80]}", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--tiny", action="store_true", help="short sequences, two rounds, nothing compiled")
    arguments.add_argument("--kernels", action="store_true", help="our kernels by default, whatever verdicts say")
    arguments.add_argument("--uncompiled", action="store_true", help="without torch.compile, which takes longest")
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    arguments.add_argument("--widths", type=int, nargs="*", default=[64, 128])
    arguments.add_argument("--contenders", nargs="*", help="these only: tilebook, fla, pytorch, …")
    arguments.add_argument("--maps", nargs="*", choices=MAPPED, default=[], help="these feature maps, and no decays")
    arguments.add_argument("--channels", action="store_true", help="a log-decay of each channel")
    arguments.add_argument("--profile", action="store_true", help="how long each of our kernels takes, without maps")
    given = arguments.parse_args()
    results: dict[str, Any] = {}
    where = devices.current().name if given.device == "cuda" else "cpu"
    with dispatch.use("triton") if given.kernels else contextlib.nullcontext():
        for width in [16] if given.tiny else given.widths:
            for how in given.maps or (("channels",) if given.channels else ("decay", "")):
                for n in TINY if given.tiny else given.lengths:
                    torch._dynamo.reset()
                    compiled, named = not (given.tiny or given.uncompiled), how in MAPPED
                    functions = by_map(how) if named else contenders(compiled)
                    if given.contenders:
                        functions = {name: each for name, each in functions.items() if name in given.contenders}
                    tensors = drawn(n, width, how, given.device, given.tiny)
                    for backward in (False, True):
                        q = tensors[0]
                        assert q is not None
                        batch, heads = q.shape[:2]
                        parts = f"B{batch},H{heads},S{n},D{width}", "normalized" if named else "", how
                        label = ",".join(filter(None, parts)) + (" forward and backward" if backward else " forward")
                        turns, plain = 2 if given.tiny else given.rounds, exactly(how if named else "none")
                        results[label] = measure(functions, plain, tensors, backward, given.device, turns)
                        print(label, flush=True)
                        for name, row in results[label].items():
                            told = row.get("failed") or f"{row['ms']:9.4f} ms {row['quartiles']}, {row['peak_mib']} MiB"
                            print(f"  {name:16} {told}", flush=True)
                        save(
                            given.out,
                            "linear_attention",
                            where,
                            results=results,
                            forced=given.kernels,
                            rounds=given.rounds,
                        )
                        if given.profile and not named:
                            profiled(tensors, backward)


if __name__ == "__main__":
    main()
