"""Models that people have, run as they are with tilebook on: they give plain PyTorch's numbers."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from programs.compare import assert_as_near
from torch import nn

import tilebook
from tilebook import dispatch

pytestmark = pytest.mark.gpu

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


def _model(name):
    transformers = pytest.importorskip("transformers")
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {name}")
    config = transformers.AutoConfig.for_model(name, **MODELS[name])
    for each in ("dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop",
                 "embd_pdrop", "attn_pdrop", "dropout_rate", "activation_dropout", "hidden_dropout"):  # fmt: skip
        if hasattr(config, each):
            setattr(config, each, 0.0)
    torch.manual_seed(0)
    more = {"experts_implementation": "eager"} if name == "mixtral" else {}  # which takes fp64
    return transformers.AutoModel.from_config(config, attn_implementation="eager" if name == "falcon" else None, **more)


def _inputs(name, padded):
    generator = torch.Generator("cuda").manual_seed(0)
    if MODELS[name].get("image_size"):
        return {"pixel_values": torch.randn(3, 3, 32, 32, device="cuda", generator=generator)}
    # Rows of masks are whole vectors: of others PyTorch's kernels bring the GPU down.
    ids = torch.randint(3, 99, (3, 32), device="cuda", generator=generator)
    given = {"input_ids": ids}
    if name in ("t5", "bart"):
        given["decoder_input_ids"] = ids[:, :16]
    if padded:
        seen = torch.arange(32, device="cuda") < torch.tensor([32, 17, 5], device="cuda")[:, None]
        given["attention_mask"] = seen.long()
    return given


def _step(model, given):
    """Hidden states of real tokens, and the gradients of all parameters that have one."""
    given = {key: x.to(model.dtype) if x.is_floating_point() else x for key, x in given.items()}
    model.zero_grad(set_to_none=True)
    found = model(**given)[0]
    if "attention_mask" in given and "decoder_input_ids" not in given:
        found = found * given["attention_mask"][..., None]
    found.float().square().mean().backward()
    return [found.detach(), *[each.grad for each in model.parameters() if each.grad is not None]]


@pytest.mark.parametrize("served", ["by verdict", "ours", "patched"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_pytorchs(name, padded, served):
    if padded and MODELS[name].get("image_size"):
        pytest.skip("images are not padded")
    given = _inputs(name, padded)
    truth = _step(_model(name).double().cuda(), given)
    for dtype in (torch.bfloat16, torch.float32):
        model = _model(name).to("cuda", dtype)
        theirs = _step(model, given)
        forced = dispatch.use("triton") if served == "ours" and dtype == torch.bfloat16 else contextlib.nullcontext()
        changed = tilebook.patched(model) if served == "patched" else contextlib.nullcontext()
        with tilebook.enabled(), forced, changed:
            for _ in range(3):
                ours = _step(model, given)
        assert_as_near(ours, theirs, truth, f"{dtype}", blur=4.0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "t5"])
def test_generated_tokens_are_pytorchs(name):
    transformers = pytest.importorskip("transformers")
    kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **MODELS[name], decoder_start_token_id=0)
    model = kind.from_config(config).cuda().eval()
    ids = _inputs(name, False)["input_ids"]

    def tokens():
        return model.generate(ids, max_new_tokens=48, min_new_tokens=48, do_sample=False, pad_token_id=0)

    right = tokens()
    with tilebook.enabled():
        assert torch.equal(tokens(), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("rows", [8, 20_000], ids=["short", "long"])
def test_norms_under_autocast_are_pytorchs(rows, cast, dtype):
    x = torch.randn(rows, 384, device="cuda", dtype=dtype).requires_grad_()
    weight, bias = (torch.randn(384, device="cuda", dtype=dtype).requires_grad_() for _ in range(2))

    def found():
        with torch.autocast("cuda", torch.bfloat16, enabled=cast):
            values = [F.layer_norm(x, (384,), weight, bias), F.rms_norm(x, (384,), weight, 1e-6)]
        loss = sum(y.float().square().sum() for y in values)
        return [*[y.detach() for y in values], *torch.autograd.grad(loss, (x, weight, bias))]

    right = found()
    with tilebook.enabled():
        for _ in range(4):
            for got, wanted in zip(found(), right, strict=True):
                assert got.dtype == wanted.dtype
                size = wanted.abs().max().item()
                torch.testing.assert_close(got, wanted, rtol=0.03, atol=2 * torch.finfo(dtype).eps * size)


class _Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x):
        return self.layer(x).float().square().mean()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_trained_model_converges_as_pytorchs_does(compiled):
    losses = []
    for on in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = _Encoder().cuda()
        called = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        x = torch.randn(64, 197, 384, device="cuda")
        with tilebook.enabled() if on else contextlib.nullcontext():
            for _ in range(20):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = called(x)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
