"""Models of transformers that are patched by themselves."""

import copy
import gc
import logging
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

import tilebook
from tilebook import autoload, every_model
from tilebook.every_model import _first_call

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _as_it_was():
    made = transformers.PreTrainedModel.post_init
    yield
    tilebook.disable()
    transformers.PreTrainedModel.post_init = made


def llama(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**{**sizes, "intermediate_size": 64, "vocab_size": 99, **changes})
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def step(model):
    ids = torch.arange(2 * 7).view(2, 7)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def changed(model):
    return sum("forward" in each.__dict__ for each in model.modules())


def waiting(model):
    return sum(_first_call in each._forward_pre_hooks.values() for each in model.modules())


def test_a_model_is_patched_when_it_is_first_called():
    right = step(llama())
    tilebook.enable(patch=True)
    model = llama()
    assert (changed(model), tilebook.status().patched) == (0, 0)
    assert waiting(model) == 2  # the model and its trunk
    found = step(model)
    assert changed(model) == 9
    assert waiting(model) == 0
    assert tilebook.status().patched == 1
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-5)
    step(model)
    assert changed(model) == 9


def test_disable_makes_all_of_them_what_they_were():
    tilebook.enable(patch=True)
    one, other, waits = llama(), llama(), llama()
    step(one)
    step(other)
    tilebook.disable()
    assert [changed(each) for each in (one, other)] == [0, 0]
    assert tilebook.status().patched == 0
    step(waits)
    step(llama())
    assert changed(waits) == waiting(waits) == 0
    tilebook.enable()  # without patch
    assert waiting(llama()) == 0
    tilebook.enable(patch=True)
    model = llama()
    step(model)
    assert changed(model) == 9


def test_copies_of_what_was_patched_are_what_they_were_too():
    tilebook.enable(patch=True)
    model = llama()
    step(model)
    twin = copy.deepcopy(model)
    stored = None if hasattr(model.model.layers[0].self_attn, "_kernel_funcs") else pickle.loads(pickle.dumps(model))
    asked = llama()
    report = tilebook.patch(asked)
    copies = [each for each in (twin, stored) if each is not None]
    assert [changed(each) for each in copies] == [9] * len(copies)
    twin.model.norm.forward = later = lambda x: x
    tilebook.disable()
    assert [changed(each) for each in copies] == [1, 0][: len(copies)]
    assert twin.model.norm.forward is later
    assert changed(copy.deepcopy(asked)) == changed(asked) == 9, "who has asked for it undoes it"
    report.undo()


def test_models_made_before_and_blocks_are_left_alone():
    model = llama()
    tilebook.enable(patch=True)
    step(model)
    assert changed(model) == 0
    tilebook.disable()
    with tilebook.enabled():
        assert waiting(llama()) == 0


def test_copies_and_stored_models_are_patched_too(tmp_path):
    tilebook.enable(patch=True)
    model = copy.deepcopy(llama())
    llama().save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    models = [model, loaded]
    if not hasattr(model.model.layers[0].self_attn, "_kernel_funcs"):  # which `kernels` leaves, and nobody can store
        torch.save(llama(), tmp_path / "whole.pt")
        models.append(torch.load(tmp_path / "whole.pt", weights_only=False))
    for each in models:
        step(each)
        assert (changed(each), waiting(each)) == (9, 0)


def test_a_first_call_that_is_captured_or_transformed_is_the_models_own(monkeypatch):
    tilebook.enable(patch=True)
    model = llama()
    with monkeypatch.context() as patch:
        for name in ("is_initialized", "is_current_stream_capturing"):
            patch.setattr(torch.cuda, name, lambda: True)
        step(model)
    assert changed(model) == 0 < waiting(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch._C._functorch, "peek_interpreter_stack", lambda: "one of them")
        step(model)
    assert changed(model) == 0 < waiting(model)
    step(model)
    assert (changed(model), waiting(model)) == (9, 0)


def test_what_is_compiled_runs_as_it_is():
    tilebook.enable(patch=True)
    model = llama()
    torch.compiler.reset()
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        torch.compile(model, backend="eager")(ids)
    assert changed(model) == 0
    assert waiting(model) == 2


def test_a_model_that_cannot_be_patched_runs_with_one_warning(monkeypatch):
    def broken(model):
        raise KeyError("a module of tomorrow")

    monkeypatch.setattr(every_model, "patch", broken)
    tilebook.enable(patch=True)
    model = llama()
    with pytest.warns(RuntimeWarning, match="LlamaForCausalLM is not patched: KeyError"):
        step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        step(model)


def test_models_end_when_nobody_has_them_and_what_was_changed_is_logged(caplog):
    tilebook.enable(patch=True)
    model = llama()
    with caplog.at_level(logging.INFO, "tilebook"):
        step(model)
    assert "LlamaForCausalLM: changed:" in caplog.text
    assert "tilebook.rms_norm: 5" in caplog.text
    del model
    gc.collect()
    assert tilebook.status().patched == 0


def test_watching_twice_is_watching_once():
    every_model.watch()
    once = transformers.PreTrainedModel.post_init
    every_model.watch()
    assert transformers.PreTrainedModel.post_init is once


PROGRAM = """
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
import sys
sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99)
for model in (LlamaForCausalLM(LlamaConfig(**sizes)), BertForSequenceClassification(BertConfig(**sizes))):
    model(torch.ones(1, 5, dtype=torch.long))
    print(sum("forward" in each.__dict__ for each in model.modules()), end=" ")
"""


@pytest.mark.usefixtures("forked")
@pytest.mark.sampled(2)
@pytest.mark.parametrize(("asked", "printed"), [("patch", "5 0"), ("1", "0 0")])
def test_the_environment_asks_for_it(asked, printed):
    given = {name: value for name, value in os.environ.items() if not name.startswith("TILEBOOK")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**given, autoload.ASKED: asked},
        check=True,
    )
    assert done.stdout.strip() == printed
