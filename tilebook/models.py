"""Shapes of public models, as their published configurations have them: what the suite `models` is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilebook.device import Device
    from tilebook.op import Op, Problem

DECODING_ROWS = (1, 16, 128)
"""Sequences decoded together: the rows of every product then."""

LEAST_TRAINED_ROWS = 256
"""Fewer rows are those of decoding, which has no backward pass."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One stack of equal layers.

    attention:  how a layer's attention is masked, as shapes are written on the command line → how many layers do so.
    calls:      (sequences, tokens) of training and prefill; (sequences, queries, keys) of attention to another stack.
    decoding:   (sequences, keys in the cache) of decoding.
    inner:      features between the MLP's layers; 0 where another row of the table has the MLP and the norms.
    activation: of the MLP. "swiglu" and "geglu" are gated, with three products and a form of their own.
    biases:     do the MLP's layers have them?
    rms:        are its norms, two a layer, RMSNorm? They are LayerNorm otherwise.
    parameters: what the norms have of them, as their shapes are written: "affine", "unbiased" or "bare".
    head_norms: is there RMSNorm of every head of q and k, too?
    transposed: do the tokens come from a convolution, side by side in memory, and stay so up to the norms?
    splits:     over how many GPUs heads are split (tensor parallelism).
    fp16:       also in fp16, beside bf16.
    """

    layers: int
    hidden: int
    heads: int
    head_dim: int
    heads_kv: int = 0
    inner: int = 0
    activation: str = "swiglu"
    biases: bool = False
    rms: bool = False
    parameters: str = "affine"
    head_norms: bool = False
    transposed: bool = False
    attention: Mapping[str, int] = field(default_factory=dict)
    calls: tuple[tuple[int, ...], ...] = ()
    decoding: tuple[tuple[int, int], ...] = ()
    splits: tuple[int, ...] = (1,)
    fp16: bool = False


def _decoder(layers: int, hidden: int, inner: int, heads: int, heads_kv: int, head_dim: int, **more: Any) -> Model:
    """A language model as Llama made them: grouped heads, RMSNorm, a gated MLP without biases."""
    more.setdefault("attention", {"causal": layers})
    return Model(
        layers=layers, hidden=hidden, inner=inner, heads=heads, heads_kv=heads_kv, head_dim=head_dim, rms=True, **more
    )


def _gpt(layers: int, hidden: int, heads: int, **more: Any) -> Model:
    """A language model as GPT-2 is: LayerNorm, and an MLP four times as wide, with biases and GELU by tanh."""
    more = {"attention": {"causal": layers}, "activation": "gelu_tanh", "inner": 4 * hidden, "biases": True, **more}
    return Model(layers=layers, hidden=hidden, heads=heads, head_dim=hidden // heads, **more)


def _encoder(layers: int, hidden: int, heads: int, **more: Any) -> Model:
    """An encoder of text or images as BERT and ViT are: every token sees all, an MLP four times as wide with GELU."""
    more = {"attention": {"": layers}, "activation": "gelu", "inner": 4 * hidden, "biases": True, **more}
    return Model(layers=layers, hidden=hidden, heads=heads, head_dim=hidden // heads, **more)


def _modulated(layers: int, hidden: int, heads: int, **more: Any) -> Model:
    """An encoder of noisy images as DiT is: what goes by the step of diffusion stands for LayerNorm's parameters."""
    return _encoder(layers, hidden, heads, activation="gelu_tanh", parameters="bare", **more)


