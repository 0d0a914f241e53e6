"""Every family of models on a GPU with tilebook: at most twice as far from the truth as PyTorch is, the same tokens."""

import contextlib
import copy
import functools

import pytest
import torch
from programs.hf_models import (
    CASES,
    DECODERS,
    MODELS,
    OWN,
    SEQ2SEQ,
    TIMES,
    assert_near,
    generated,
    inputs,
    language_model,
    made,
    on_tilebook,
    plain,
    step,
    truth,
)

from tilebook import dispatch

pytestmark = pytest.mark.gpu

pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = "tiny", "medium"
WAYS = [("enabled", "verdict"), ("enabled", "ours"), ("implementation", "verdict"), ("implementation", "ours")]
ELSEWHERE = {("falcon", "enabled"), ("deberta-v2", "enabled"), ("gemma2", "enabled")}
"""Where no kernel of ours takes what attention is: a bias of each pair, attention that is written out."""

fresh = functools.lru_cache(2)(lambda name, size: made(name, attention=plain(name), size=size))
right = functools.lru_cache(2)(truth)


@pytest.fixture(autouse=True)
def _convolutions_in_fp32(monkeypatch):
    """Else the distance of what begins with one would be that of TF32, and anything near enough."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def served(by):
    return dispatch.use("triton") if by == "ours" else contextlib.nullcontext()


def takes(name, called):
    return name not in OWN or called != "implementation"


@pytest.mark.parametrize(
    ("name", "kind", "size", "called", "by"),
    [
        (*case, size, *way)
        for case in CASES
        for size in SIZES
        for way in (*WAYS, ("patched", "verdict"))
        if takes(case[0], way[0])
    ],
)
def test_numbers_are_pytorchs(name, kind, size, called, by):
    given = inputs(name, kind, "cuda", size)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if by == "ours" and dtype == torch.float32:
            continue  # those the interpreter runs, and they compile for long
        model = copy.deepcopy(fresh(name, size)).to("cuda", dtype)
        theirs = step(model, given, TIMES[size])
        with on_tilebook(model, called), served(by):
            for _ in range(3):
                ours = step(model, given, TIMES[size])
        assert_near(ours, theirs, right(name, kind, "cuda", size), f"{dtype}")


@pytest.mark.parametrize(
    ("name", "called"),
    [(name, called) for name in MODELS for called in ("enabled", "implementation") if takes(name, called)],
)
def test_attention_is_by_our_kernels_where_they_are_asked_for(name, called):
    given = inputs(name, "padded" if (name, "padded") in CASES else "whole", "cuda", "medium")
    model = copy.deepcopy(fresh(name, "medium")).to("cuda", torch.bfloat16)
    with on_tilebook(model, called), served("ours"):
        for _ in range(3):
            step(model, given)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step(model, given)
            torch.cuda.synchronize()
    found = {event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA}
    for part in ("attention_fwd", "attention_bwd"):
        assert any(each.startswith(part) for each in found) == ((name, called) not in ELSEWHERE), found


@pytest.mark.parametrize(
    ("name", "size", "padded", "cache"),
    [
        (name, size, padded, cache)
        for name in DECODERS + SEQ2SEQ
        for size in SIZES
        for padded in ((False, True) if name != "whisper" else (False,))
        for cache in (("dynamic", "static") if name != "falcon" else ("dynamic",))  # for which transformers has none
    ],
)
def test_generated_tokens_are_pytorchs(name, size, padded, cache):
    model = language_model(name, plain(name), size).cuda()
    tokens, scores = generated(model, name, padded, size, cache_implementation=cache)
    first, second = scores.topk(2).values.unbind(-1)
    scale = scores[scores.isfinite()].std()
    assert (first - second).min() > 1e-4 * scale, "a choice that rounding may turn"
    kernels = ("ours",) if size == "tiny" and name in ("gpt2", "llama", "gemma2", "t5") else ()
    for called in ("enabled", "implementation"):
        for by in ("verdict", *kernels):
            if takes(name, called):
                with on_tilebook(model, called), served(by):
                    ours, _ = generated(model, name, padded, size, cache_implementation=cache)
                assert torch.equal(ours, tokens), f"{called}, by {by}"
