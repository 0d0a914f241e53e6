"""Small models of transformers' families, and one step of them: hidden states, and the gradients of all parameters."""

import contextlib
import math

import pytest
import torch

import tilebook
from programs.compare import assert_as_near, assert_no_further, cotangent

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 99,
}
FEW = {"num_key_value_heads": 2, "max_position_embeddings": 128}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 9, "sliding_window": 8}
IMAGES = {key: value for key, value in SMALL.items() if key != "vocab_size"} | {"image_size": 32, "patch_size": 8}
BOTH = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 99}  # fmt: skip
SOUND = {"num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 128, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "begin_suppress_tokens": None}  # fmt: skip

MODELS = {
    "bert": SMALL,
    "roberta": SMALL | {"max_position_embeddings": 256, "pad_token_id": 0},
    "distilbert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 99},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0},
    "llama": SMALL | FEW,
    "mistral": SMALL | FEW | {"sliding_window": 8},
    "qwen2": SMALL | FEW,
    "qwen3": SMALL | FEW | {"head_dim": 16},
    "gemma2": SMALL | FEW | GEMMA | {"attn_logit_softcapping": 2.0},
    "gemma3_text": SMALL | FEW | GEMMA,
    "phi3": SMALL | FEW | {"pad_token_id": 0},
    "mixtral": SMALL | FEW | {"num_local_experts": 2},
    "modernbert": SMALL | {"pad_token_id": 0, "local_attention": 16},
    "deberta-v2": SMALL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 99,
           "feed_forward_proj": "gated-gelu"},
    "bart": BOTH,
    "whisper": BOTH | SOUND,
    "falcon": SMALL | {"alibi": True, "new_decoder_architecture": False},
    "vit": IMAGES,
    "dinov2": IMAGES,
    "siglip_vision_model": IMAGES,
    "clip_vision_model": IMAGES,
    "clip_text_model": SMALL | {"max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2},
}  # fmt: skip
_LAYERS = "num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"
MEDIUM = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd"), 256),
    **dict.fromkeys(_LAYERS, 4),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 512),
    **dict.fromkeys(("head_dim", "d_kv"), 64),
    "query_pre_attn_scalar": 36,
    **dict.fromkeys(("max_position_embeddings", "max_target_positions"), 512),
    **{"vocab_size": 1000, "sliding_window": 48, "local_attention": 96, "num_mel_bins": 80},
    **{"image_size": 176, "patch_size": 16, "max_source_positions": 128},
}
"""What is larger in the larger ones, all of whose heads have a width of 64."""

SIZES_OF_ONE_LAYER = {name: {key: 1 for key in sizes if key in _LAYERS} for name, sizes in MODELS.items()}

PACKING = "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral"
"""Those that tell packed sequences by positions that begin anew."""

OWN = "falcon", "deberta-v2"
"""Those that have attention of their own, and nobody else's."""

SOFT_CAPPED = ("gemma2",)
"""Those whose soft-cap transformers' `sdpa` leaves out."""

SEQ2SEQ = "t5", "bart", "whisper"
ENCODERS = "bert", "roberta", "distilbert", "modernbert", "deberta-v2", "clip_text_model"
DECODERS = tuple(name for name, of in MODELS.items() if "image_size" not in of and name not in SEQ2SEQ + ENCODERS)
KINDS = "whole", "padded", "padded left", "packed"

CASES = [
    (name, kind)
    for name, sizes in MODELS.items()
    for kind in KINDS
    if kind == "whole"
    or (kind == "packed" and name in PACKING)
    or (kind == "padded" and "image_size" not in sizes)
    or (kind == "padded left" and name in DECODERS)
]

_DROPOUTS = ("dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop",
             "embd_pdrop", "attn_pdrop", "dropout_rate", "activation_dropout", "hidden_dropout")  # fmt: skip


def made(name, kind=None, attention=None, size="tiny", **more):
    """A model of this family without dropout, the same at each call; an AutoModel if `kind` names no other class.

    Its weights are such that attention looks at some tokens, and what it generates is no one token again and again: as
    they are initialized all tokens weigh about the same, whatever a mask or a bias says.
    """
    transformers = pytest.importorskip("transformers")
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {name}")
    sizes = {key: MEDIUM.get(key, of) if size == "medium" else of for key, of in MODELS[name].items()}
    config = transformers.AutoConfig.for_model(name, **sizes | more)
    for each in _DROPOUTS:
        if hasattr(config, each):
            setattr(config, each, 0.0)
    torch.manual_seed(0)
    options = {"experts_implementation": "eager"} if name == "mixtral" else {}  # which takes fp64
    if name in OWN:
        attention = "sdpa" if name == "falcon" else "eager"  # whose eager attention adds its biases twice
    model = getattr(transformers, kind or "AutoModel").from_config(config, attn_implementation=attention, **options)
    more = 0.1 if name == "t5" else 0.8  # which does not scale its scores down
    with torch.no_grad():
        for each in model.parameters():
            each.add_(torch.randn(each.shape), alpha=more / math.sqrt(config.hidden_size))
    return model


