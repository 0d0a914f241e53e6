"""`attn_implementation="tilebook"`: small models of transformers give PyTorch's numbers, and the same tokens.

On the CPU kernels do not run. `structured` lets masks with a simple structure be passed on as on a GPU, to the plain
PyTorch of the same functions.
"""

import contextlib
import copy
import functools
import math

import pytest
import torch
from programs.compare import assert_as_near
from programs.hf_models import CASES, MODELS, OWN, SOFT_CAPPED, inputs, made, plain, step, truth

import tilebook
from tilebook import dispatch
from tilebook.huggingface import attention
from tilebook.huggingface.masks import Structure

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

tilebook.register_transformers()


@functools.cache
def fresh(name):
    return made(name, attention=plain(name))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_numbers_are_pytorchs(name, kind, monkeypatch):
    given = inputs(name, kind, "cpu")
    right = truth(name, kind, "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(fresh(name)).to(dtype)
        theirs = step(model, given)
        with tilebook.enabled():
            assert_as_near(step(model, given), theirs, right, f"enabled {dtype}", blur=4.0)
        if name in OWN:
            continue
        model.set_attn_implementation("tilebook")
        for served in (False, True):
            with monkeypatch.context() as patch:
                if served:
                    patch.setattr(attention, "_served", lambda *_: True)
                ours = step(model, given)
            assert_as_near(ours, theirs, right, f"{dtype} structured={served}", blur=4.0)


@pytest.mark.sampled(4)
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has this with kernels that are compiled")
@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_numbers_are_pytorchs_by_our_kernels_in_the_interpreter(name, kind, called):
    pytest.importorskip("triton", reason="there are no kernels without Triton")
    given = inputs(name, kind, "cpu")
    model = made(name, attention=plain(name), num_hidden_layers=1)
    right = step(copy.deepcopy(model).to(torch.float32 if name in SOFT_CAPPED else torch.float64), given)
    theirs = step(model.half(), given)
    model.set_attn_implementation("tilebook")
    with dispatch.use("triton"):
        ours = step(model, given)
    mask = called[0][1].get("attn_mask")
    assert mask is None or mask.shape == (3, 1, 1, 32)
    assert_as_near(ours, theirs, right, blur=4.0)


@pytest.mark.usefixtures("structured")
@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("llama", "whole", {"causal": True, "attn_mask": None, "enable_gqa": True}),
        ("llama", "padded", {"causal": "bottom_right", "attn_mask": (3, 1, 1, 32)}),
        ("mistral", "whole", {"causal": "bottom_right", "window": (7, -1), "attn_mask": None}),
        ("mistral", "padded", {"causal": "bottom_right", "window": (7, -1), "attn_mask": (3, 1, 1, 32)}),
        ("gemma2", "whole", {"causal": "bottom_right", "window": (7, -1), "attn_mask": None, "softcap": 50.0}),
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


def _language_model(name, attention, **more):
    kind = "AutoModelForSeq2SeqLM" if name == "t5" else "AutoModelForCausalLM"
    return made(name, kind, attention, decoder_start_token_id=0, **more).eval()


def _generated(model, name, left_padded, **options):
    """Tokens, and the logits that they were chosen by."""
    given = {"input_ids": inputs(name, "whole", "cpu")["input_ids"][:, :11]}
    if left_padded:
        given["attention_mask"] = (torch.arange(11) >= torch.tensor([0, 4, 9])[:, None]).long()
    options |= {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**given, **options, output_logits=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.logits)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("left_padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "t5"])
def test_generated_tokens_are_those_of_eager_attention(name, left_padded, cache, request):
    model, generator = _language_model(name, "eager"), torch.Generator().manual_seed(1)
    with torch.no_grad():  # else what was never trained repeats one token
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    tokens, logits = _generated(model, name, left_padded, cache_implementation=cache)
    assert tokens.unique().numel() > 2
    model.set_attn_implementation("tilebook")
    for structured in (False, True):
        if structured:
            request.getfixturevalue("structured")
        ours, of_ours = _generated(model, name, left_padded, cache_implementation=cache)
        assert torch.equal(ours, tokens)
        torch.testing.assert_close(of_ours, logits, rtol=1e-3, atol=1e-4)


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
    found.float().square().mean().backward()
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
    model = _language_model(name, "tilebook")
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
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 99,
    }
    config = transformers.AutoConfig.for_model("deberta-v2", **sizes)
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
