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
from programs.hf_models import CASES, MODELS, OWN, inputs, made, plain, step, truth

import tilebook

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import masking_utils  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402

from tilebook import huggingface  # noqa: E402

tilebook.register_transformers()


@pytest.fixture
def structured(monkeypatch):
    monkeypatch.setattr(huggingface, "_served", lambda *_: True)


@pytest.fixture
def called(monkeypatch):
    """The options of each call of our functions, and the tensors by name."""
    calls = []

    def spy(name, *names):
        ours = getattr(huggingface, name)

        def function(*tensors, **options):
            calls.append((name, dict(zip(names, tensors, strict=True)) | options))
            return ours(*tensors, **options)

        monkeypatch.setattr(huggingface, name, function)

    spy("attention", "q", "k", "v")
    spy("scaled_dot_product_attention", "q", "k", "v", "attn_mask", "dropout_p", "causal")
    spy("attention_varlen", "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    return calls


@functools.cache
def fresh(name):
    return made(name, attention=plain(name))


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
                    patch.setattr(huggingface, "_served", lambda *_: True)
                ours = step(model, given)
            assert_as_near(ours, theirs, right, f"{dtype} structured={served}", blur=4.0)


@pytest.mark.usefixtures("structured")
@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("llama", "whole", {"causal": True, "attn_mask": None, "enable_gqa": True}),
        ("llama", "padded", {"causal": "bottom_right", "window": None, "attn_mask": (3, 1, 1, 32)}),
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
    by_pytorchs_signature = kind != "packed" and "window" not in expected and "bias" not in expected
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


@pytest.mark.usefixtures("structured")
def test_padding_that_hides_nothing_is_no_mask(called):
    given = inputs("mistral", "whole", "cpu")
    made("mistral", attention="tilebook")(**given, attention_mask=torch.ones_like(given["input_ids"]))
    assert called[0][1]["attn_mask"] is None


def test_on_the_cpu_masks_go_to_pytorchs_function_as_they_are(called):
    made("mistral", attention="tilebook").bfloat16()(**inputs("mistral", "padded", "cpu"))
    assert _shape(called[0][1]["attn_mask"]) == (3, 1, 32, 32)
    assert called[0][0] == "scaled_dot_product_attention"


def _noted(mask):
    return getattr(mask, huggingface._NOTE, None)


def _spelled_out(found, batch, n_q, n_k):
    """The mask that a structure stands for, by the documented meaning of `tilebook.attention`'s arguments."""
    rows, columns = torch.arange(n_q)[:, None], torch.arange(n_k)
    if found.causal != "top_left":
        rows = rows + n_k - n_q
    seen = torch.ones(batch, 1, n_q, n_k, dtype=torch.bool)
    if found.causal:
        seen &= columns <= rows
    left, right = found.window or (-1, -1)
    if left >= 0:
        seen &= columns >= rows - left
    if right >= 0:
        seen &= columns <= rows + right
    if found.keys is not None:
        seen &= found.keys
    if found.packs is not None:
        seen &= (found.packs[:, :, None] == found.packs[:, None])[:, None]
    return seen


def _config(**more):
    config = transformers.AutoConfig.for_model("llama", **MODELS["llama"])
    config._attn_implementation = "tilebook"
    for key, value in more.items():
        setattr(config, key, value)
    return config


def _after(n, layer="full"):
    """A cache that has seen n tokens."""
    config = None if layer == "full" else transformers.AutoConfig.for_model("mistral", **MODELS["mistral"])
    cache = DynamicCache(config=config)
    if n:
        cache.update(torch.zeros(3, 2, n, 16), torch.zeros(3, 2, n, 16), 0)
    return cache


PADDINGS = {
    "none": lambda n: None,
    "ones": lambda n: torch.ones(3, n, dtype=torch.long),
    "right": lambda n: (torch.arange(n) < torch.tensor([n, n - 3, 4])[:, None]).long(),
    "left": lambda n: (torch.arange(n) >= torch.tensor([0, 3, n - 1])[:, None]).long(),
    "holes": lambda n: (torch.arange(n) % torch.tensor([99, 2, 3])[:, None] != 1).long(),
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("create", "seen", "rows", "noted"),
    [
        ("create_causal_mask", 0, 24, True),
        ("create_causal_mask", 9, 5, True),
        ("create_causal_mask", 9, 1, True),
        ("create_bidirectional_mask", 0, 24, True),
        ("create_sliding_window_causal_mask", 0, 24, True),
        ("create_sliding_window_causal_mask", 20, 5, True),
        ("create_sliding_window_causal_mask", 20, 1, True),
        ("create_bidirectional_sliding_window_mask", 0, 24, True),
        ("create_chunked_causal_mask", 0, 24, False),
    ],
)
def test_a_note_says_what_the_mask_shows(create, seen, rows, noted, padding):
    sliding = "sliding" in create
    config = _config(sliding_window=8, attention_chunk_size=8)
    cache = _after(seen, "sliding" if sliding else "full") if seen else None
    given = PADDINGS[padding](seen + rows)
    others = () if "bidirectional" in create else (cache,)
    mask = getattr(masking_utils, create)(config, torch.zeros(3, rows, 64), given, *others)
    config._attn_implementation = "eager"
    right = getattr(masking_utils, create)(config, torch.zeros(3, rows, 64), given, *others)
    if mask is None:
        n_k = seen + rows
        full = "bidirectional" in create or rows == 1
        expected = torch.ones(rows, n_k, dtype=torch.bool) if full else torch.ones(rows, n_k, dtype=torch.bool).tril()
        assert right is None or torch.equal(right[0, 0] == 0, expected)
        return
    assert mask.dtype == torch.bool
    assert torch.equal(mask, right == 0)
    found = _noted(mask)
    assert (found is not None) == noted
    if found is not None:
        assert torch.equal(_spelled_out(found, *mask.shape[:1], *mask.shape[2:]), mask)


@pytest.mark.usefixtures("structured")
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("rows", [1, 5, 24])
@pytest.mark.parametrize("columns", [5, 24, 30])
@pytest.mark.parametrize("which", ["causal", "left", "both"])
def test_notes_hold_wherever_rows_and_columns_begin(which, rows, columns, padding, called):
    function = {
        "causal": masking_utils.causal_mask_function,
        "left": masking_utils.sliding_window_causal_mask_function(8),
        "both": masking_utils.sliding_window_bidirectional_mask_function(8),
    }[which]
    noted, tensors, keep = 0, _tensors(rows, columns, batch=3), PADDINGS[padding](columns + 2)
    for q_offset in (0, 2, 4, 6, 19, 25, 29):
        for kv_offset in (0, 4):
            given = {"q_length": rows, "kv_length": columns, "q_offset": q_offset, "kv_offset": kv_offset}
            given |= {"mask_function": function, "attention_mask": keep if keep is None else keep.bool()}
            mask = huggingface.attention_mask(batch_size=3, allow_is_causal_skip=False, **given)
            found = _noted(mask)
            if found is not None:
                noted += 1
                assert torch.equal(_spelled_out(found, 3, rows, columns), mask)
                got, _ = huggingface.attention_forward(torch.nn.Module(), *tensors, mask)
                torch.testing.assert_close(got.double(), _reference(*tensors, mask), rtol=1e-4, atol=1e-5)
    pytorchs = [options for function, options in called if function == "scaled_dot_product_attention"]
    assert not [each for each in pytorchs if each["causal"] and each["attn_mask"] is not None]  # which it refuses
    assert noted or columns < rows or columns - rows not in (0, 4, 19, 25, 29)


def test_notes_are_only_on_masks_of_known_parts():
    config, x = _config(), torch.zeros(3, 24, 64)
    positions = inputs("llama", "packed", "cpu")["position_ids"][:, :24]
    packed = masking_utils.create_causal_mask(config, x, None, None, position_ids=positions)
    assert torch.equal(_spelled_out(_noted(packed), 3, 24, 24), packed)
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # of other positions than the packs
        remapped = masking_utils.remap_positions_for_packed_sequence(
            masking_utils.causal_mask_function, positions.flip(1)
        )
        packs = masking_utils.packed_sequence_mask_function(huggingface._packs(positions))
        for function in (remapped, masking_utils.and_masks(remapped, packs)):
            assert huggingface._described(24, 24, mask_function=function) is None

    def every_third(batch, head, row, column):
        return column % 3 == 0

    for which in ("or_mask_function", "and_mask_function"):
        assert _noted(masking_utils.create_causal_mask(config, x, None, None, **{which: every_third})) is None
    known = {"q_length": 24, "kv_length": 24, "mask_function": masking_utils.causal_mask_function}
    assert huggingface._described(**known) is not None
    assert huggingface._described(**known, attention_mask=torch.ones(3, 24, 24)) is None
    assert huggingface._described(**known, q_offset=torch.zeros((), dtype=torch.long)) is None
    blocks = torch.zeros(3, 24, dtype=torch.long)
    assert _noted(masking_utils.create_causal_mask(config, x, None, None, block_sequence_ids=blocks)) is None


@pytest.mark.usefixtures("structured")
@pytest.mark.parametrize("change", ["in place", "in another tensor", "none"])
def test_a_mask_that_a_model_has_changed_is_taken_as_it_is(change, called):
    keep = PADDINGS["right"](24)  # which makes the mask a tensor of its own
    mask = masking_utils.create_sliding_window_causal_mask(
        _config(sliding_window=8), torch.zeros(3, 24, 64), keep, None
    )
    assert _noted(mask) is not None
    if change == "in place":
        mask[:, :, 5:, 4] = False
    elif change == "in another tensor":
        mask = mask & (torch.arange(24) != 4)
    q, k, v = (torch.randn(3, 4, 24, 16) for _ in range(3))
    got, _ = huggingface.attention_forward(torch.nn.Module(), q, k, v, mask)
    torch.testing.assert_close(got.double(), _reference(q, k, v, mask), rtol=1e-4, atol=1e-5)
    assert (called[0][1]["attn_mask"] is mask) == (change != "none")


def _reference(q, k, v, seen, *, scale=None, softcap=0.0, bias=None, sinks=None):
    """Spelled out in fp64: (B, Sq, H, Dv)."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if bias is None else scores + bias.double()
    scores = scores.masked_fill(~seen, -math.inf)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    if sinks is not None:
        more = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return (torch.softmax(torch.cat([scores, more], -1), -1)[..., :-1] @ v).transpose(1, 2)
    return (torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0) @ v).transpose(1, 2)


def _tensors(n_q=12, n_k=12, heads=(4, 2), width=16, v_width=None, batch=2):
    torch.manual_seed(0)
    shapes = (heads[0], n_q, width), (heads[1], n_k, width), (heads[1], n_k, v_width or width)
    return [torch.randn(batch, *shape).requires_grad_() for shape in shapes]


def _tril(n_q, n_k):
    return torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)


def _most_negative(seen):
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def _blind(seen):
    """With a row that sees nothing."""
    return _most_negative(seen).index_fill(0, torch.tensor(2), torch.finfo(torch.float32).min)


BLIND = _tril(5, 12).index_fill(0, torch.tensor(2), False)

FORMS = {
    "causal": ({}, {}, lambda n: None, _tril(12, 12)),
    "full": ({}, {"is_causal": False}, lambda n: None, torch.ones(12, 12, dtype=torch.bool)),
    "one row": ({"n_q": 1}, {}, lambda n: None, torch.ones(1, 12, dtype=torch.bool)),
    "static cache": ({"n_q": 5}, {}, lambda n: None, torch.ones(5, 12, dtype=torch.bool).tril()),
    "boolean mask": ({"n_q": 5}, {}, lambda n: n, _tril(5, 12)),
    "mask of most negative numbers": ({"n_q": 5}, {}, _most_negative, _tril(5, 12)),
    "a row of most negative numbers alone": ({"n_q": 5}, {}, _blind, BLIND),
    "scale and soft-cap": ({}, {"scaling": 0.3, "softcap": 2.0}, lambda n: n, _tril(12, 12)),
    "soft-cap of causal": ({}, {"softcap": 2.0}, lambda n: None, _tril(12, 12)),
    "other values' width": ({"v_width": 8}, {}, lambda n: None, _tril(12, 12)),
    "other values' width, mask": ({"v_width": 8}, {}, lambda n: n, _tril(12, 12)),
    "other values' width, soft-cap": ({"v_width": 24}, {"softcap": 2.0}, lambda n: n, _tril(12, 12)),
    "sinks": ({}, {"s_aux": 4}, lambda n: None, _tril(12, 12)),
    "sinks, mask": ({"n_q": 5}, {"s_aux": 4}, lambda n: n, _tril(5, 12)),
    "sinks, most negative numbers": ({"n_q": 5}, {"s_aux": 4}, _most_negative, _tril(5, 12)),
    "sinks, other width": ({"v_width": 8}, {"s_aux": 4}, lambda n: n, _tril(12, 12)),
    "bias": ({}, {"position_bias": (1, 4, 12, 12), "is_causal": False}, lambda n: None, torch.ones(12, 12).bool()),
    "bias, causal": ({}, {"position_bias": (1, 4, 12, 12)}, lambda n: None, _tril(12, 12)),
    "bias, static cache": (
        {"n_q": 5},
        {"position_bias": (1, 4, 5, 12)},
        lambda n: None,
        torch.ones(5, 12).bool().tril(),
    ),
    "bias, mask": ({}, {"position_bias": (2, 4, 12, 12)}, lambda n: n, _tril(12, 12)),
    "bias, sinks": ({}, {"position_bias": (1, 4, 12, 12), "s_aux": 4}, lambda n: n, _tril(12, 12)),
}


@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_of_every_form_are_what_is_spelled_out(form):
    sizes, options, masked, seen = FORMS[form]
    options = dict(options)
    tensors = _tensors(**sizes)
    for name in ("s_aux", "position_bias"):
        if name in options:
            options[name] = torch.randn(options[name]).requires_grad_()
    wanted = [*tensors, *[options[name] for name in ("s_aux", "position_bias") if name in options]]
    mask = masked(seen)
    mask = mask if mask is None else mask.expand(2, 1, *mask.shape)
    got, weights = huggingface.attention_forward(torch.nn.Module(), *tensors, mask, **options)
    assert weights is None
    assert got.is_contiguous()
    renamed = {"scaling": "scale", "position_bias": "bias", "s_aux": "sinks", "softcap": "softcap"}
    more = {renamed[key]: value for key, value in options.items() if key in renamed}
    right = _reference(*tensors, seen, **more)
    torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-5)
    direction = torch.randn(right.shape)
    ours = torch.autograd.grad(got, wanted, direction)
    for mine, other in zip(ours, torch.autograd.grad(right, wanted, direction.double()), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


PACKS = {
    "of the same lengths": ([0, 3, 4, 12], [0, 3, 4, 12], True),
    "that see everything": ([0, 3, 4, 12], [0, 3, 4, 12], False),
    "with caches": ([0, 1, 3, 4], [0, 5, 9, 14], True),
    "with tokens behind the last": ([0, 3, 8], [0, 3, 8], True),
}


@pytest.mark.parametrize(
    ("dropout", "softcap", "expected"),
    [
        (0.0, 0.0, "attention_varlen"),
        (0.0, 2.0, "attention_varlen"),
        (1e-9, 0.0, "scaled_dot_product_attention"),
        (1e-9, 2.0, "attention"),
    ],
)
@pytest.mark.parametrize("packs", PACKS)
def test_described_packs_are_attended_one_by_one(packs, dropout, softcap, expected, called):
    ends_q, ends_k, causal = PACKS[packs]
    n_q, n_k = (12, 12) if "behind" in packs else (ends_q[-1], ends_k[-1])
    q, k, v = _tensors(n_q, n_k, batch=1)
    got, _ = huggingface.attention_forward(
        torch.nn.Module(), q, k, v, None, dropout=dropout, is_causal=causal, softcap=softcap,
        cu_seq_lens_q=torch.tensor(ends_q), cu_seq_lens_k=torch.tensor(ends_k),
        max_length_q=12, max_length_k=torch.tensor(12),
    )  # fmt: skip
    assert called[0][0] == expected
    seen = torch.zeros(n_q, n_k, dtype=torch.bool)
    for first, last, start, end in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        block = _tril(last - first, end - start) if causal else torch.ones(last - first, end - start).bool()
        seen[first:last, start:end] = block
    torch.testing.assert_close(got.double(), _reference(q, k, v, seen, softcap=softcap), rtol=1e-4, atol=1e-5)


def test_described_packs_hold_beside_a_mask_too():
    q, k, v = _tensors(batch=1)
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
    seen = _tril(12, 12)
    blocks = seen.clone()
    blocks[5:, :5] = False
    for mask in (seen[None, None], _most_negative(seen)[None, None]):
        got, _ = huggingface.attention_forward(torch.nn.Module(), q, k, v, mask, **given)
        torch.testing.assert_close(got.double(), _reference(q, k, v, blocks), rtol=1e-4, atol=1e-5)


def test_what_a_static_cache_does_not_hold_yet_is_cut_off(called):
    huggingface.attention_forward(torch.nn.Module(), *_tensors(5, 12), None)
    assert called[0][1]["k"].shape == called[0][1]["v"].shape == (2, 2, 5, 16)


def test_a_layer_says_whether_it_is_causal_and_how_its_results_repeat(called):
    layer = torch.nn.Module()
    for layer.is_causal in (False, True):
        huggingface.attention_forward(layer, *_tensors(), None)
        assert called[-1][1]["causal"] is layer.is_causal
    huggingface.attention_forward(layer, *_tensors(), None, deterministic=True)
    assert called[-1][0] == "attention"
    assert called[-1][1]["deterministic"]


def test_structures_are_for_tensors_that_kernels_take(monkeypatch):
    def served(dtype=torch.bfloat16, **sizes):
        return huggingface._served(*[x.to(dtype) for x in _tensors(**sizes)])

    assert not served()  # on the CPU
    monkeypatch.setattr(huggingface, "way", lambda *_: "direct")
    assert served()
    assert served(torch.float16, width=256)
    assert not served(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert served(torch.float32)
    for sizes in ({"width": 12}, {"width": 8}, {"width": 264}, {"width": 32, "v_width": 16}):
        assert not served(**sizes)


@pytest.mark.usefixtures("structured")
def test_a_mask_of_other_sizes_is_refused_with_its_note_too():
    mask = masking_utils.create_sliding_window_causal_mask(
        _config(sliding_window=8), torch.zeros(2, 24, 64), None, None
    )
    with pytest.raises((RuntimeError, ValueError), match=r"broadcast|must match"):
        huggingface.attention_forward(torch.nn.Module(), *_tensors(24, 25), mask)


def test_dropout_drops_and_a_seed_repeats_it():
    q, k, v = _tensors(64, 64)
    ones = torch.ones_like(v)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(huggingface.attention_forward(torch.nn.Module(), q, k, ones, None, dropout=0.5)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[0].mean().item() == pytest.approx(1.0, abs=0.1)
    assert found[0].std().item() > 0.1


@pytest.mark.parametrize("argument", ["indices", "block_indices", "sinks"])
def test_what_would_be_left_out_is_refused(argument):
    with pytest.raises(ValueError, match=f"takes no {argument}"):
        huggingface.attention_forward(torch.nn.Module(), *_tensors(), None, **{argument: torch.zeros(1)})


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


def test_positions_that_begin_anew_are_looked_for_once():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    q = torch.zeros(1, 2, 5, 16)
    found = huggingface._restarted(positions, None, q, q)
    assert found.cu_seqlens_q.tolist() == [0, 3, 5]
    assert found.max_seqlen_q == 3
    assert huggingface._restarted(positions, None, q, q) is found
    positions[0, 3] = 7
    assert huggingface._restarted(positions, None, q, q) is None
    for others in ([[1, 1, 0, 1, 2]], [[1, 0, 1, 0, 1]], [[3, 4, 5, 6, 7]], [[0, 1, 2, 0, 1]] * 2):
        assert huggingface._restarted(torch.tensor(others), None, q, q) is None
    assert huggingface._restarted(torch.tensor([[0, 1, 2, 0, 1]]), torch.ones(1, 1, 5, 5).bool(), q, q) is None


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
    for attention in ("eager", "tilebook"):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config, attn_implementation=attention).eval()
        with tilebook.enabled() if attention == "tilebook" else contextlib.nullcontext():
            found.append(model(**inputs("bert", "padded", "cpu"))[0])
    assert torch.equal(*found)


def test_a_model_whose_attention_has_other_names_says_so():
    config = transformers.AutoConfig.for_model("falcon", **MODELS["falcon"])
    with pytest.raises((KeyError, ValueError), match="tilebook"):
        transformers.AutoModel.from_config(config, attn_implementation="tilebook")


def test_weights_of_attention_are_asked_for_in_vain(monkeypatch):
    said = []
    logger = transformers.utils.logging.get_logger(huggingface.__name__)
    monkeypatch.setattr(logger, "warning_once", said.append)
    for asked in (False, True):
        _, weights = huggingface.attention_forward(torch.nn.Module(), *_tensors(), None, output_attentions=asked)
        assert weights is None
    assert len(said) == 1
    assert "output_attentions=True" in said[0]


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