MODELS: Mapping[str, Model] = {
    "Llama-2 7B": _decoder(32, 4096, 11008, 32, 32, 128, calls=((1, 4096), (4, 2048)), decoding=((16, 4096),)),
    "Llama-2 13B": _decoder(40, 5120, 13824, 40, 40, 128, calls=((1, 4096),)),
    "Llama-2 70B": _decoder(80, 8192, 28672, 64, 8, 128, calls=((1, 4096),), decoding=((16, 4096),), splits=(4, 8)),
    "Llama-3.2 1B": _decoder(16, 2048, 8192, 32, 8, 64, calls=((4, 2048), (1, 8192)), decoding=((16, 8192),)),
    "Llama-3.2 3B": _decoder(28, 3072, 8192, 24, 8, 128, calls=((2, 4096),), decoding=((16, 8192),)),
    "Llama-3 8B": _decoder(
        32, 4096, 14336, 32, 8, 128, calls=((1, 512), (4, 2048), (1, 8192)), decoding=((1, 8192), (64, 2048)),
        fp16=True,
    ),
    "Llama-3 70B": _decoder(80, 8192, 28672, 64, 8, 128, calls=((1, 8192),), decoding=((64, 8192),), splits=(4, 8)),
    "Qwen2 0.5B": _decoder(24, 896, 4864, 14, 2, 64, calls=((8, 2048),)),
    "Qwen2 1.5B": _decoder(28, 1536, 8960, 12, 2, 128, calls=((4, 4096),)),
    "Qwen2 7B": _decoder(28, 3584, 18944, 28, 4, 128, calls=((1, 8192),), decoding=((16, 8192),), fp16=True),
    "Qwen2 72B": _decoder(80, 8192, 29568, 64, 8, 128, calls=((2, 4096),), splits=(8,)),
    "Qwen3 0.6B": _decoder(28, 1024, 3072, 16, 8, 128, calls=((8, 2048),), head_norms=True),
    "Qwen3 4B": _decoder(36, 2560, 9728, 32, 8, 128, calls=((1, 4096),), head_norms=True),
    "Qwen3 14B": _decoder(40, 5120, 17408, 40, 8, 128, calls=((1, 8192),), head_norms=True),
    "Qwen3 32B": _decoder(64, 5120, 25600, 64, 8, 128, calls=((1, 8192),), head_norms=True, splits=(2,)),
    "Mistral 7B": _decoder(
        32, 4096, 14336, 32, 8, 128, attention={"causal,window4095x0": 32}, calls=((1, 8192), (1, 16384)),
        decoding=((16, 32768),),
    ),
    "Gemma-2 2B": _decoder(
        26, 2304, 9216, 8, 4, 256, activation="geglu",
        attention={"causal,softcap": 13, "causal,window4095x0,softcap": 13}, calls=((1, 8192), (4, 2048)),
        decoding=((16, 8192),),
    ),
    "Gemma-2 9B": _decoder(
        42, 3584, 14336, 16, 8, 256, activation="geglu",
        attention={"causal,softcap": 21, "causal,window4095x0,softcap": 21}, calls=((1, 8192),),
    ),
    "Gemma-2 27B": _decoder(
        46, 4608, 36864, 32, 16, 128, activation="geglu",
        attention={"causal,softcap": 23, "causal,window4095x0,softcap": 23}, calls=((1, 8192),),
    ),
    "Gemma-3 1B": _decoder(
        26, 1152, 6912, 4, 1, 256, activation="geglu", attention={"causal": 4, "causal,window511x0": 22},
        calls=((4, 2048), (1, 8192)), decoding=((16, 8192),), head_norms=True,
    ),
    "Gemma-3 4B": _decoder(
        34, 2560, 10240, 8, 4, 256, activation="geglu", attention={"causal": 5, "causal,window1023x0": 29},
        calls=((2, 4096),), head_norms=True,
    ),
    "Gemma-3 12B": _decoder(
        48, 3840, 15360, 16, 8, 256, activation="geglu", attention={"causal": 8, "causal,window1023x0": 40},
        calls=((1, 8192),), head_norms=True,
    ),
    "Phi-1.5": _gpt(24, 2048, 32, calls=((8, 2048),), decoding=((16, 2048),)),
    "Phi-2": _gpt(32, 2560, 32, calls=((4, 2048),), decoding=((16, 2048),)),
    "Phi-3 mini": _decoder(
        32, 3072, 8192, 32, 32, 96, attention={"causal,window2047x0": 32}, calls=((4, 2048), (1, 4096))
    ),
    "Phi-4": _decoder(40, 5120, 17920, 40, 10, 128, calls=((1, 16384),)),
    "GPT-2": _gpt(12, 768, 12, calls=((16, 1024),), decoding=((16, 1024),), fp16=True),
    "GPT-2 medium": _gpt(24, 1024, 16, calls=((8, 1024),)),
    "GPT-2 large": _gpt(36, 1280, 20, calls=((8, 1024),)),
    "GPT-2 XL": _gpt(48, 1600, 25, calls=((8, 1024), (1, 1024)), decoding=((16, 1024),)),
    "StarCoder2 3B": _gpt(
        30, 3072, 24, heads_kv=2, attention={"causal,window4095x0": 30}, calls=((1, 16384),), decoding=((16, 16384),)
    ),
    "BLOOM 7B1": _gpt(
        30, 4096, 32, attention={"causal,alibi": 30}, calls=((1, 2048), (4, 2048)), decoding=((16, 2048),)
    ),
    "MPT 7B": _gpt(
        32, 4096, 32, activation="gelu", biases=False, parameters="unbiased", attention={"causal,alibi": 32},
        calls=((1, 8192),),
    ),
    "BERT base": _encoder(12, 768, 12, calls=((32, 128), (16, 512)), fp16=True),
    "BERT large": _encoder(24, 1024, 16, calls=((32, 128), (16, 512))),
    "BERT base, padded": _encoder(12, 768, 12, inner=0, attention={"maskbk": 12}, calls=((16, 512),), fp16=True),
    "BERT large, padded": _encoder(24, 1024, 16, inner=0, attention={"maskbk": 24}, calls=((32, 128), (16, 512))),
    "DistilBERT": _encoder(6, 768, 12, calls=((16, 256), (64, 512))),
    "ModernBERT base": _encoder(
        22, 768, 12, inner=1152, activation="geglu", biases=False, parameters="unbiased",
        attention={"": 8, "window64x64": 14}, calls=((16, 1024), (1, 8192)),
    ),
    "ModernBERT large": _encoder(
        28, 1024, 16, inner=2624, activation="geglu", biases=False, parameters="unbiased",
        attention={"": 10, "window64x64": 18}, calls=((2, 8192),),
    ),
    "ViT-S/16": _encoder(12, 384, 6, calls=((128, 197),)),
    "ViT-B/16": _encoder(12, 768, 12, calls=((8, 197), (64, 197)), fp16=True),
    "ViT-L/16": _encoder(24, 1024, 16, calls=((64, 197), (16, 577))),
    "ViT-H/14": _encoder(32, 1280, 16, calls=((32, 257),)),
    "DINOv2 S/14": _encoder(12, 384, 6, calls=((8, 1370),)),
    "DINOv2 B/14": _encoder(12, 768, 12, calls=((32, 257), (8, 1370))),
    "DINOv2 L/14": _encoder(24, 1024, 16, calls=((32, 257), (8, 1370))),
    "OpenCLIP H/14, images": _encoder(32, 1280, 16, calls=((64, 257),), fp16=True),
    "OpenCLIP H/14, text": _encoder(24, 1024, 16, attention={"causal": 24}, calls=((64, 77),), fp16=True),
    "CLIP L/14, images": _encoder(24, 1024, 16, activation="quick_gelu", calls=((64, 257), (8, 577))),
    "CLIP L/14, text": _encoder(12, 768, 12, activation="quick_gelu", attention={"causal": 12}, calls=((64, 77),)),
    "SigLIP B/16": _encoder(12, 768, 12, activation="gelu_tanh", calls=((64, 196),)),
    "SigLIP so400m/14": _encoder(27, 1152, 16, activation="gelu_tanh", inner=4304, calls=((32, 256), (8, 729))),
    "Whisper base, encoder": _encoder(6, 512, 8, calls=((8, 1500),)),
    "Whisper small, encoder": _encoder(12, 768, 12, calls=((8, 1500),)),
    "Whisper large-v3, encoder": _encoder(32, 1280, 20, calls=((1, 1500), (16, 1500)), fp16=True),
    "Whisper large-v3, decoder": _encoder(
        32, 1280, 20, attention={"causal": 32}, calls=((16, 448),), decoding=((16, 448),)
    ),
    "Whisper large-v3, cross": _encoder(32, 1280, 20, inner=0, calls=((16, 448, 1500),), fp16=True),
    "T5 base, encoder": _encoder(
        12, 768, 12, inner=3072, activation="relu", biases=False, rms=True, attention={"dbiashqk": 12},
        calls=((32, 512),),
    ),
    "T5 base, decoder": _encoder(
        12, 768, 12, inner=3072, activation="relu", biases=False, rms=True, attention={"causal,dbiashqk": 12},
        calls=((32, 128),),
    ),
    "T5 large, encoder": _encoder(
        24, 1024, 16, activation="relu", biases=False, rms=True, attention={"dbiashqk": 24}, calls=((16, 512),)
    ),
    "T5 v1.1 XXL, encoder": _encoder(
        24, 4096, 64, inner=10240, activation="geglu", biases=False, rms=True, attention={"biashqk": 24},
        calls=((2, 256), (1, 512)),
    ),
    "DiT-B/2": _modulated(12, 768, 12, calls=((64, 256),)),
    "DiT-L/2": _modulated(24, 1024, 16, calls=((32, 256),)),
    "DiT-XL/2": _modulated(28, 1152, 16, calls=((32, 256), (16, 1024))),
    "SD3 medium": _modulated(24, 1536, 24, calls=((2, 4429), (8, 1178)), fp16=True),
    "SD3.5 large": _modulated(38, 2432, 38, calls=((2, 4429),)),
    "Flux.1": _modulated(57, 3072, 24, calls=((1, 4608), (1, 1536))),
    "SAM ViT-B, windows": _encoder(8, 768, 12, inner=0, attention={"dbiasbhqk": 8}, calls=((25, 196),)),
    "SAM ViT-B, global": _encoder(12, 768, 12, attention={"dbiasbhqk": 4}, calls=((1, 4096),)),
    "SAM ViT-H, windows": _encoder(28, 1280, 16, inner=0, attention={"dbiasbhqk": 28}, calls=((25, 196),)),
    "SAM ViT-H, global": _encoder(32, 1280, 16, attention={"dbiasbhqk": 4}, calls=((1, 4096),)),
    "CCT-14": _encoder(14, 384, 6, inner=1152, transposed=True, calls=((8, 196), (128, 196))),
}  # fmt: skip
"""Tokens of images: (side / patch)², and one more for the class. 1178 and 4429 are SD3's at 512 and 1024 pixels, with
333 of text, 1536 and 4608 Flux's with 512 of text."""


