"""`attn_implementation="tilebook"`: what of a model reaches our functions, and programs around it.

On the CPU kernels do not run. `structured` lets masks with a simple structure be passed on as on a GPU, to the plain
PyTorch of the same functions.
"""

import contextlib
import copy
import math

import pytest
import torch
from programs.hf_models import MODELS, inputs, language_model, loss, made, step

import tilebook
from tilebook.huggingface import attention
from tilebook.huggingface.masks import Structure

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

tilebook.register_transformers()


@pytest.mark.usefixtures("structured")
@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("llama", "whole", {"causal": True, "attn_mask": None, "enable_gqa": True}),
        ("llama", "padded", {"causal": "bottom_right", "attn_mask": (3, 1, 1, 32)}),
        ("mistral", "whole", {"causal": "bottom_right", "window": (7, -1), "attn_mask": None}),
        ("mistral", "padded", {"causal": "bottom_right", "window": (7, -1), "attn_mask": (3, 1, 1, 32)}),
        ("gemma2", "whole", {"causal": "bottom_right", "window": (7, -1), "attn_mask": None, "softcap": 2.0}),
        ("bert", "whole", {"causal": False, "attn_mask": None, "scale": 0.25}),
        ("bert", "padded", {"causal": False, "attn_mask": (3, 1, 1, 32)}),
        ("t5", "padded", {"causal": False, "attn_mask": (3, 1, 1, 32), "bias": (1, 4, 32, 32), "scale": 1.0}),
        ("llama", "packed", {"causal": True, "window": None, "max_seqlen_q": 32}),
        ("mistral", "packed", {"causal": True, "window": (7, -1), "max_seqlen_k": 32}),
    ],
)
def test_structure_reaches_our_functions_instead_of_a_mask(name, kind, expected, called):
    made(name, attention="tilebook")(**inputs(name, kind, "cpu"))
    function, options = called[0]
    by_pytorchs_signature = kind == "whole" or not (expected["causal"] or "bias" in expected)
    by_pytorchs_signature &= "window" not in expected
    usual = "scaled_dot_product_attention" if by_pytorchs_signature else "attention"
    assert function == ("attention_varlen" if kind == "packed" else usual)
    assert {key: _shape(options[key]) for key in expected} == expected
    if name == "gemma2":
        assert called[1][1]["causal"] is True  # the next layer has no window
        assert called[1][1]["window"] is None
    if kind == "packed":
        assert options["cu_seqlens_q"].tolist() == [0, 13, 14, 32, 64, 69, 89, 96]
    if name == "mistral":  # key and value heads are not repeated
        assert options["q"].shape[-3 if kind != "packed" else 1] == 4
        assert options["k"].shape[-3 if kind != "packed" else 1] == 2


def _shape(value):
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value


def test_small_triangles_of_keys_keep_their_mask(monkeypatch):
    query = torch.randn(2, 4, 32, 16, dtype=torch.bfloat16)
    keys = torch.ones(2, 1, 1, 32, dtype=torch.bool)
    monkeypatch.setattr(attention, "way", lambda *_: "op")
    for found, own in ((Structure(True, None, keys, None), False), (Structure(True, (7, -1), keys, None), True)):
        assert attention._served(query, query, query, found) == own
    monkeypatch.setattr(attention, "BOUNDS", (1.0, 1.0))
    assert attention._served(query, query, query, Structure(True, None, keys, None))


@pytest.mark.usefixtures("structured")
def test_padding_that_hides_nothing_is_no_mask(called):
    given = inputs("mistral", "whole", "cpu")
    made("mistral", attention="tilebook")(**given, attention_mask=torch.ones_like(given["input_ids"]))
    assert called[0][1]["attn_mask"] is None


