"""Steps of transformers' models as people run them: plain PyTorch, `TILEBOOK=1`, its attention, `patch`, its loss head.

    python benchmarks/e2e.py --out benchmarks/results/nvidia-h200/e2e.json [--only GPT] [--seconds 300]
    python benchmarks/e2e.py --compiled --how pytorch,patched --out …      # with torch.compile, one of ours at a time
    python benchmarks/e2e.py --device cpu --tiny --out /tmp/tried.json     # no GPU, no figures

Random weights, bf16 autocast over fp32 weights, AdamW fused, dropout as the configs have it, the loss of the model's
own class. Padded batches have lengths between a quarter of the longest and all of it; mixed ones between 64 and the
longest, as often in one octave as in another. *attention* is `attn_implementation="tilebook"`; *packed* gives that
the sequences of a mixed batch in one row, without the padding. Where a model has no exact attention but the written-
out one, as soft-caps have, plain PyTorch runs that. A step of generation is a prompt and so many tokens after it, of
bf16 weights, and a step of inference is one pass over a batch. Blocks of steps of all alternate in one process in a
new random order each round; plain PyTorch takes part twice, and the ratio of the two is the noise.
"""

from __future__ import annotations

import gc
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from compare import arguments, save
from train_steps import OWN_GRAPHS, SETTLED_STEPS, Inside, alternated

