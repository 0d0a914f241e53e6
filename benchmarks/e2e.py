"""Training steps of transformers' models as people run them: plain PyTorch, `TILEBOOK=1`, `patch`, and its loss head.

    python benchmarks/e2e.py --out benchmarks/results/nvidia-h200/e2e.json [--only GPT] [--seconds 300]
    python benchmarks/e2e.py --compiled --how pytorch,patched --out …      # with torch.compile, one of ours at a time
    python benchmarks/e2e.py --device cpu --tiny --out /tmp/tried.json     # no GPU, no figures

Random weights, bf16 autocast over fp32 weights, AdamW fused, dropout as the configs have it, the loss of the model's
own class. Padded batches have lengths between a quarter of the longest and all of it. Blocks of steps of all
alternate in one process in a new random order each round; plain PyTorch takes part twice, and the ratio of the two is
the noise.
"""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from compare import arguments, save
from train_steps import OWN_GRAPHS, SETTLED_STEPS, alternated

import tilebook
from tilebook import device as devices


@dataclass(frozen=True)
class Case:
    """One model and its batch. head: which of transformers' classes has its loss. labels: of tokens, else of rows."""

    kind: str
    head: str
    config: dict[str, Any]
    batch: int
    tokens: int
    padded: bool = False
    labels: bool = True
    tiny: dict[str, Any] = field(default_factory=dict)


_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 99,
}
_LLAMA = {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip

CASES = {
    "BERT-base 16 × 256, padded": Case(
        "bert", "AutoModelForSequenceClassification", {}, 16, 256, padded=True, labels=False, tiny=_SMALL
    ),
    "BERT-base 64 × 512, padded": Case(
        "bert", "AutoModelForSequenceClassification", {}, 64, 512, padded=True, labels=False, tiny=_SMALL
    ),
    "GPT-2 8 × 1024": Case(
        "gpt2", "AutoModelForCausalLM", {}, 8, 1024, tiny={"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99}
    ),
    "Llama 1B 4 × 2048": Case(
        "llama", "AutoModelForCausalLM", _LLAMA, 4, 2048, tiny=_SMALL | {"num_key_value_heads": 2}
    ),
    "Llama 1B 4 × 2048, padded": Case(
        "llama", "AutoModelForCausalLM", _LLAMA, 4, 2048, padded=True, tiny=_SMALL | {"num_key_value_heads": 2}
    ),
}


def made(case: Case, tiny: bool, device: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """The model in training, of random weights."""
    import transformers

    config = transformers.AutoConfig.for_model(case.kind, **(case.tiny if tiny else case.config))
    config.use_cache = False
    torch.manual_seed(seed)
    with torch.device(device):  # a host takes a minute for the weights of a large one
        model = getattr(transformers, case.head).from_config(config, attn_implementation=attention)
    return model.to(device).train()


class Run:
    """One model in training. how: "pytorch", "tilebook", "patched" or "loss head"."""

    def __init__(
        self, case: Case, how: str, device: str, tiny: bool, attention: str = "sdpa", compiled: bool = False
    ) -> None:
        self._on, self._device = how != "pytorch", device
        self.model = made(case, tiny, device, attention)
        if how in ("patched", "loss head"):
            tilebook.patch(self.model, loss_head=how == "loss head")
        self._called = torch.compile(self.model, options=OWN_GRAPHS if self._on else None) if compiled else self.model
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=device == "cuda")
        self._batch = _batch(case, self.model.config.vocab_size, device, tiny)

    def step(self) -> torch.Tensor:
        with tilebook.enabled() if self._on else nullcontext():
            with torch.autocast(self._device, torch.bfloat16):
                loss = self._called(**self._batch).loss
            loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _batch(case: Case, vocabulary: int, device: str, tiny: bool) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    batch, tokens = (2, 16) if tiny else (case.batch, case.tokens)
    ids = torch.randint(3, vocabulary, (batch, tokens), generator=source)
    found = {"input_ids": ids, "labels": ids.clone() if case.labels else torch.randint(2, (batch,), generator=source)}
    if case.padded:
        lengths = torch.randint(tokens // 4, tokens + 1, (batch,), generator=source)
        lengths[0] = tokens
        seen = torch.arange(tokens) < lengths[:, None]
        found["attention_mask"] = seen.long()
        if case.labels:
            found["labels"] = found["labels"].masked_fill(~seen, -100)
    return {name: x.to(device) for name, x in found.items()}


def measured(
    case: Case, hows: list[str], rounds: int, device: str, tiny: bool, compiled: bool = False
) -> dict[str, Any]:
    runs: dict[str, Run] = {how: Run(case, how, device, tiny, compiled=compiled) for how in hows}
    first = {how: [float(run.step()) for _ in range(4)] for how, run in runs.items()}
    steps, found = alternated(runs, rounds, device, SETTLED_STEPS // 4)
    return {"first_losses": first, "steps_a_block": steps, **found}


def shown(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['model']}: {row['failed']}"
    parts = [f"{name} {each[1]:.3f} ({each[0]:.3f} … {each[2]:.3f})" for name, each in row["ratio"].items()]
    times = ", ".join(f"{name} {ms:.2f} ms {row['peak_mb'][name]} MB" for name, ms in row["ms"].items())
    return f"{row['model']}: {'; '.join(parts)}; {times}"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--how", default="pytorch,tilebook,patched,loss head")
    parser.add_argument("--compiled", action="store_true", help="by torch.compile; with two of --how")
    given = parser.parse_args()
    started, rows = time.time(), list[dict[str, Any]]()
    for name, case in CASES.items():
        if given.only not in name or time.time() - started > given.seconds:
            continue
        row: dict[str, Any] = {"model": name, "mode": "compiled" if given.compiled else "eager"}
        try:
            row.update(measured(case, given.how.split(","), given.rounds, given.device, given.tiny, given.compiled))
        except Exception as broken:
            row["failed"] = f"{type(broken).__name__}: {broken}"[:500]
        rows.append(row)
        torch.compiler.reset()
        print(shown(row), flush=True)
        gc.collect()
        if given.device == "cuda":
            torch.cuda.empty_cache()
        device = devices.current().name if given.device == "cuda" else "cpu"
        save(given.out, "training steps of transformers' models", device, rounds=given.rounds, results=rows)


if __name__ == "__main__":
    main()
