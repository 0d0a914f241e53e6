"""Makes a registry of many verdicts on many GPUs and measures what reading, moving and dispatching from it cost.

    python benchmarks/reliability/scale.py [--verdicts 1000000] [--gpus 10] [--finalists 4] [--samples 0] [--again]

Every figure comes from a fresh process: seconds of the clock and of the CPU (on a machine that does other work they
differ), the peak of its memory, and how much more that is than before it began. Where several processes work, as in a
long import or export on more than one core (--cores 1: one), CPU time is of all, and `together_mb` the most that all
had resident at once. The verdicts are on all ops that ship, on problems that differ; the first GPU is an H200. With
--samples 30 and --finalists 9 a verdict is about as large as those that ship, else a fifth of that. No GPU needed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from here import environment, tell
from memory import Family, peak_mb

OPS = (
    ("attention_fwd", "attention"),
    ("attention_bwd", "attention"),
    ("attention_decode", "decode"),
    ("mlp_up_fwd", "mlp"),
    ("mlp_down_fwd", "mlp"),
    ("mlp_act_bwd", "mlp"),
    ("mlp_grads_bwd", "mlp"),
    ("rms_norm_fwd", "norm"),
    ("rms_norm_bwd", "norm"),
    ("layer_norm_fwd", "norm"),
)
SHAPES = 300  # that are new to a program, of each op, with a verdict of their own and without
PASSES = 5  # over them; the least counts, for the machine may do other work


def problem(dice: random.Random, kind: str) -> dict[str, Any]:
    """The fields of a random problem of realistic size."""
    heads, width = dice.choice([8, 12, 16, 24, 32, 40, 64]), dice.choice([384, 768, 1024, 2048, 4096, 8192])
    dtype, seq = dice.choice(["bf16", "fp16"]), dice.choice([1 << dice.randrange(6, 16), dice.randrange(16, 32_768)])
    if kind == "norm":
        return {"rows": dice.randrange(1, 1 << 20), "width": width, "dtype": dtype}
    if kind == "mlp":
        return {
            "rows": dice.randrange(1, 1 << 20),
            "width": width,
            "inner": 4 * width,
            "activation": "gelu",
            "dtype": dtype,
        }
    both = {"batch": dice.randrange(1, 257), "heads": heads, "heads_kv": heads // dice.choice([1, 1, 4, 8])}
    both |= {"head_dim": dice.choice([64, 128]), "causal": dice.random() < 0.5, "dtype": dtype}
    if kind == "decode":
        return {
            **both,
            "seq_q": 1,
            "seq_k": seq,
            "window": seq,
            "cache": "contiguous",
            "ragged": False,
            "capped": False,
        }
    return {**both, "seq_q": seq, "seq_k": seq, "window": dice.choice(["", "window1024x0"])}


def keys(dice: random.Random, kind: str, op: str) -> Iterator[str]:
    """Keys of distinct problems of an op, without end."""
    from tilebook import op as ops

    seen: set[int] = set()
    while True:
        made = ops.get(op).problem(**problem(dice, kind))
        try:
            made.check()
        except ValueError:
            continue
        if hash(made.key) not in seen:
            seen.add(hash(made.key))
            yield made.key


def devices_of(count: int) -> list[dict[str, Any]]:
    from tilebook import device as devices

    first = devices.find("H200")
    others = [{"name": f"NVIDIA Example {n}", "arch": "sm_90", "sm_count": 100 + n} for n in range(1, count)]
    return [{"name": first.name, "arch": first.arch, "sm_count": first.sm_count}, *others]


def make_file(path: Path, verdicts: int, gpus: int, finalists: int, samples: int) -> None:
    """An exported file with so many verdicts, as evenly over ops and GPUs as the numbers allow."""
    whole, dice = hashlib.sha256(), random.Random(0)
    body = path.with_suffix(".body")
    with body.open("w") as stream:
        for each in lines(dice, verdicts, gpus, finalists, samples):
            whole.update(each.encode())
            stream.write(each)
    header = {"format": "tilebook-registry", "records": verdicts, "sha256": whole.hexdigest(), "version": 3}
    with path.open("w") as stream, body.open() as rest:
        stream.write(json.dumps(header, separators=(",", ":")) + "\n")
        while piece := rest.read(1 << 20):
            stream.write(piece)
    body.unlink()


def lines(dice: random.Random, verdicts: int, gpus: int, finalists: int, samples: int) -> Iterator[str]:
    from tilebook import device as devices
    from tilebook import op as ops

    gpu, where = devices.find("H200"), devices_of(gpus)
    versions = {"cuda": "13.0", "cudnn": "91900", "driver": "580.159.04", "torch": "2.11.0+cu130", "triton": "3.6.0"}
    made = 0
    for op_name, kind in OPS:
        op = ops.get(op_name)
        configs = [dict(each) for each in op.tunable.space.feasible(op.problem.examples()[0], gpu)[: 8 * finalists]]
        found = keys(dice, kind, op_name)
        for _ in range(-(-verdicts // len(OPS) // gpus)):
            key = next(found)
            for device in where:
                if made == verdicts:
                    return
                made += 1
                yield line(
                    dice, op_name, key, device, versions, op.digest, dice.sample(configs, finalists - 1), samples
                )


def line(
    dice: random.Random, op: str, key: str, device: Any, versions: Any, kernel: str, configs: Any, samples: int
) -> str:
    times = sorted(dice.uniform(0.1, 1.0) for _ in range(len(configs) + 1))
    named = [("triton", config) for config in configs] + [("torch", {})]
    content = {
        "created_at": "2026-11-21T02:09:16.661038+00:00",
        "default_time_ms": times[-1] * 1.1,
        "device": device,
        "environment": versions,
        "finalists": [
            {
                "again": None,
                "code": dice.randbytes(32).hex() if name == "triton" else "",
                "config": config,
                "default": False,
                "implementation": name,
                "predicted_ms": None,
                "samples_ms": [round(time_ms * dice.uniform(0.99, 1.01), 6) for _ in range(samples)],
                "speedup": [1.1, 1.0, 1.2],
                "time_ms": time_ms,
            }
            for (name, config), time_ms in zip(named, times, strict=True)
        ],
        "interval": [1.1, 1.05, 1.15],
        "kernel": kernel,
        "mode": "graph",
        "notes": {"seconds": {"total": round(dice.uniform(1, 60), 2)}, "tried": dice.randrange(400)},
        "op": op,
        "problem": key,
        "sources": {"triton": kernel},
        "status": "measured",
    }
    sha256 = hashlib.sha256(canonical(content).encode()).hexdigest()
    return canonical({**content, "type": "verdict", "sha256": sha256}) + "\n"


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


# What is measured, each in a process of its own


def importing(registry: str, file: str) -> dict[str, Any]:
    from tilebook import inventory
    from tilebook.cli.common import is_problem
    from tilebook.registry import Registry, load

    allowed = inventory.axes()
    spent = Spent()
    with open(file, newline="\n") as stream, Registry.open(registry, write=True) as target:
        report = load(target, stream, allowed=allowed, trust=True, is_problem=is_problem)
    assert not report.skipped, report.skipped[:3]
    return spent.on(report.verdicts + report.unchanged)


def exporting(registry: str, file: str) -> dict[str, Any]:
    from tilebook.registry import Registry, export

    spent = Spent()
    with Registry.open(registry) as source, open(file, "w") as stream:
        count = export(source, stream)
    return spent.on(count)


def showing(registry: str, op: str) -> dict[str, Any]:
    """One GPU's verdicts on an op, read as `show` does, without the printing."""
    from tilebook.registry import Layers

    spent = Spent()
    found, _ = Layers([("explicit", registry)]).overviews(op=op, gpu="H200")
    return spent.on(len(found))