import tilebook
from tilebook import device as devices

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One model and its batch.

    head: which of transformers' classes has its loss. labels: of tokens, else of rows. mixed: are lengths between 64
    and `tokens`? frames: of a spectrogram of 80 bands, which an encoder reads. generated: tokens after the prompt.
    attention: what plain PyTorch runs. hows: with what it is compared, beside `tilebook`.
    """

    kind: str
    head: str
    config: dict[str, Any]
    batch: int
    tokens: int
    padded: bool = False
    labels: bool = True
    mixed: bool = False
    frames: int = 0
    generated: int = 0
    inferred: bool = False
    attention: str = "sdpa"
    hows: tuple[str, ...] = ("patched", "loss head")
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
_SMALL_LLAMA = _SMALL | {"num_key_value_heads": 2}
_GEMMA = {
    "hidden_size": 2304, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "intermediate_size": 9216, "vocab_size": 256000, "sliding_window": 1024,
}  # fmt: skip
_WHISPER = {
    "d_model": 768, "encoder_layers": 12, "decoder_layers": 12, "encoder_attention_heads": 12,
    "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "max_source_positions": 1500,
}  # fmt: skip
_SMALL_WHISPER = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 99,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_source_positions": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_CAUSAL = "AutoModelForCausalLM"

CASES = {
    "BERT-base 16 × 256, padded": Case(
        "bert", "AutoModelForSequenceClassification", {}, 16, 256, padded=True, labels=False, tiny=_SMALL
    ),
    "BERT-base 64 × 512, padded": Case(
        "bert", "AutoModelForSequenceClassification", {}, 64, 512, padded=True, labels=False, tiny=_SMALL
    ),
    "GPT-2 8 × 1024": Case(
        "gpt2", _CAUSAL, {}, 8, 1024, tiny={"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99}
    ),
    "Llama 1B 4 × 2048": Case("llama", _CAUSAL, _LLAMA, 4, 2048, tiny=_SMALL_LLAMA),
    "Llama 1B 4 × 2048, padded": Case("llama", _CAUSAL, _LLAMA, 4, 2048, padded=True, tiny=_SMALL_LLAMA),
    "Llama 1B 1 × 8192": Case("llama", _CAUSAL, _LLAMA, 1, 8192, tiny=_SMALL_LLAMA),
    "Llama 1B 4 × 64 … 4096": Case(
        "llama", _CAUSAL, _LLAMA, 4, 4096, padded=True, mixed=True, hows=("attention", "packed"), tiny=_SMALL_LLAMA
    ),
    "Gemma-2-like 2 × 4096": Case(
        "gemma2", _CAUSAL, _GEMMA, 2, 4096, attention="eager", hows=("attention",),
        tiny=_SMALL_LLAMA | {"head_dim": 16, "sliding_window": 8},
    ),
    "Whisper-small 16 × 128": Case(
        "whisper", "AutoModelForSpeechSeq2Seq", _WHISPER, 16, 128, frames=3000, hows=("attention",),
        tiny=_SMALL_WHISPER,
    ),
    "BERT-base 64 × 512, padded, inference": Case(
        "bert", "AutoModelForSequenceClassification", {}, 64, 512, padded=True, labels=False, inferred=True,
        hows=("attention",), tiny=_SMALL,
    ),
    "Llama 1B, 256 after 8 × 1024": Case(
        "llama", _CAUSAL, _LLAMA, 8, 1024, generated=256, hows=("attention", "patched"), tiny=_SMALL_LLAMA
    ),
}  # fmt: skip


def made(case: Case, tiny: bool, device: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """The model in training, of random weights; generating ones in bf16 and to be used."""
    import transformers

    config = transformers.AutoConfig.for_model(case.kind, **(case.tiny if tiny else case.config))
    config.use_cache = bool(case.generated)
    torch.manual_seed(seed)
    with torch.device(device):  # a host takes a minute for the weights of a large one
        model = getattr(transformers, case.head).from_config(config, attn_implementation=attention)
    used = case.generated or case.inferred
    return model.to(device, torch.bfloat16).eval() if used else model.to(device).train()


class Run:
    """One model at work. how: "pytorch", "tilebook", "attention", "packed", "patched" or "loss head".

    inside: what its steps are to be in.
    """

    def __init__(
        self, case: Case, how: str, device: str, tiny: bool, attention: str = "", compiled: bool = False
    ) -> None:
        on, self._device, self._case = how != "pytorch", device, case
        self.inside: Inside = tilebook.enabled if on else nullcontext
        if how in ("attention", "packed"):
            tilebook.register_transformers()
            attention = "tilebook"
        self.model = made(case, tiny, device, attention or case.attention)
        if how in ("patched", "loss head"):
            tilebook.patch(self.model, loss_head=how == "loss head")
        self._called = torch.compile(self.model, options=OWN_GRAPHS if on else None) if compiled else self.model
        self._batch = batch_of(case, self.model.config.vocab_size, tiny)
        if how == "packed":
            self._batch = packed(self._batch)
        self._batch = {name: x.to(device) for name, x in self._batch.items()}
        if not (case.generated or case.inferred):
            self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=device == "cuda")
        self._tokens = 4 if tiny else case.generated

    def step(self) -> torch.Tensor:
        """One step; its loss, or of generation the mean of what was generated."""
        if self._case.generated:
            return self._generated()
        if self._case.inferred:
            with torch.no_grad():
                return self._called(**self._batch).logits.float().square().mean()  # type: ignore[no-any-return]
        with torch.autocast(self._device, torch.bfloat16):
            loss = self._called(**self._batch).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _generated(self) -> torch.Tensor:
        lengths = {"min_new_tokens": self._tokens, "max_new_tokens": self._tokens}
        with torch.no_grad():
            found = self.model.generate(**self._batch, **lengths, do_sample=False, pad_token_id=0)
        return found[:, self._batch["input_ids"].shape[1] :].float().mean()


def batch_of(case: Case, vocabulary: int, tiny: bool) -> Batch:
    """What a model is given, on the CPU."""
    source = torch.Generator().manual_seed(1)
    batch, tokens = (2, 16) if tiny else (case.batch, case.tokens)
    ids = torch.randint(3, vocabulary, (batch, tokens), generator=source)
    labels = ids if case.labels else torch.randint(2, (batch,), generator=source)
    if not case.padded:
        seen = torch.ones(batch, tokens, dtype=torch.bool)
    else:
        seen = torch.arange(tokens) < _lengths(case, batch, tokens, source)[:, None]
        labels = ids.masked_fill(~seen, -100) if case.labels else labels
    if case.frames:
        spectrogram = torch.randn(batch, 80, 32 if tiny else case.frames, generator=source)
        return {"input_features": spectrogram, "labels": labels}
    found = {"input_ids": ids} if case.generated else {"input_ids": ids, "labels": labels}
    return {**found, "attention_mask": seen.long()} if case.padded or case.generated else found


def _lengths(case: Case, batch: int, tokens: int, source: torch.Generator) -> torch.Tensor:
    if case.mixed:
        shortest = math.log(min(64, tokens // 4))
        share = torch.rand(batch, generator=source)
        lengths = (shortest + share * (math.log(tokens) - shortest)).exp().round().long()
    else:
        lengths = torch.randint(tokens // 4, tokens + 1, (batch,), generator=source)
    lengths[0] = tokens
    return lengths


def packed(batch: Batch) -> Batch:
    """The sequences of a padded batch in one row: positions begin anew, and first tokens are nobody's labels."""
    seen = batch["attention_mask"].bool()
    positions = torch.arange(seen.shape[1]).expand(seen.shape)[seen]
    labels = batch["labels"][seen].masked_fill(positions == 0, -100)
    return {"input_ids": batch["input_ids"][seen][None], "labels": labels[None], "position_ids": positions[None]}


def measured(
    case: Case, hows: list[str], rounds: int, device: str, tiny: bool, compiled: bool = False
) -> dict[str, Any]:
    runs: dict[str, Run] = {how: Run(case, how, device, tiny, compiled=compiled) for how in hows}
    few = bool(case.generated)  # a step of which is hundreds of calls alike
    first = {}
    for how, run in runs.items():
        with run.inside():
            first[how] = [float(run.step()) for _ in range(1 if few else 4)]
    steps, found = alternated(runs, rounds, device, 1 if few else SETTLED_STEPS // 4)
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
    parser.add_argument("--how", default="", help="of pytorch, tilebook, attention, packed, patched and loss head")
    parser.add_argument("--compiled", action="store_true", help="by torch.compile; with two of --how")
    given = parser.parse_args()
    started, rows = time.time(), list[dict[str, Any]]()
    for name, case in CASES.items():
        if given.only not in name or time.time() - started > given.seconds:
            continue
        row: dict[str, Any] = {"model": name, "mode": "compiled" if given.compiled else "eager"}
        try:
            hows = given.how.split(",") if given.how else ["pytorch", "tilebook", *case.hows]
            row.update(measured(case, hows, given.rounds, given.device, given.tiny, given.compiled))
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