def inputs(name, kind, device, size="tiny"):
    """Arguments of a model: whole rows, rows padded at their ends or beginnings, or rows of several sequences."""
    generator, times = torch.Generator().manual_seed(0), 4 if size == "medium" else 1  # the same on every device
    if MODELS[name].get("image_size"):
        edge = MEDIUM["image_size"] if size == "medium" else 32
        return {"pixel_values": torch.randn(3, 3, edge, edge, generator=generator).to(device)}
    # Rows of masks are whole vectors: of others PyTorch's kernels bring the GPU down.
    n = 32 * times
    given = {"input_ids": torch.randint(3, 99, (3, n), generator=generator).to(device)}
    if name in SEQ2SEQ:
        given["decoder_input_ids"] = given["input_ids"][:, : n // 2]
    if name == "whisper":
        del given["input_ids"]
        mels = MEDIUM["num_mel_bins"] if size == "medium" else 16
        given["input_features"] = torch.randn(3, mels, 2 * n, generator=generator).to(device)
    if kind in ("padded", "padded left"):
        for prefix, rows in (("", n), ("decoder_", n // 2)):
            if f"{prefix}input_ids" in given:
                lengths = torch.tensor([rows, rows * 17 // 32, rows * 5 // 32], device=device)[:, None]
                seen = (torch.arange(rows, device=device) < lengths).long()
                given[f"{prefix}attention_mask"] = seen.flip(1) if kind == "padded left" else seen
    if kind == "packed":
        rows = [[13, 1, 18], [32], [5, 20, 7]]
        positions = [torch.cat([torch.arange(n * times) for n in row]) for row in rows]
        given["position_ids"] = torch.stack(positions).to(device)
        given["use_cache"] = False  # with a cache transformers looks for no packs
    return given


def loss(found):
    """Of each number another multiple: the mean of squares of what a norm gives is the same whatever it is given."""
    return (found.float() * cotangent(found)).mean()


TIMES = {"tiny": 2.0**10, "medium": 2.0**14}
"""What the loss is multiplied by, so that fp16 holds the gradients."""


def step(model, given, times=1.0):
    """Hidden states of real tokens, and the gradients of all parameters that have one."""
    given = {key: x.to(model.dtype) if key in ("pixel_values", "input_features") else x for key, x in given.items()}
    model.zero_grad(set_to_none=True)
    found = model(**given)[0]
    seen = given.get("decoder_attention_mask" if "decoder_input_ids" in given else "attention_mask")
    if seen is not None:
        found = found * seen[..., None]
    (loss(found) * times).backward()
    return [found.detach(), *[each.grad for each in model.parameters() if each.grad is not None]]


def plain(name):
    """The attention function of transformers that computes what the model is."""
    return "eager" if name in SOFT_CAPPED else "sdpa"


@contextlib.contextmanager
def on_tilebook(model, called):
    """As a program has it: "enabled", as by `TILEBOOK=1`; the attention "implementation"; or "patched" as well."""
    with contextlib.ExitStack() as stack:
        if called != "implementation":
            stack.enter_context(tilebook.enabled())
        if called == "patched":
            stack.enter_context(tilebook.patched(model))
        before = model.config._attn_implementation
        if called == "implementation":
            tilebook.register_transformers()
            model.set_attn_implementation("tilebook")
        yield
        if called == "implementation":
            model.set_attn_implementation(before)


def assert_near(ours, theirs, right, what):
    """Twice PyTorch's distance from the truth over each tensor, and about that at its worst number.

    No model here has a ReLU: where rounding turns one on or off, gradients leap.
    """
    assert_no_further(ours, theirs, right, what)
    assert_as_near(ours, theirs, right, what, blur=4.0)


def language_model(name, attention, size="tiny", **more):
    """One that generates."""
    kind = {"whisper": "AutoModelForSpeechSeq2Seq"}.get(name, "AutoModelForSeq2SeqLM")
    kind = kind if name in SEQ2SEQ else "AutoModelForCausalLM"
    return made(name, kind, attention, size, decoder_start_token_id=1, **more).eval()


def generated(model, name, padded=False, size="tiny", **options):
    """64 tokens for each of three prompts, and the logits that they were chosen by: (3, …) and (64, 3, vocabulary).

    padded: at the beginning, and for an encoder at the end. No token comes twice from a decoder that has an encoder:
    what was never trained repeats one.
    """
    given = inputs(name, "whole", "cpu", size)
    given.pop("decoder_input_ids", None)
    if "input_ids" in given:
        n = 40 if size == "medium" else 12
        given["input_ids"] = given["input_ids"][:, :n]
        seen = (torch.arange(n) >= torch.tensor([0, 4, n - 2])[:, None]).long()
        given["attention_mask"] = (seen.flip(1) if name in SEQ2SEQ else seen) if padded else torch.ones_like(seen)
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0, **options}
    options |= {"no_repeat_ngram_size": 1} if name in SEQ2SEQ else {}
    given = {key: x.to(model.device) for key, x in given.items()}
    found = model.generate(**given, **options, disable_compile=True, output_scores=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.scores)


def _spelled_out(module, query, key, value, mask, scaling=None, is_causal=None, softcap=None, position_bias=None, **_):
    """Attention as its formula, for the truth: (B, Sq, H, D), in the dtype of its inputs throughout."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if position_bias is None else scores + position_bias
    if mask is None and query.shape[2] > 1 and (module.is_causal if is_causal is None else is_causal):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def truth(name, kind, device, size="tiny", **more):
    """`step` in fp64, `TIMES` its loss, of attention that is spelled out; of `OWN` it is transformers' own."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("spelled_out", _spelled_out)
    AttentionMaskInterface.register("spelled_out", sdpa_mask)
    model = made(name, attention="spelled_out", size=size, **more).to(device, torch.float64)
    return step(model, inputs(name, kind, device, size), TIMES[size])