def dispatching(registry: str) -> dict[str, Any]:
    """The first look-up of a program, and shapes that are new to it, with a verdict of their own and without."""
    import torch

    from tilebook import device as devices
    from tilebook import op as ops
    from tilebook.dispatch import Dispatch

    devices.current = lambda index=0: devices.find("H200")  # type: ignore[assignment]
    torch.cuda.is_current_stream_capturing = lambda: False
    os.environ["TILEBOOK_REGISTRY"] = registry
    dice, gpu, here = random.Random(7), torch.device("cuda", 0), Dispatch()
    asked = {
        name: [ops.get(name).problem.from_key(key) for key in itertools.islice(keys(dice, kind, name), SHAPES)]
        for name, kind in OPS
    }
    first, before, cpu = ops.get("attention_fwd"), peak_mb(), time.process_time()
    figures: dict[str, Any] = {"first_s": round(seconds_of(lambda: here.choose(first, asked[first.name][0], gpu)), 4)}
    figures["first_cpu_s"] = round(time.process_time() - cpu, 4)
    figures["first_mb"] = round(peak_mb() - before, 1)
    for name, found in asked.items():
        found[:0] = map(ops.get(name).problem.from_key, exact_keys(registry, name, SHAPES))
    passes = [new_shapes(Dispatch(), asked, gpu) for _ in range(PASSES)]
    times: dict[str, list[float]] = {}
    for each in zip(*passes, strict=True):
        times.setdefault(each[0][0], []).append(1e3 * min(seconds for _, seconds in each))
    figures["new_shape_ms"] = {source: spread(found) for source, found in times.items()}
    figures["all_mb"] = round(peak_mb() - before, 1)
    figures |= known()
    return figures


def new_shapes(here: Any, asked: dict[str, list[Any]], gpu: Any) -> list[tuple[str, float]]:
    """What serves each problem, and in how many seconds that is found, by a dispatch that has seen none of them."""
    from tilebook import op as ops

    found = []
    for name, problems in asked.items():
        op = ops.get(name)
        here.choose(op, problems[0], gpu)  # the op's first, which is another figure
        for problem in problems[1:]:
            began = time.perf_counter()
            choice = here.choose(op, problem, gpu)
            found.append((choice.source, time.perf_counter() - began))
    return found


