"""Language models of transformers whose loss is made without logits: the same numbers, or left as they are."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn

import tilebook
from tilebook import dispatch
from tilebook.kernels import linear_cross_entropy as family

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 16},
    "gemma2, capped": {"head_dim": 16, "final_logit_softcapping": 2.0},
    "gpt2": {"n_embd": 64, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "mixtral": {"num_local_experts": 2, "output_router_logits": True},
    "gpt_neox": {},
    "phi": {},
}
WHAT = "tilebook.linear_cross_entropy"


def made(name="llama", dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name.split(",")[0], **SIZES | MODELS[name])
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).train()


def batch(labels=True):
    ids = torch.arange(24).view(2, 12) + 3
    return {"input_ids": ids, "labels": ids.masked_fill(ids % 7 == 0, -100)} if labels else {"input_ids": ids}


def step(model, **more):
    model.zero_grad()
    out = model(**batch(), **more)
    out[0].backward()
    return [out[0].detach(), *[p.grad for p in model.parameters() if p.grad is not None]]


def same(found, right, **how):
    for mine, wanted in zip(found, right, strict=True):
        assert mine.dtype == wanted.dtype
        torch.testing.assert_close(mine, wanted, **how)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_same_without_logits(name):
    model = made(name)
    right, whole = step(model), model(**batch()).logits
    model.zero_grad()
    with tilebook.patched(model, loss_head=True) as report:
        assert report.changed[""] == WHAT, str(report)
        out = model(**batch())
        assert out.logits is None
        assert "logits" not in out
        assert out.past_key_values is not None
        assert ("aux_loss" in out) == (name == "mixtral")
        same(step(model), right, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch()).logits, whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(**batch(labels=False)).logits, whole, rtol=1e-4, atol=1e-5)
        out = model.eval()(**batch())
        torch.testing.assert_close(out.logits, whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.loss.detach(), right[0])
    assert model.train()(**batch()).logits is not None
    assert not any({"forward", "_loss_function"} & set(each.__dict__) for each in model.modules())


def test_whoever_looks_for_the_loss_has_transformers_say_nothing(monkeypatch):
    said = []
    monkeypatch.setattr(transformers.modeling_utils.logger, "warning_once", said.append)
    tilebook.patch(made(), loss_head=True)
    assert not said


def test_it_is_asked_for():
    model = made()
    assert "" not in tilebook.patch(model).changed
    assert model(**batch()).logits is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")
def test_it_runs_our_chunks(monkeypatch):
    model, called, through = made(), [], family.chunked
    right = step(model)
    monkeypatch.setattr(family, "chunked", lambda *args: called.append(args) or through(*args))
    with tilebook.patched(model, loss_head=True), dispatch.use("torch"):
        same(step(model), right, rtol=1e-4, atol=1e-6)
    assert called


def test_losses_of_16_bits_stay_fp32():
    model = made(dtype=torch.bfloat16)
    right = step(model)
    with tilebook.patched(model, loss_head=True):
        same(step(model), right, rtol=0.03, atol=1e-3)


@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=["number", "tensor"])
def test_what_a_trainer_passes_on_counts(items):
    model = made()
    shifted = torch.roll(batch()["labels"], 2, 1)
    for more in ({"num_items_in_batch": items}, {"shift_labels": shifted}):
        right = step(model, **more)
        with tilebook.patched(model, loss_head=True):
            same(step(model, **more), right, rtol=1e-4, atol=1e-6)


def test_a_tuple_has_none_in_the_place_of_logits():
    model = made()
    right = model(**batch(), return_dict=False)
    with tilebook.patched(model, loss_head=True):
        found = model(**batch(), return_dict=False)
    assert len(found) == len(right)
    assert found[1] is None
    torch.testing.assert_close(found[0], right[0])


def listened(model):
    model.lm_head.register_forward_hook(lambda *_: None)


def of_another_loss(model):
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.mean()


def with_another_layer(model):
    model.lm_head = nn.Sequential(model.lm_head)


def with_another_forward(model):
    model.lm_head.forward = partial(nn.Linear.forward, model.lm_head)


CHANGES = [listened, of_another_loss, with_another_layer, with_another_forward]


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_before_is_left_and_what_is_changed_later_is_called(change):
    model = made()
    change(model)
    report = tilebook.patch(model, loss_head=True)
    assert "" in report.left
    right = model(**batch())
    later = made()
    tilebook.patch(later, loss_head=True)
    change(later)
    found = later(**batch())
    torch.testing.assert_close(found.loss, right.loss)
    torch.testing.assert_close(found.logits, right.logits)


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_another_soft_cap_that_is_set_later_is_computed(softcap):
    model = made("gemma2, capped")
    with tilebook.patched(model, loss_head=True) as report:
        assert report.changed[""] == WHAT
        model.config.final_logit_softcapping = softcap
        found = model(**batch())
    right = model(**batch())
    assert torch.equal(found.loss, right.loss)
    assert torch.equal(found.logits, right.logits)


def test_what_lies_between_the_last_layer_and_the_loss_is_found_out():
    config = transformers.AutoConfig.for_model("granite", **SIZES, logits_scaling=3.0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert "computes something else" in tilebook.patch(model, loss_head=True).left[""]
    others = transformers.AutoModelForSequenceClassification.from_config(made().config), nn.Linear(3, 4)
    for other in others:
        report = tilebook.patch(other, loss_head=True)
        assert "" not in report.changed
        assert "no head of a language model" in report.left[""]


@pytest.mark.long
def test_compiled_it_is_the_same():
    torch._dynamo.reset()
    model = made()
    right = step(model)
    with tilebook.patched(model, loss_head=True):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        out = compiled(**batch())
        assert out.logits is None
        model.zero_grad()
        out.loss.backward()
        same(
            [out.loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]],
            right,
            rtol=1e-4,
            atol=1e-6,
        )


def test_changed_models_are_copied_and_stored():
    model = made()
    tilebook.patch(model, loss_head=True)
    right, file = step(model), io.BytesIO()
    twin = copy.deepcopy(model)
    same(step(twin), right)
    nn.init.zeros_(twin.lm_head.weight)
    assert abs(step(twin)[0].item() - torch.tensor(99.0).log().item()) < 1e-5, "the copy has the copy's parameters"
    if hasattr(model.model.layers[0].self_attn, "_kernel_funcs"):
        pytest.skip("models as `kernels` leaves them cannot be stored")
    torch.save(model, file)
    file.seek(0)
    same(step(torch.load(file, weights_only=False)), right)


def test_what_wraps_a_changed_model_goes_on_when_it_is_changed_back():
    model = made()
    right = model(**batch())
    report, ours = tilebook.patch(model, loss_head=True), model.forward
    model.forward = lambda **given: ours(**given)
    assert model(**batch()).logits is None
    report.undo()
    found = model(**batch())
    torch.testing.assert_close(found.loss, right.loss)
    torch.testing.assert_close(found.logits, right.logits)


def test_a_call_that_fails_leaves_no_trace():
    model = made()
    tilebook.patch(model, loss_head=True)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[999]]), labels=torch.tensor([[1]]))
    assert model.lm_head(torch.zeros(2, 64)).shape == (2, 99)
    assert model(**batch(labels=False)).logits.shape == (2, 12, 99)


def test_a_model_that_has_no_head_is_told_so_where_a_head_is_asked_for():
    bare = torch.nn.Sequential(torch.nn.Linear(8, 8))
    report = tilebook.patch(bare, loss_head=True)
    assert "no head of a language model" in report.left[""]
    assert "no head of a language model" in str(report)
    assert dict(tilebook.patch(bare).left) == {}
