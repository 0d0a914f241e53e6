"""Models of transformers that keep `attn_implementation="sdpa"`: while tilebook is enabled their masks are not read."""

import copy
import functools
import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from programs.compare import assert_as_near
from programs.hf_models import inputs, made, step

import tilebook
from tilebook import dispatch, enabling
from tilebook.huggingface import sdpa
from tilebook.huggingface.sdpa import noting
from tilebook.kernels import attention as package
from tilebook.kernels.attention import structure
from tilebook.kernels.varlen import packs

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import masking_utils, modeling_utils  # noqa: E402
from transformers.integrations import sdpa_attention  # noqa: E402

THEIRS = masking_utils.sdpa_mask
REGISTER = masking_utils.AttentionMaskInterface._global_mapping
ATTENTION = modeling_utils.AttentionInterface._global_mapping
WIDE = {
    "llama": {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
    "mistral": {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
    "bert": {"num_hidden_layers": 1},
    "gpt2": {"n_layer": 1, "bos_token_id": 0, "eos_token_id": 0},
}


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    enabling._state.change(whole=False, blocks=-enabling._state.blocks)
    assert REGISTER["sdpa"] is THEIRS
    assert ATTENTION["sdpa"] is sdpa_attention.sdpa_attention_forward


@pytest.fixture
def called(monkeypatch):
    """The structures that were computed, and the masks that were read."""
    found = []

    def spy(module, name):
        ours = getattr(module, name)

        def function(*args, **options):
            shown = options.get("attn_mask")
            kept = {key: options[key] for key in ("causal", "window", "max_seqlen_q") if key in options}
            found.append((name, kept | {"mask": None if shown is None else tuple(shown.shape)}))
            return ours(*args, **options)

        monkeypatch.setattr(module, name, function)

    spy(package, "attend")
    spy(packs, "attention_varlen")
    return found


@functools.cache
def fresh(name):
    return made(name, attention="sdpa", **WIDE[name])


def given(name, kind):
    if kind != "padded left":
        return inputs(name, kind, "cpu")
    found = inputs(name, "padded", "cpu")
    return found | {"attention_mask": found["attention_mask"].flip(1)}


WINDOW, KEYS = {"causal": "bottom_right", "window": (7, -1)}, (3, 1, 1, 32)
CASES = {
    ("llama", "padded"): ("attend", {"causal": "bottom_right", "window": None, "mask": KEYS}),
    ("llama", "padded left"): ("attend", {"causal": "bottom_right", "window": None, "mask": KEYS}),
    ("llama", "packed"): ("attention_varlen", {"causal": True, "window": None, "max_seqlen_q": 32, "mask": None}),
    ("bert", "padded"): ("attend", {"causal": False, "window": None, "mask": KEYS}),
    ("mistral", "whole"): ("attend", WINDOW | {"mask": None}),
    ("mistral", "padded left"): ("attend", WINDOW | {"mask": KEYS}),
    ("mistral", "packed"): (
        "attention_varlen",
        {"causal": True, "window": (7, -1), "max_seqlen_q": 32, "mask": None},
    ),
    ("gpt2", "padded"): ("attend", {"causal": "bottom_right", "window": None, "mask": KEYS}),
    ("gpt2", "padded left"): ("attend", {"causal": "bottom_right", "window": None, "mask": KEYS}),
}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_the_masks_of_a_model_show_is_computed(name, kind, called):
    right = step(copy.deepcopy(fresh(name)).double(), given(name, kind))
    model = copy.deepcopy(fresh(name)).bfloat16()
    theirs = step(model, given(name, kind))
    with tilebook.enabled(), dispatch.use("torch"):
        ours = step(model, given(name, kind))
    assert called == [CASES[name, kind]]
    assert_as_near(ours, theirs, right, blur=4.0)
    assert not structure.notes.held


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has this with kernels that are compiled")
@pytest.mark.parametrize(("name", "kind"), [("llama", "padded left"), ("mistral", "packed")])
def test_our_kernels_compute_it_in_the_interpreter(name, kind, called):
    pytest.importorskip("triton", reason="there are no kernels without Triton")
    right = step(copy.deepcopy(fresh(name)).double(), given(name, kind))
    model = copy.deepcopy(fresh(name)).half()
    theirs = step(model, given(name, kind))
    with tilebook.enabled(), dispatch.use("triton"):
        ours = step(model, given(name, kind))
    assert called == [CASES[name, kind]]
    assert_as_near(ours, theirs, right, blur=4.0)


@pytest.fixture
def copied(monkeypatch):
    """How often keys or values that heads share were copied for each of them."""
    found, theirs = [], sdpa_attention.repeat_kv

    def repeat_kv(x, groups):
        found.append(groups)
        return theirs(x, groups)

    monkeypatch.setattr(sdpa_attention, "repeat_kv", repeat_kv)
    return found


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[0] in ("llama", "mistral")])
def test_keys_that_heads_share_are_not_copied_where_the_note_serves(name, kind, called, copied):
    model = copy.deepcopy(fresh(name)).bfloat16()
    step(model, given(name, kind))
    assert copied == [2, 2]
    with tilebook.enabled(), dispatch.use("torch"):
        step(model, given(name, kind))
    assert (called, copied) == ([CASES[name, kind]], [2, 2])