def known() -> dict[str, Any]:
    """A call like one before, of RMSNorm: its key, of which every tensor has its part, and the choice found by it.

    Microseconds: with the key that Python makes, and, where the extension is built (`python -m tilebook.native`), with
    the one that the extension makes. The least of many short turns, for the machine may do other work.
    """
    import torch

    from tilebook import native
    from tilebook import op as ops
    from tilebook.dispatch import Dispatch, memo
    from tilebook.dispatch.snapshot import pytorch

    here, op = Dispatch(), ops.get("rms_norm_fwd")
    args = op.problem.examples()[0].inputs("cpu", 0)

    def least_us() -> float:
        assert here.known(op, args) is not None
        return round(1e4 * min(seconds_of(lambda: [here.known(op, args) for _ in range(100)]) for _ in range(2_000)), 3)

    here._memo.keep(op, args, pytorch(op, op.problem.of(*args)))
    found: dict[str, Any] = {"known_us": least_us(), "known_by_extension_us": None}
    if (extension := native._loaded()) is not None:
        extension.keys(torch.nn.Parameter, memo.key)
        here.keyed_by(extension.key)
        found["known_by_extension_us"] = least_us()
    return found


def exact_keys(registry: str, op: str, count: int) -> list[str]:
    query = """SELECT p.key FROM problem AS p JOIN verdict AS v ON v.problem_id = p.id
               JOIN device AS d ON d.id = v.device_id WHERE p.op = ? AND d.name LIKE '%H200%' LIMIT ?"""
    with sqlite3.connect(registry) as database:
        return [key for (key,) in database.execute(query, [op, count])]


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def spread(times: list[float]) -> dict[str, float]:
    times.sort()
    of = {"median": times[len(times) // 2], "mean": sum(times) / len(times), "p95": times[int(0.95 * len(times))]}
    return {"count": len(times), **{name: round(value, 4) for name, value in of.items()}}


class Spent:
    """Seconds and memory since it was made, of this process and of those that it has started and that have ended."""

    def __init__(self) -> None:
        self._family = Family()
        self._mb, self._clock, self._cpu = peak_mb(), time.perf_counter(), cpu_seconds()

    def on(self, records: int) -> dict[str, Any]:
        seconds, cpu = time.perf_counter() - self._clock, cpu_seconds() - self._cpu
        rates = {"per_second": round(records / seconds), "per_cpu_second": round(records / cpu)}
        spent = {"records": records, "seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3)}
        more = {"peak_mb": round(peak_mb(), 1), "more_mb": round(peak_mb() - self._mb, 1)}
        return {**spent, **rates, **more, **self._family.most()}


def cpu_seconds() -> float:
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "import": importing,
    "export": exporting,
    "show": showing,
    "dispatch": dispatching,
    "known": known,
}


def fresh(task: str, *arguments: object) -> Any:
    command = [sys.executable, __file__, "--task", task, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(task, *arguments, json.dumps(found), flush=True)
    return found


def measured(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    first, second, third = folder / "first.jsonl", folder / "second.jsonl", folder / "third.jsonl"
    began = time.perf_counter()
    make_file(first, options.verdicts, options.gpus, options.finalists, options.samples)
    print(f"made {first.stat().st_size >> 20} MB in {time.perf_counter() - began:.0f} s", flush=True)
    registry, empty = str(folder / "registry.db"), str(folder / "empty.db")
    found: dict[str, Any] = {"line_bytes": first.stat().st_size // options.verdicts}
    found["import"] = fresh("import", registry, first)
    found["registry_mb"] = Path(registry).stat().st_size >> 20
    first.unlink()
    found["export"] = fresh("export", registry, second)
    found["show"] = fresh("show", registry, "attention_fwd")
    found["dispatch"] = fresh("dispatch", registry)
    found["dispatch_shipped_only"] = fresh("dispatch", empty_registry(empty))
    if options.again:
        found["import_again"] = fresh("import", str(folder / "second.db"), second)
        found["export_again"] = fresh("export", str(folder / "second.db"), third)
        found["same_bytes"] = subprocess.run(["cmp", second, third], check=False).returncode == 0
    return found


def empty_registry(path: str) -> str:
    from tilebook.registry import Registry

    Registry.open(path, write=True).close()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("verdicts", 1_000_000), ("gpus", 10), ("finalists", 4), ("samples", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--again", action="store_true", help="import the export and export that, to compare the bytes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cores", type=int, help="how many of those that are here (default: all)")
    options, around = parser.parse_args(), environment()
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    with tempfile.TemporaryDirectory(prefix="tb-scale-") as folder:
        found = measured(Path(folder), options)
    given = {name: getattr(options, name) for name in ("verdicts", "gpus", "finalists", "samples")}
    given["cores"] = options.cores or len(os.sched_getaffinity(0))
    report = {"benchmark": "registry scale", "environment": around, "registry": given, "results": found}
    tell(report, options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        print(json.dumps(TASKS[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
