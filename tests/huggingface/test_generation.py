"""Text that models on tilebook generate, by the ways of transformers' `generate`: the tokens of plain transformers."""

import contextlib
import copy
import functools

import pytest
import torch
from programs.hf_models import generated, language_model, plain
from torch import nn

import tilebook
from tilebook import dispatch

transformers = pytest.importorskip("transformers")


@functools.cache
def fresh(name):
    return language_model(name, plain(name))


@contextlib.contextmanager
def on(model):
    """Enabled and patched, by the plain PyTorch of our functions, which are called as on a GPU."""
    with tilebook.enabled(), tilebook.patched(model) as report, dispatch.use("torch"):
        assert report.changed or type(model).__name__.startswith(("Bart", "GPT2"))
        yield


def prompts(rows=3):
    ids = torch.randint(3, 99, (3, 12), generator=torch.Generator().manual_seed(0))[:rows]
    return {"input_ids": ids, "attention_mask": (torch.arange(12) >= torch.tensor([0, 4, 10])[:rows, None]).long()}


def by(rows=3, seed=0, **options):
    def found(model):
        torch.manual_seed(seed)
        given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "disable_compile": True, **options}
        return model.generate(**prompts(rows), **given)

    return found


def assisted(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for each in other.parameters():
            each.mul_(1.02)
    return by(rows=1, assistant_model=other)(model)


def compiled(model):
    torch._dynamo.reset()
    how = transformers.CompileConfig(backend="eager", mode=None)
    how._compile_all_devices = True
    return by(cache_implementation="static", disable_compile=False, compile_config=how)(model)


WAYS = {
    "beams": by(num_beams=3, num_return_sequences=2),
    "samples": by(do_sample=True, top_k=20, num_return_sequences=2),
    "without a cache": by(use_cache=False),
    "prompts in chunks": by(prefill_chunk_size=5),
    "tokens of the prompt": by(rows=1, prompt_lookup_num_tokens=3),
    "an assistant's": assisted,
    "compiled": compiled,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "t5"])
def test_tokens_are_plain_transformers(name, way):
    if name == "t5" and way == "prompts in chunks":
        pytest.skip("what is in chunks is a decoder's prompt")
    model = copy.deepcopy(fresh(name))
    right = WAYS[way](model)
    with on(model):
        assert torch.equal(WAYS[way](model), right)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_it_may_be_turned_on_and_off_between_tokens_of_one_cache(name):
    def tokens(around):
        model, found = copy.deepcopy(fresh(name)), []
        cache, given = transformers.DynamicCache(config=model.config), prompts()
        for step in range(8):
            with torch.no_grad(), around(model, step):
                logits = model(**given, past_key_values=cache, use_cache=True).logits[:, -1]
            found.append(logits.argmax(-1))
            seen = torch.cat([given["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
            given = {"input_ids": found[-1][:, None], "attention_mask": seen}
        return torch.stack(found)

    right = tokens(lambda model, step: contextlib.nullcontext())
    assert torch.equal(tokens(lambda model, step: on(model) if step % 2 else contextlib.nullcontext()), right)


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 4), nn.Linear(4, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_layers_that_are_wrapped_after_the_change_are_called():
    model = copy.deepcopy(fresh("llama"))
    wrapped = copy.deepcopy(model)
    with on(model):
        for each in (model, wrapped):
            torch.manual_seed(1)
            for module in list(each.model.modules()):
                for name, layer in list(module.named_children()):
                    if type(layer) is nn.Linear and not isinstance(module, Lora):
                        setattr(module, name, Lora(layer))
        found = by()(model)
    assert torch.equal(found, by()(wrapped))


def test_a_t5_that_is_loaded_in_fp16_runs_as_its_layers_of_two_dtypes_do(tmp_path):
    model = copy.deepcopy(fresh("t5"))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float16).eval()
    assert {each.dtype for each in loaded.parameters()} == {torch.float16, torch.float32}
    right, scores = generated(loaded, "t5", max_new_tokens=4, min_new_tokens=4)
    with on(loaded):
        found, ours = generated(loaded, "t5", max_new_tokens=4, min_new_tokens=4)
    assert torch.equal(found, right)
    seen = scores.isfinite()
    torch.testing.assert_close(ours[seen], scores[seen], rtol=0, atol=0.05 * scores[seen].std().item())