@pytest.mark.parametrize(
    ("more", "copies"),
    [
        ({}, []), ({"mask": None}, []), ({"dropout": 0.5}, [2, 2]),
        ({"position_bias": torch.zeros(1, 1, 32, 32)}, [2, 2]),
    ],
)  # fmt: skip
def test_they_are_copied_where_it_does_not(more, copies, copied):
    layer = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    q, k, v = (torch.randn(1, heads, 32, 16, dtype=torch.bfloat16) for heads in (2, 1, 1))
    causal = {"mask_function": masking_utils.causal_mask_function, "allow_is_causal_skip": False}
    with tilebook.enabled(), dispatch.use("torch"):
        mask = REGISTER["sdpa"](batch_size=1, q_length=32, kv_length=32, **causal)
        o, _ = ATTENTION["sdpa"](layer, q, k, v, mask, **more)
    assert o.shape == (1, 32, 2, 16)
    assert copied == copies


def test_what_their_function_refuses_is_refused():
    def theirs(module, query, key, value, attention_mask, softcap=None, **more):  # as of transformers 5.24
        assert softcap is None, "no softcap"
        return query.transpose(1, 2), None

    q, k, v = (torch.randn(1, heads, 32, 16, dtype=torch.bfloat16) for heads in (2, 1, 1))
    causal = {"mask_function": masking_utils.causal_mask_function, "allow_is_causal_skip": False}
    with tilebook.enabled(), dispatch.use("torch"):
        mask = REGISTER["sdpa"](batch_size=1, q_length=32, kv_length=32, **causal)
        with pytest.raises(AssertionError, match="softcap"):
            noting._sharing(theirs)(None, q, k, v, mask, softcap=30.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again_give_the_same(reentrant, called):
    model, found = copy.deepcopy(fresh("llama")).bfloat16().train(), []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with tilebook.enabled(), dispatch.use("torch"):
            found.append(step(model, given("llama", "padded") | {"use_cache": False}))
    assert called == [CASES["llama", "padded"]] * 3
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_same_tokens_are_generated(cache, called):
    model = made("mistral", "AutoModelForCausalLM", "sdpa", **WIDE["mistral"]).bfloat16().eval()
    keep = torch.ones(2, 12, dtype=torch.long)
    keep[1, :5] = 0
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    asked = {"attention_mask": keep, "max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    theirs = model.generate(ids, **asked)
    with tilebook.enabled(), dispatch.use("torch"):
        ours = model.generate(ids, **asked)
    assert torch.equal(ours, theirs)
    assert called


def test_a_mask_that_a_model_writes_to_is_read(called):
    model, of = copy.deepcopy(fresh("llama")).bfloat16(), given("llama", "padded")
    attention = type(model.layers[0].self_attn).forward

    def forward(self, *args, attention_mask, **options):
        attention_mask[:, :, 20:, 3] = False
        return attention(self, *args, attention_mask=attention_mask, **options)

    model.layers[0].self_attn.forward = forward.__get__(model.layers[0].self_attn)
    theirs = step(model, of)
    with tilebook.enabled(), dispatch.use("torch"):
        ours = step(model, of)
    assert [each["mask"] for _, each in called] == [(3, 1, 32, 32)]
    assert_as_near(ours, theirs, [x.double() for x in theirs], blur=4.0)


# In transformers' registers

BEFORE = """
import tilebook
tilebook.enable()
from transformers import {first}
from transformers import masking_utils, modeling_utils
for register in (masking_utils.AttentionMaskInterface, modeling_utils.AttentionInterface):
    print(register._global_mapping["sdpa"].__code__.co_filename)
tilebook.disable()
print(masking_utils.AttentionMaskInterface._global_mapping["sdpa"] is masking_utils.sdpa_mask)
print(modeling_utils.AttentionInterface._global_mapping["sdpa"] is modeling_utils.sdpa_attention_forward)
"""


@pytest.mark.parametrize("first", ["masking_utils", "modeling_utils", "LlamaForCausalLM"])
def test_a_program_that_turns_it_on_before_it_imports_transformers_has_both_functions(first):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEFORE.format(first=first)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == [sdpa.__file__, sdpa.__file__, "True", "True"], done.stderr


def test_their_function_is_back_when_all_have_turned_it_off():
    for order in itertools.permutations(range(3)):
        handles = [enabling.Handle() for _ in range(3)]
        ours = REGISTER["sdpa"]
        for which in order:
            assert REGISTER["sdpa"] is ours is not THEIRS
            handles[which].remove()
        assert REGISTER["sdpa"] is THEIRS
    for _ in range(2):
        tilebook.enable()
        assert REGISTER["sdpa"] is ours
    with tilebook.enabled():
        tilebook.disable()
        assert REGISTER["sdpa"] is ours
    assert REGISTER["sdpa"] is THEIRS
    assert masking_utils.sdpa_mask is THEIRS


def test_a_function_of_somebody_else_keeps_its_place(monkeypatch):
    def other(*args, **options):
        return THEIRS(*args, **options)

    with monkeypatch.context() as patch:
        patch.setitem(REGISTER, "sdpa", other)
        with tilebook.enabled():
            assert REGISTER["sdpa"] is other
        assert REGISTER["sdpa"] is other
    with tilebook.enabled():
        ours = REGISTER["sdpa"]
        REGISTER["sdpa"] = other
    assert REGISTER["sdpa"] is other
    REGISTER["sdpa"] = THEIRS
    # Who has kept ours has theirs.
    with dispatch.use("torch"):
        causal = {"mask_function": masking_utils.causal_mask_function, "allow_is_causal_skip": False}
        mask = ours(batch_size=1, q_length=4, kv_length=4, **causal)
    assert torch.equal(mask[0, 0], torch.ones(4, 4, dtype=torch.bool).tril())
    assert structure.notes.of(mask) is None


def test_nothing_is_noted_of_an_older_version(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.16.3")
    noting.turn(True)
    assert REGISTER["sdpa"] is THEIRS
    noting.turn(False)


@pytest.mark.parametrize(("n", "expected"), [(256, False), (512, True)])
def test_small_masks_are_not_noted(n, expected, monkeypatch):
    config, x = copy.deepcopy(fresh("llama").config), torch.zeros(1, n, 64)
    keep = torch.ones(1, n, dtype=torch.long)
    keep[0, 0] = 0
    with tilebook.enabled():
        assert structure.notes.of(masking_utils.create_causal_mask(config, x, keep, None)) is None
        monkeypatch.setattr(sdpa, "capturing", lambda x: False)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
        mask = masking_utils.create_causal_mask(config, x, keep, None)
        assert (structure.notes.of(mask) is not None) == expected


def test_masks_are_made_in_compiled_programs_as_ever():
    config = copy.deepcopy(fresh("llama").config)
    keep = given("llama", "padded")["attention_mask"]

    def program(x):
        return masking_utils.create_causal_mask(config, x, keep, None) * 1

    with tilebook.enabled(), dispatch.use("torch"):
        compiled = torch.compile(program, backend="eager", fullgraph=True)
        assert torch.equal(compiled(torch.zeros(3, 32, 64)), program(torch.zeros(3, 32, 64)))
        compiled(torch.zeros(3, 32, 64))
    assert not structure.notes.held