def test_on_the_cpu_masks_go_to_pytorchs_function_as_they_are(called):
    made("mistral", attention="tilebook").bfloat16()(**inputs("mistral", "padded", "cpu"))
    assert _shape(called[0][1]["attn_mask"]) == (3, 1, 32, 32)
    assert called[0][0] == "scaled_dot_product_attention"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["whole", "padded"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_models_have_one_graph_and_the_same_numbers(name, kind):
    torch._dynamo.reset()
    model = made(name, attention="sdpa", num_hidden_layers=1)
    given = inputs(name, kind, "cpu")
    right = step(model, given)
    model.set_attn_implementation("tilebook")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(**given)[0]
    found = found * given["attention_mask"][..., None] if kind == "padded" else found
    torch.testing.assert_close(found, right[0], rtol=1e-4, atol=1e-5)
    model.zero_grad(set_to_none=True)
    loss(found).backward()
    for parameter, other in zip(model.parameters(), right[1:], strict=True):
        torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("structured")
def test_a_compiled_layer_takes_masks_that_were_made_outside():
    torch._dynamo.reset()
    model = made("mistral", attention="tilebook", num_hidden_layers=1)
    given = inputs("mistral", "padded", "cpu")
    right = step(model, given)[0]
    model.layers[0].compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(model, given)[0], right, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("structured")
@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpoints_are_those_without(reentrant, kind):
    model = made("mistral", attention="tilebook").train()
    given = inputs("mistral", kind, "cpu")
    right = step(model, given)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for got, wanted in zip(step(model, given), right, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("structured")
@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
def test_inference_mode_gives_the_same(kind):
    model, given = made("mistral", attention="tilebook"), inputs("mistral", kind, "cpu")
    right = model(**given)[0].detach()
    with torch.inference_mode():
        torch.testing.assert_close(model(**given)[0], right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("described", [False, True], ids=["positions", "lengths"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packs_of_a_collator_are_attended_one_by_one(name, described, cached, called):
    model = language_model(name, "tilebook")
    texts = [{"input_ids": list(range(3, 3 + n))} for n in (9, 1, 14)]
    apart = torch.cat([model(torch.tensor([text["input_ids"]])).logits for text in texts], 1)
    collated = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=described)(texts)
    assert ("cu_seq_lens_q" in collated) == described
    called.clear()
    torch.testing.assert_close(model(**collated, use_cache=cached).logits, apart, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(**collated, use_cache=cached).logits, apart, rtol=1e-4, atol=1e-5)
    ends = [options["cu_seqlens_q"] for function, options in called if function == "attention_varlen"]
    assert all(each.tolist() == [0, 9, 10, 24] for each in ends)


@pytest.mark.parametrize("kind", ["whole", "padded"])
def test_attention_sinks_are_those_of_eager_attention(kind):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 32, "vocab_size": 99, "head_dim": 16, "sliding_window": 8, "num_local_experts": 2,
             "num_experts_per_tok": 1, "max_position_embeddings": 128,
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
    config = transformers.AutoConfig.for_model("gpt_oss", **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager", experts_implementation="eager")
    for layer in model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    given = inputs("llama", kind, "cpu")
    right = step(model, given)
    model.set_attn_implementation("tilebook")
    found = step(model, given)
    assert len(found) == len(right)
    for got, wanted in zip(found, right, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_with_attention_of_its_own_keeps_it():
    config = transformers.AutoConfig.for_model("deberta-v2", **MODELS["deberta-v2"])
    found = []
    for name in ("eager", "tilebook"):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config, attn_implementation=name).eval()
        with tilebook.enabled() if name == "tilebook" else contextlib.nullcontext():
            found.append(model(**inputs("bert", "padded", "cpu"))[0])
    assert torch.equal(*found)


def test_a_model_whose_attention_has_other_names_says_so():
    config = transformers.AutoConfig.for_model("falcon", **MODELS["falcon"])
    with pytest.raises((KeyError, ValueError), match="tilebook"):
        transformers.AutoModel.from_config(config, attn_implementation="tilebook")


def test_a_trainer_trains_with_it(tmp_path):
    pytest.importorskip("accelerate", reason="the trainer needs accelerate")
    model = made("llama", "AutoModelForCausalLM", "tilebook").train()
    before = copy.deepcopy(model.state_dict())
    data = [{"input_ids": row, "labels": row} for row in inputs("llama", "whole", "cpu")["input_ids"]]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=3,
        use_cpu=True,
        report_to=[],
        bf16=True,
        save_strategy="no",
    )
    done = transformers.Trainer(model, arguments, train_dataset=data).train()
    assert math.isfinite(done.training_loss)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
