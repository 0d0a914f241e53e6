"""`tilebook.patch` of transformers' models: what is changed, and numbers as near to the truth as PyTorch's are."""

import copy

import pytest
import torch
from programs.compare import assert_as_near
from programs.hf_models import inputs, made, plain, step

import tilebook
from tilebook import dispatch, rotation

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

ROPE = "attention with tilebook.apply_rope"
PART = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
MODELS = {
    "llama": ({}, "tilebook.swiglu"),
    "mistral": ({}, "tilebook.swiglu"),
    "qwen2": ({}, "tilebook.swiglu"),
    "qwen3": ({}, "tilebook.swiglu"),
    "gemma2": ({}, "tilebook.geglu with tanh"),
    "gemma3_text": ({}, "tilebook.geglu with tanh"),
    "phi3": ({}, "tilebook.swiglu"),
    "phi3, a part of each head": ({"rope_parameters": PART}, "tilebook.swiglu"),
}  # fmt: skip
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has this with kernels that are compiled")


def model_of(name, **more):
    family = name.split(",")[0]
    return family, made(family, attention=plain(family), **MODELS[name][0], **more)


@pytest.mark.parametrize("name", MODELS)
def test_gates_and_rotations_are_changed_and_changed_back(name, monkeypatch):
    calls, ours = [], rotation.apply_rope
    monkeypatch.setattr(rotation, "apply_rope", lambda *args, **options: calls.append(1) or ours(*args, **options))
    family, model = model_of(name)
    given = inputs(family, "whole", "cpu")
    right = step(model, given)
    with tilebook.patched(model) as report:
        found = list(report.changed.values())
        assert (found.count(ROPE), found.count(MODELS[name][1])) == (2, 2), str(report)
        assert not report.left
        with dispatch.use("torch"):
            found = step(model, given)
        for mine, other in zip(found, right, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2, "once in each layer"
    for mine, other in zip(step(model, given), right, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.sampled(4)
@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3", "phi3, a part of each head"])
def test_numbers_are_as_near_as_pytorchs_by_our_kernels_in_the_interpreter(name, dtype):
    pytest.importorskip("triton", reason="there are no kernels without Triton")
    family, model = model_of(name, num_hidden_layers=1)
    given = inputs(family, "whole", "cpu")
    right = step(copy.deepcopy(model).to(torch.float32 if family == "gemma2" else torch.float64), given)
    theirs = step(model.to(dtype), given)
    with tilebook.patched(model), dispatch.use("triton"):
        ours = step(model, given)
    assert_as_near(ours, theirs, right, name)


def test_another_model_of_the_family_is_left_alone():
    (_, model), (family, other) = (model_of("llama") for _ in range(2))
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    before = modeling.apply_rotary_pos_emb
    with tilebook.patched(model), pytest.MonkeyPatch.context() as patch:
        patch.setattr("tilebook.rotation.apply_rope", None)
        patch.setattr("tilebook.patching.swiglu", None)
        other(**inputs(family, "whole", "cpu"))
        with pytest.raises(TypeError), dispatch.use("torch"):
            model(**inputs(family, "whole", "cpu"))
        assert modeling.apply_rotary_pos_emb is before
    assert modeling.apply_rotary_pos_emb is before


def test_patched_models_generate_the_same_tokens():
    family = "llama"
    model = made(family, kind="AutoModelForCausalLM", attention="sdpa").eval()
    ids = inputs(family, "whole", "cpu")["input_ids"][:, :5]
    right = model.generate(ids, max_new_tokens=8, do_sample=False)
    with tilebook.patched(model):
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), right)
