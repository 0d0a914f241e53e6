"""Do very many verdicts on kernels of others slow the look-ups of ours, or of one kernel of others among them?

    python benchmarks/reliability/strangers.py [--others 200000] [--kernels 2000] [--ours 3000] [--json FILE]

Two registries hold the same verdicts on ops that ship; one of them holds `--others` more, on so many kernels of others,
all for the same GPU. In processes of their own: seconds of a program's first look-up, milliseconds of problems that are
new to it, microseconds of a call like one before, and of an autotuner's key that is new, with a verdict and without. No
GPU needed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import scale
from here import environment, tell

CONFIGS = [{"BLOCK": 32 << n, "num_stages": stages, "num_warps": 4} for n in range(4) for stages in (2, 3)]
ASKED = 500  # of a kernel's keys, with a verdict and without


def name(number: int) -> str:
    return f"package{number % 17}.ops.room{number % 101}:kernel_{number}"


def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def key(number: int) -> str:
    return scale.canonical({"dtype": "bf16,bf16", "key": {"K": 64 + number, "M": 1 << number % 14, "N": 4096}})


@functools.cache
def own(count: int) -> tuple[str, ...]:
    """The records of ours, which take seconds to make: configs are chosen from large spaces."""
    return tuple(scale.lines(random.Random(0), count, 1, 4, 0))


def lines(others: int, kernels: int, ours: int) -> Iterator[str]:
    """Records of an exchange file: first ours, then the others'."""
    dice, (where,) = random.Random(0), scale.devices_of(1)
    yield from own(ours)
    versions = {"cuda": "13.0", "driver": "580.159.04", "torch": "2.11.0+cu130", "triton": "3.6.0"}
    for number in range(others):
        kernel, configs = number % kernels, dice.sample(CONFIGS, 4)
        made = scale.line(dice, name(kernel), key(number // kernels), where, versions, digest(kernel), configs, 0)
        content = {each: value for each, value in json.loads(made).items() if each not in ("type", "sha256")}
        content["finalists"] = content["finalists"][:-1]  # PyTorch has no part in it
        sha256 = hashlib.sha256(scale.canonical(content).encode()).hexdigest()
        yield scale.canonical({**content, "type": "verdict", "sha256": sha256}) + "\n"


def exchanged(others: int, kernels: int, ours: int) -> str:
    """A whole file of them, of so few that it has room in memory."""
    body = "".join(lines(others, kernels, ours))
    return header(others + ours, hashlib.sha256(body.encode()).hexdigest()) + body


def header(records: int, sha256: str) -> str:
    return scale.canonical({"format": "tilebook-registry", "records": records, "sha256": sha256, "version": 3}) + "\n"


def registry(path: Path, others: int, kernels: int, ours: int) -> dict[str, Any]:
    """Makes a registry of them, and says what that took."""
    file, body, whole = path.with_suffix(".jsonl"), path.with_suffix(".body"), hashlib.sha256()
    with body.open("w") as stream:
        for each in lines(others, kernels, ours):
            whole.update(each.encode())
            stream.write(each)
    with file.open("w") as stream, body.open() as rest:
        stream.write(header(ours + others, whole.hexdigest()))
        stream.writelines(rest)
    body.unlink()
    took = fresh("import", path, file)
    file.unlink()
    return {"import": took, "registry_mb": path.stat().st_size >> 20}


def looking(path: str) -> dict[str, Any]:
    """What an autotuner waits for when a key is new to it: the first of a program, and then of one kernel of many."""
    from tilebook import device as devices
    from tilebook.foreign.serving import Book

    kernel: Any = SimpleNamespace(op=name(7), digest=digest(7), configs={_config(each): each for each in CONFIGS})
    found: dict[str, Any] = {}
    book = Book(devices.find("H200"), path)
    found["first_s"] = round(scale.seconds_of(lambda: book.ranked(kernel, key(0), True)), 4)
    more = [SimpleNamespace(op=name(n), digest=digest(n), configs=kernel.configs) for n in range(7)]
    times = [1e3 * scale.seconds_of(lambda each=each: book.ranked(each, key(0), True)) for each in more]  # type: ignore[misc]
    found["first_of_a_kernel_ms"] = scale.spread(times)
    for what, first in (("known", 0), ("unknown", 10**6)):
        keys = map(key, range(first, first + ASKED))
        times = [1e6 * scale.seconds_of(lambda each=each: book.ranked(kernel, each, True)) for each in keys]  # type: ignore[misc]
        found[f"{what}_us"] = scale.spread(times)
    found["served"] = sum(bool(book.ranked(kernel, key(n), True)) for n in range(ASKED))
    return found


def _config(values: dict[str, Any]) -> Any:
    from tilebook.op import Config

    return Config(values)


def ours(path: str) -> dict[str, Any]:
    """As `scale.dispatching`, and milliseconds of the first look-up of each op after a program's first."""
    import torch

    from tilebook import op as ops
    from tilebook.dispatch import Dispatch

    found, here, gpu = scale.dispatching(path), Dispatch(), torch.device("cuda", 0)
    times = []
    for op_name, kind in scale.OPS:
        problem = ops.get(op_name).problem.from_key(next(scale.keys(random.Random(9), kind, op_name)))
        times.append(1e3 * scale.seconds_of(lambda n=op_name, p=problem: here.choose(ops.get(n), p, gpu)))  # type: ignore[misc]
    return {**found, "first_of_an_op_ms": scale.spread(times[1:])}


TASKS = {"import": scale.importing, "dispatch": ours, "autotuner": looking}


def fresh(task: str, *arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, "--task", task, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(task, *arguments, json.dumps(found), flush=True)
    return found


def measured(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    each = options.others // options.kernels  # of a kernel's keys; the eighth is asked about
    for what, others, kernels in (("alone", 8 * each, 8), ("among_others", options.others, options.kernels)):
        path = folder / f"{what}.db"
        found[what] = registry(path, others, kernels, options.ours)
        found[what]["dispatch"] = fresh("dispatch", path)
        found[what]["autotuner"] = fresh("autotuner", path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("others", 200_000), ("kernels", 2_000), ("ours", 3_000)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    options, around = parser.parse_args(), environment()
    with tempfile.TemporaryDirectory(prefix="tb-others-") as folder:
        found = measured(Path(folder), options)
    given = {each: getattr(options, each) for each in ("others", "kernels", "ours")}
    report = {"benchmark": "verdicts of others", "environment": around, "registry": given, "results": found}
    tell(report, options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        print(json.dumps(TASKS[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
