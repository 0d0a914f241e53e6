"""Somebody else's kernel: what `triton.autotune` finds and what tilebook finds, and how long each takes. On a GPU.

    python benchmarks/foreign.py --out benchmarks/results/nvidia-h200/foreign.json
    python benchmarks/foreign.py --sizes 1024 --out /tmp/tried.json       # a first look

The kernel is the product of `examples/matmul_autotuned.py`, with a list of configs as tutorials have it and, as
`space`, with all combinations of the list's values. `triton.autotune` searches the list in one process from an empty
compile cache. tilebook records a call in another process and tunes the record by its command line, from an empty cache
too. All winners are then sampled interleaved, as CUDA graphs, beside cuBLAS. JSON: configs, times, seconds; what a
call that has its config costs the host under either; what recording costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import matmul_autotuned as example  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from compare import save  # noqa: E402

import tilebook  # noqa: E402
from tilebook import device as devices  # noqa: E402
from tilebook.foreign.kernel import Kernel, key_of  # noqa: E402
from tilebook.registry import Registry  # noqa: E402
from tilebook.tuner.judge.measure import Bench, interleave  # noqa: E402
from tilebook.tuner.judge.stats import median, speedup  # noqa: E402

KEY = ["M", "N", "K"]
ROUNDS = 30
CALLS = 500  # fewer than a GPU's queue holds, or the host would wait for it


def inputs(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    return a, b


def autotuned(size: int, configs: list[Any]) -> dict[str, Any]:
    """`triton.autotune` over the list, in a process of its own whose compile cache is empty."""
    listed = json.dumps(
        [{**each.kwargs, "num_warps": each.num_warps, "num_stages": each.num_stages} for each in configs]
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        command = [sys.executable, __file__, "--alone", str(size), "--configs", listed]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def alone(size: int, listed: str) -> None:
    """What `autotuned` starts."""
    configs = []
    for each in json.loads(listed):
        warps, stages = each.pop("num_warps"), each.pop("num_stages")
        configs.append(triton.Config(each, num_warps=warps, num_stages=stages))
    kernel = triton.autotune(configs, key=KEY)(example.matmul_kernel.fn)
    a, b = inputs(size)
    torch.cuda.synchronize()
    began = time.monotonic()
    example.matmul(a, b, kernel)
    torch.cuda.synchronize()
    seconds = time.monotonic() - began
    config = dict(Kernel(kernel).config(kernel.best_config))
    failed = sum(min(times) == float("inf") for times in kernel.configs_timings.values())
    print(json.dumps({"seconds": round(seconds, 1), "config": config, "tried": len(configs), "failed": failed}))


def tuned(size: int, space: bool, trials: int | None) -> dict[str, Any]:
    """`tilebook tune --recorded` by command line, with a registry and a compile cache of its own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "MATMUL_SPACE": "1" if space else ""}
        program = [sys.executable, str(ROOT / "examples" / "matmul_autotuned.py"), "--size", str(size)]
        recording = {**environment, "TILEBOOK_TRITON": f"record:{folder / 'record'}"}
        subprocess.run(program, env=recording, check=True, stdout=sys.stderr)
        command = [sys.executable, "-m", "tilebook.cli", "tune", "--recorded", str(folder / "record")]
        command += ["--registry", str(folder / "registry.db")]
        command += ["--trials", str(trials)] if trials else []
        began = time.monotonic()
        subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
        seconds = time.monotonic() - began
        with Registry.open(folder / "registry.db") as registry:
            (verdict,) = registry.verdicts()
    return {
        "seconds": round(seconds, 1),
        "config": dict(verdict.config),
        "status": verdict.status.value,
        "tried": verdict.notes["tried"],
        "rejected": verdict.notes["rejected"],
        "spent": verdict.notes["seconds"],
        "gpu_busy": verdict.notes["busy"],
        "interval": None if verdict.interval is None else verdict.interval.content(),
    }


def contest(size: int, winners: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The winners' times, interleaved, and cuBLAS's."""
    bench = Bench(inputs(size), devices.current().l2)
    samplers, kernels = {}, {}
    for name, config in winners.items():
        chosen = dict(config)
        warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages")
        only = [triton.Config(chosen, num_warps=warps, num_stages=stages)]
        kernels[name] = triton.autotune(only, key=KEY)(example.matmul_kernel.fn)
    calls = {name: lambda a, b, kernel=kernel: example.matmul(a, b, kernel) for name, kernel in kernels.items()}
    calls["cublas"] = torch.matmul
    for name, call in calls.items():
        call(*bench.inputs[0])
        samplers[name] = bench.capture(call, bench.estimate(call))
    samples = dict(zip(samplers, interleave(list(samplers.values()), ROUNDS, 0), strict=True))
    ratios = {name: speedup(samples["triton.autotune"], its, 0) for name, its in samples.items()}
    return {
        name: {
            "ms": round(median(its), 5),
            "tflops": round(2 * size**3 / median(its) / 1e9, 1),
            "over triton.autotune": [round(x, 4) for x in (ratios[name].low, ratios[name].value, ratios[name].high)],
        }
        for name, its in samples.items()
    }


def host_us() -> dict[str, float]:
    """What a call costs the host that has its config, in turns; also while everything is recorded."""
    from tilebook.foreign.record import Recording

    a, b = inputs(64)
    theirs = triton.autotune(example.listed()[:2], key=KEY)(example.matmul_kernel.fn)
    recording = Recording(Path(tempfile.gettempdir()))
    c, strides = torch.empty_like(a), (64, 1) * 3
    args, call = (a, b, c, 64, 64, 64, *strides), {"grid": (1,), "warmup": False}

    def noted() -> None:
        theirs.run(*args, **call)
        recording.note(theirs, args, call)

    hit = tilebook.autotune(example.listed()[:2], key=KEY)(example.matmul_kernel.fn)
    hit.cache[key_of(hit, args, {})] = hit.configs[0]
    kinds = {
        "triton.autotune": lambda: theirs.run(*args, **call),
        "tilebook.autotune, a verdict": lambda: hit.run(*args, **call),
        "tilebook.autotune, a miss": lambda: example.matmul_kernel.run(*args, **call),
        "triton.autotune, recorded": noted,
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(9):
        for name, start in kinds.items():
            start()
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(CALLS):
                start()
            times[name].append(1e6 * (time.perf_counter() - began) / CALLS)
            torch.cuda.synchronize()
    return {name: round(statistics.median(its), 3) for name, its in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--trials", type=int, help="candidates of each tune (default: until it has converged)")
    parser.add_argument("--no-space", action="store_true", help="the list alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--configs", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        return alone(options.alone, options.configs)
    results = []
    for size in options.sizes:
        searched = autotuned(size, example.listed())
        found = {"triton.autotune": searched, "tilebook, list": tuned(size, False, options.trials)}
        if not options.no_space:
            found["tilebook, space"] = tuned(size, True, options.trials)
        times = contest(size, {name: each["config"] for name, each in found.items()})
        results.append({"size": size, "searches": found, "times": times})
        print(json.dumps(results[-1], indent=1), flush=True)
        if options.out:
            save(options.out, "foreign", devices.current().name, results=results, host_us=host_us())


if __name__ == "__main__":
    main()