@dataclass(frozen=True)
class Call:
    """`count` calls of one shape in one step of a model, as the command line of a kernel family writes it."""

    model: str
    step: str
    family: str
    shape: str
    dtype: str
    count: int


def _heads(model: Model, split: int) -> str:
    """The heads that one GPU of `split` has."""
    heads_kv = model.heads_kv or model.heads
    return f"H{model.heads // split},Hkv{max(1, heads_kv // split)}"


def _attention(model: Model, call: tuple[int, ...], split: int) -> Iterator[tuple[str, str, int]]:
    batch, rows, *keys = call
    for form, layers in model.attention.items():
        lengths = ",".join([f"S{rows}", *(f"Sk{n}" for n in keys)])
        yield "attention", f"B{batch},{_heads(model, split)},{lengths},D{model.head_dim},{form}".rstrip(","), layers


def _rows(model: Model, batch: int, length: int, split: int) -> Iterator[tuple[str, str, int]]:
    """What is done to every row by itself: the MLP, of which kernels take those with biases and no gate, and norms."""
    rows = batch * length
    if model.inner and model.biases and model.activation in ("gelu", "gelu_tanh", "relu") and split == 1:
        form = "" if model.activation == "gelu" else f",{model.activation}"
        yield "mlp", f"M{rows},H{model.hidden},I{model.inner}{form}", model.layers
    if model.inner:
        form = "" if model.parameters == "affine" else f",{model.parameters}"
        form += f",transposed{length}" if model.transposed else ""
        family = "rms_norm" if model.rms else "layer_norm"
        yield family, f"M{_power_of_two(rows)},N{model.hidden}{form}", 2 * model.layers
    if model.head_norms:
        for heads in (model.heads // split, max(1, model.heads_kv // split)):
            yield "rms_norm", f"M{_power_of_two(rows * heads)},N{model.head_dim}", model.layers


def _decoding(model: Model, call: tuple[int, int], split: int) -> Iterator[tuple[str, str, int]]:
    batch, keys = call
    for form, layers in model.attention.items():
        parts = form.split(",")
        # A row at the end sees as many columns as its window reaches back, and itself.
        reach = [int(part.removeprefix("window").split("x")[0]) + 1 for part in parts if part.startswith("window")]
        width = f",W{min(reach)}" if reach and min(reach) < keys else ""
        capped = ",capped" if "softcap" in parts else ""
        if "alibi" not in parts:
            shape = f"B{batch},{_heads(model, split)},S1,Sk{_power_of_two(keys)}{width},D{model.head_dim}{capped}"
            yield "decode", shape, layers


def _power_of_two(n: int) -> int:
    """The least that is no less, to which calls of norms and of decoding round."""
    return 1 << (n - 1).bit_length()


def calls() -> Iterator[Call]:
    """Every call of every model, training and prefill first."""
    for name, model in MODELS.items():
        for dtype in ("bf16", "fp16") if model.fp16 else ("bf16",):
            for split in model.splits if dtype == "bf16" else (1,):
                for step, found in _steps(model, split):
                    where = f"{step} {dtype}" if split == 1 else f"{step} {dtype} on {split} GPUs"
                    yield from (Call(name, where, family, shape, dtype, n) for family, shape, n in found)


def _steps(model: Model, split: int) -> Iterator[tuple[str, list[tuple[str, str, int]]]]:
    for call in model.calls:
        batch, rows, *_ = call
        yield f"{batch} × {rows}", [*_attention(model, call, split), *_rows(model, batch, rows, split)]
    for batch, keys in model.decoding:
        found = [*_decoding(model, (batch, keys), split), *_rows(model, batch, 1, split)]
        yield f"decoding {batch} × {keys}", found
    if model.decoding:
        met = {batch for batch, _ in model.decoding}
        yield from ((f"decoding {n}", [*_rows(model, n, 1, split)]) for n in DECODING_ROWS if n not in met)


def shapes(family: str) -> Sequence[tuple[str, str]]:
    """(shape, dtype) of every problem that the models pose a kernel family, each once."""
    return list(dict.fromkeys((call.shape, call.dtype) for call in calls() if call.family == family))


def share(problems: Sequence[tuple[Op[Any], Problem]], gpu: Device) -> Sequence[float]:
    """What share of the models' time each (op, problem) has, by the least time its calls can take on this GPU.

    A model's step is the calls that these problems cover, each as often as the model has it, and every step counts the
    same: shares are means over the steps that meet any of the problems, and sum up to 1. A problem of no model has 0.
    """
    at: dict[tuple[str, str], list[int]] = {}
    for index, (op, problem) in enumerate(problems):
        at.setdefault((op.family, problem.key), []).append(index)
    steps: dict[tuple[str, str], dict[int, float]] = {}
    by_shape: dict[tuple[str, str, str], list[int]] = {}
    for call in calls():
        wanted = call.family, call.shape, call.dtype
        if wanted not in by_shape:
            posed = {op.problem.parse(call.shape, call.dtype).key for op, _ in problems if op.family == call.family}
            by_shape[wanted] = [index for key in posed for index in at.get((call.family, key), ())]
        for index in by_shape[wanted]:
            step = steps.setdefault((call.model, call.step), {})
            step[index] = step.get(index, 0.0) + call.count * problems[index][1].floor_s(gpu)
    found = [0.0] * len(problems)
    for step in steps.values():
        whole = math.fsum(step.values())
        for index, seconds in step.items():
            found[index] += seconds / whole / len(steps)
    return found
