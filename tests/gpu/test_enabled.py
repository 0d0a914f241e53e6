"""Models that people have, run as they are with tilebook on: they give plain PyTorch's numbers."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from programs.compare import assert_as_near
from programs.hf_compiled import compiled
from programs.hf_models import CASES, MODELS, OWN, inputs, made, plain, step, truth
from torch import nn

import tilebook
from tilebook import dispatch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("served", ["by verdict", "ours", "patched"])
@pytest.mark.parametrize("kind", ["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_pytorchs(name, kind, served):
    if (name, kind) not in CASES:
        pytest.skip("images are not padded")
    given = inputs(name, kind, "cuda")
    right = step(made(name).double().cuda(), given)
    for dtype in (torch.bfloat16, torch.float32):
        model = made(name).to("cuda", dtype)
        theirs = step(model, given)
        forced = dispatch.use("triton") if served == "ours" and dtype == torch.bfloat16 else contextlib.nullcontext()
        changed = tilebook.patched(model) if served == "patched" else contextlib.nullcontext()
        with tilebook.enabled(), forced, changed:
            for _ in range(3):
                ours = step(model, given)
        assert_as_near(ours, theirs, right, f"{dtype}", blur=4.0)


@pytest.mark.parametrize("served", ["by verdict", "ours"])
@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[0] not in OWN])
def test_numbers_under_our_attention_function_are_pytorchs(name, kind, served):
    pytest.importorskip("transformers")
    tilebook.register_transformers()
    given, right = inputs(name, kind, "cuda"), truth(name, kind, "cuda")
    for dtype in (torch.bfloat16, torch.float32):
        model = made(name, attention=plain(name)).to("cuda", dtype)
        theirs = step(model, given)
        model.set_attn_implementation("tilebook")
        forced = dispatch.use("triton") if served == "ours" and dtype == torch.bfloat16 else contextlib.nullcontext()
        with forced:
            for _ in range(3):
                ours = step(model, given)
        assert_as_near(ours, theirs, right, f"{dtype}", blur=4.0)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_compiled_models_have_no_more_graphs_than_without_tilebook(name, kind):
    plain = compiled(name, kind, "cuda")
    with tilebook.enabled():
        assert compiled(name, kind, "cuda") == plain


@pytest.mark.parametrize("called", ["enabled", "attn_implementation"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "t5"])
def test_generated_tokens_are_pytorchs(name, cache, called):
    kind = "AutoModelForSeq2SeqLM" if name == "t5" else "AutoModelForCausalLM"
    model = made(name, kind, plain(name), decoder_start_token_id=0).cuda().eval()
    ids = inputs(name, "whole", "cuda")["input_ids"]

    def tokens():
        options = {"max_new_tokens": 48, "min_new_tokens": 48, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, cache_implementation=cache, disable_compile=True, **options)

    right = tokens()
    with tilebook.enabled():
        if called == "attn_implementation":
            model.set_attn_implementation("tilebook")
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
