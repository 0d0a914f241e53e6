"""Every family of models on tilebook: at most twice as far from the truth as PyTorch is, and the same tokens.

Numbers and tokens of kernels that are compiled, and of larger models, are for tests/gpu.
"""

import copy
import functools

import pytest
import torch
from programs.hf_models import (
    CASES,
    DECODERS,
    SEQ2SEQ,
    SIZES_OF_ONE_LAYER,
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
from ways import on, ways

from tilebook import dispatch
from tilebook.huggingface import attention
from tilebook.huggingface.masks import Structure

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@functools.cache
def fresh(name, size="tiny"):
    return made(name, attention=plain(name), size=size)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("size", ["tiny", pytest.param("medium", marks=pytest.mark.long)])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_numbers_are_pytorchs(name, kind, size):
    given, right = inputs(name, kind, "cpu", size), truth(name, kind, "cpu", size)
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(fresh(name, size)).to(dtype)
        theirs = step(model, given, TIMES[size])
        for way in ways(name):
            with on(model, *way):
                assert_near(step(model, given, TIMES[size]), theirs, right, f"{way} {dtype}")


@pytest.mark.sampled(14)
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has this with kernels that are compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_numbers_are_pytorchs_by_our_kernels_in_the_interpreter(name, kind, dtype):
    pytest.importorskip("triton", reason="there are no kernels without Triton")
    given, model = inputs(name, kind, "cpu"), made(name, attention=plain(name), **SIZES_OF_ONE_LAYER[name])
    right = truth(name, kind, "cpu", **SIZES_OF_ONE_LAYER[name])
    model = model.to(dtype)
    theirs = step(model, given, TIMES["tiny"])
    for called in {called for called, _ in ways(name)}:
        with on_tilebook(model, called), dispatch.use("triton"):
            ours = step(model, given, TIMES["tiny"])
        assert_near(ours, theirs, right, called)


WRONG = {
    ("mistral", "whole"): {"window": (8, -1)},
    ("mistral", "padded left"): {"window": None},
    ("gpt2", "padded left"): {"keys": None},
    ("llama", "padded left"): {"causal": False},
    ("bert", "padded"): {"keys": None},
    ("qwen2", "packed"): {"packs": None},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "kind"), WRONG)
def test_a_mask_that_is_wrong_somewhere_is_too_far(name, kind, dtype, monkeypatch):
    model, given, right = copy.deepcopy(fresh(name)).to(dtype), inputs(name, kind, "cpu"), truth(name, kind, "cpu")
    theirs, found = step(model, given, TIMES["tiny"]), attention.noted

    def wrong(mask):
        of = {key: getattr(found(mask), key) for key in ("causal", "window", "keys", "packs")}
        return Structure(**of | WRONG[name, kind])

    with on(model, "implementation", True):
        assert_near(step(model, given, TIMES["tiny"]), theirs, right, "")
        monkeypatch.setattr(attention, "noted", wrong)
        with pytest.raises(AssertionError, match="error"):
            assert_near(step(model, given, TIMES["tiny"]), theirs, right, "")


def test_a_soft_cap_that_is_left_out_is_too_far():
    model, given, right = (
        copy.deepcopy(fresh("gemma2")).bfloat16(),
        inputs("gemma2", "whole", "cpu"),
        truth("gemma2", "whole", "cpu"),
    )
    theirs = step(model, given, TIMES["tiny"])
    with on_tilebook(model, "implementation"):
        assert_near(step(model, given, TIMES["tiny"]), theirs, right, "")
        model.layers[1].self_attn.attn_logit_softcapping = None
        with pytest.raises(AssertionError, match="error"):
            assert_near(step(model, given, TIMES["tiny"]), theirs, right, "")


@pytest.mark.sampled(8)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", DECODERS + SEQ2SEQ)
def test_generated_tokens_are_pytorchs(name, padded, cache):
    if (name == "falcon" and cache == "static") or (name == "whisper" and padded):
        pytest.skip("transformers has none")
    model = language_model(name, plain(name))
    tokens, scores = generated(model, name, padded, cache_implementation=cache)
    first, second = scores.topk(2).values.unbind(-1)
    scale = scores[scores.isfinite()].std()
    assert (first - second).min() > 1e-4 * scale, "a choice that rounding may turn"
    assert min(row.unique().numel() for row in tokens) > 8
    for way in ways(name):
        with on(model, *way):
            ours, of_ours = generated(model, name, padded, cache_implementation=cache)
        assert torch.equal(ours, tokens), way
        assert (of_ours - scores)[scores.isfinite()].abs().max() < 2e-5 * scale, way
