"""Ranks of one program: DDP and FSDP2 with tilebook on beside plain PyTorch, and look-ups while somebody tunes.

    python benchmarks/ranks.py --out benchmarks/results/nvidia-h200/ranks.json [--ranks 2] [--rounds 7]
    python benchmarks/ranks.py --device cpu --tiny --out /tmp/tried.json     # gloo, no figures

*Training*: two Llama-shaped models of the same weights in each rank, one of them trained under `tilebook.enabled()`,
in blocks of steps that alternate. JSON: milliseconds of a step, their ratio, and how far the losses are apart.
*Look-ups*: every rank asks dispatch about the same problems, each in an order of its own, and reads its registry anew
now and then, while another process writes one verdict after another on them. JSON: how many were looked up, how many
found a verdict, and on how many the ranks differ, which is to be 0.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as torch_processes
from compare import arguments, save
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import tilebook
from tilebook import device as devices

for part in ("dispatch", ""):
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / part))

LLAMA = {
    "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 8192, "vocab_size": 32000, "use_cache": False,
}  # fmt: skip
TINY = LLAMA | {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
STEPS = 6
"""In a block."""

SETTLED = 60
"""Steps before the first block: tilebook's own turns are over then."""

RELOADS = 50
"""After so many look-ups a rank reads its registry anew."""


class Trained:
    """A model of one rank and its optimizer. how: "ddp" or "fsdp2"."""

    def __init__(self, how: str, given: argparse.Namespace, rank: int, ours: bool) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **(TINY if given.tiny else LLAMA))
        with torch.device(given.device):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
        self.inside = tilebook.enabled if ours else nullcontext
        self._cast: Any = nullcontext
        if how == "ddp":
            self.model: Any = DistributedDataParallel(model, gradient_as_bucket_view=True)
            self._cast = lambda: torch.autocast(given.device, torch.bfloat16)
        else:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            for layer in model.model.layers:
                fully_shard(layer, mp_policy=policy)
            self.model = fully_shard(model, mp_policy=policy)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=given.device == "cuda")
        self._source = torch.Generator().manual_seed(rank)
        self._size = (2, 32) if given.tiny else (4, 2048)
        self._device, self._vocabulary = given.device, config.vocab_size
        self.losses: list[torch.Tensor] = []

    def step(self) -> None:
        ids = torch.randint(3, self._vocabulary, self._size, generator=self._source).to(self._device)
        with self._cast():
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())


def training(rank: int, how: str, given: argparse.Namespace) -> dict[str, Any]:
    """One rank's part; both ranks take the same steps in the same order."""
    runs = {name: Trained(how, given, rank, name == "tilebook") for name in ("pytorch", "tilebook")}
    wait = torch.cuda.synchronize if given.device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in runs}

    def block(name: str, steps: int) -> float:
        with runs[name].inside():
            wait()
            began = time.perf_counter()
            for _ in range(steps):
                runs[name].step()
            wait()
            return 1e3 * (time.perf_counter() - began) / steps

    for name in runs:
        block(name, 2 if given.tiny else SETTLED)
    for turn in range(given.rounds):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            times[name].append(block(name, 1 if given.tiny else STEPS))
    losses = [torch.stack(each.losses).float().cpu() for each in runs.values()]
    ratios = sorted(a / b for a, b in zip(*times.values(), strict=True))
    return {
        "ms": {name: round(statistics.median(found), 3) for name, found in times.items()},
        "ratio": [round(ratios[int(share * (len(ratios) - 1))], 3) for share in (0.25, 0.5, 0.75)],
        "losses_apart": round(((losses[0] - losses[1]).abs() / losses[0]).max().item(), 5),
        "last_loss": round(losses[1][-1].item(), 4),
    }


def problems(count: int) -> list[Any]:
    from dispatch_samples import OP

    shapes = ((batch, 64 * blocks) for blocks in range(1, 1 + count) for batch in range(1, 101))
    return [OP.problem.parse(f"B{batch},H16,S{seq},D64", "bf16") for (batch, seq), _ in zip(shapes, range(count))]  # noqa: B905


def looking_up(rank: int, how: str, given: argparse.Namespace) -> dict[str, Any]:
    from dispatch_samples import GPU, OP

    from tilebook.dispatch import Dispatch

    if given.device == "cpu":
        devices.current = lambda index=0: GPU  # type: ignore[assignment]
        torch.cuda.is_current_stream_capturing = lambda: False
    asked, here, gpu = problems(given.lookups), Dispatch(), torch.device("cuda", rank if given.device == "cuda" else 0)
    order, found = random.Random(rank).sample(range(len(asked)), len(asked)), {}
    began = time.perf_counter()
    for n, place in enumerate(order):
        if n % RELOADS == 0:
            here.reload()
        choice = here.choose(OP, asked[place], gpu)
        found[place] = choice.implementation.name, None if choice.config is None else str(dict(choice.config))
    seconds = time.perf_counter() - began
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    differ = sum(any(other[place] != found[place] for other in everyone) for place in found)
    verdicts = sum(name == "triton" for name, _ in found.values())
    return {"lookups": len(found), "verdicts": verdicts, "differ": differ, "seconds": round(seconds, 1)}


def tuner(path: str, count: int, begun: Any, ended: Any) -> None:
    """Writes verdicts as a tuning run does, until the ranks are done; a problem's config changes again and again."""
    from dispatch_samples import OTHER, RUNNER_UP, verdict

    from tilebook.registry import Registry

    dice, asked = random.Random(7), problems(count)
    while not ended.is_set():
        found = [verdict(problem=each, config=dice.choice((OTHER, RUNNER_UP))) for each in dice.sample(asked, 20)]
        with Registry.open(path, write=True) as registry:
            registry.merge((), found, ())
        begun.set()


TASKS: dict[str, Callable[[int, str, argparse.Namespace], dict[str, Any]]] = {
    "ddp": training, "fsdp2": training, "lookups": looking_up,
}  # fmt: skip


def rank_of(rank: int, task: str, given: argparse.Namespace, folder: str, results: Any) -> None:
    if given.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if given.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/{task}", rank=rank, world_size=given.ranks)
    found = TASKS[task](rank, task, given)
    dist.barrier()
    results.put((rank, found))
    dist.destroy_process_group()


def run(task: str, given: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """What each rank says of a task."""
    context = multiprocessing.get_context("spawn")
    results, begun, ended = context.SimpleQueue(), context.Event(), context.Event()
    writer = context.Process(target=tuner, args=(os.environ["TILEBOOK_REGISTRY"], given.lookups, begun, ended))
    if task == "lookups":
        writer.start()
        begun.wait(60)
    try:
        torch_processes.spawn(rank_of, (task, given, folder, results), nprocs=given.ranks)
    finally:
        ended.set()
        if task == "lookups":
            writer.join()
    return [found for _, found in sorted((results.get() for _ in range(given.ranks)), key=lambda each: each[0])]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lookups", type=int, default=10_000)
    parser.add_argument("--only", choices=sorted(TASKS), nargs="*", default=list(TASKS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for task in given.only:
            if task == "lookups":
                os.environ["TILEBOOK_REGISTRY"] = str(Path(folder) / "registry.db")
            else:
                os.environ.setdefault("TILEBOOK_REGISTRY", str(Path(folder) / "none.db"))
            found[task] = run(task, given, folder)
            print(task, found[task], flush=True)
    name = devices.current().name if given.device == "cuda" else "cpu"
    save(given.out, "ranks", name, ranks=given.ranks, results=found)
    return int(any(each["differ"] for each in found.get("lookups", ())))


if __name__ == "__main__":
    sys.exit(main())
