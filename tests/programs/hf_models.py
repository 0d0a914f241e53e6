"""Small models of transformers' families, and one step of them: hidden states, and the gradients of all parameters."""

import pytest
import torch

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 99,
}
FEW = {"num_key_value_heads": 2, "max_position_embeddings": 128}
IMAGES = {key: value for key, value in SMALL.items() if key != "vocab_size"} | {"image_size": 32, "patch_size": 8}

MODELS = {
    "bert": SMALL,
    "roberta": SMALL | {"max_position_embeddings": 128, "pad_token_id": 0},
    "distilbert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 99},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99},
    "llama": SMALL | FEW,
    "mistral": SMALL | FEW | {"sliding_window": 8},
    "qwen2": SMALL | FEW,
    "qwen3": SMALL | FEW | {"head_dim": 16},
    "gemma2": SMALL | FEW | {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": SMALL | FEW | {"head_dim": 16, "sliding_window": 8},
    "phi3": SMALL | FEW | {"pad_token_id": 0},
    "mixtral": SMALL | FEW | {"num_local_experts": 2},
    "modernbert": SMALL | {"pad_token_id": 0},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
    "bart": {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 99},
    "falcon": SMALL | {"alibi": True, "new_decoder_architecture": False},
    "vit": IMAGES,
    "dinov2": IMAGES,
    "siglip_vision_model": IMAGES,
    "clip_vision_model": IMAGES,
}  # fmt: skip
PACKING = "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral"
"""Those that tell packed sequences by positions that begin anew."""

OWN = ("falcon",)
"""Those that have attention classes of their own, by names that nobody can add to."""

SOFT_CAPPED = ("gemma2",)
"""Those whose soft-cap transformers' `sdpa` leaves out."""

CASES = [
    (name, kind)
    for name, sizes in MODELS.items()
    for kind in ("whole", "padded", "packed")
    if kind == "whole" or (name in PACKING if kind == "packed" else "image_size" not in sizes)
]

_DROPOUTS = ("dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop",
             "embd_pdrop", "attn_pdrop", "dropout_rate", "activation_dropout", "hidden_dropout")  # fmt: skip


def made(name, kind=None, attention=None, **more):
    """A model of this family without dropout, the same at each call; an AutoModel if `kind` names no other class."""
    transformers = pytest.importorskip("transformers")
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {name}")
    config = transformers.AutoConfig.for_model(name, **MODELS[name] | more)
    for each in _DROPOUTS:
        if hasattr(config, each):
            setattr(config, each, 0.0)
    torch.manual_seed(0)
    options = {"experts_implementation": "eager"} if name == "mixtral" else {}  # which takes fp64
    attention = "eager" if name in OWN else attention
    return getattr(transformers, kind or "AutoModel").from_config(config, attn_implementation=attention, **options)


def inputs(name, kind, device):
    """Arguments of a model: whole rows, rows padded at their ends, or rows of several sequences."""
    generator = torch.Generator(device).manual_seed(0)
    if MODELS[name].get("image_size"):
        return {"pixel_values": torch.randn(3, 3, 32, 32, device=device, generator=generator)}
    # Rows of masks are whole vectors: of others PyTorch's kernels bring the GPU down.
    ids = torch.randint(3, 99, (3, 32), device=device, generator=generator)
    given = {"input_ids": ids}
    if name in ("t5", "bart"):
        given["decoder_input_ids"] = ids[:, :16]
    if kind == "padded":
        seen = torch.arange(32, device=device) < torch.tensor([32, 17, 5], device=device)[:, None]
        given["attention_mask"] = seen.long()
    if kind == "packed":
        rows = [[13, 1, 18], [32], [5, 20, 7]]
        positions = [torch.cat([torch.arange(n) for n in row]) for row in rows]
        given["position_ids"] = torch.stack(positions).to(device)
        given["use_cache"] = False  # with a cache transformers looks for no packs
    return given


def step(model, given):
    """Hidden states of real tokens, and the gradients of all parameters that have one."""
    given = {key: x.to(model.dtype) if key == "pixel_values" else x for key, x in given.items()}
    model.zero_grad(set_to_none=True)
    found = model(**given)[0]
    if "attention_mask" in given and "decoder_input_ids" not in given:
        found = found * given["attention_mask"][..., None]
    found.float().square().mean().backward()
    return [found.detach(), *[each.grad for each in model.parameters() if each.grad is not None]]


def plain(name):
    """The attention function of transformers that computes what the model is."""
    return "eager" if name in SOFT_CAPPED else "sdpa"


def truth(name, kind, device):
    """`step` in fp64; in fp32 where it is transformers' eager attention, whose most negative number fp32 must hold."""
    model = made(name, attention=plain(name)).to(device, torch.float32 if name in SOFT_CAPPED else torch.float64)
    return step(model, inputs(name, kind, device))
