"""Masks for transformers' models: what a note says is what the mask shows."""

import pytest
import torch
from programs.hf_models import MODELS, inputs

import tilebook
from tilebook.huggingface import attention, masks

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from spelled_out import drawn, reference  # noqa: E402
from transformers import masking_utils  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402

tilebook.register_transformers()


def _noted(mask):
    return masks.noted(mask)


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
    noted, tensors, keep = 0, drawn(rows, columns, batch=3), PADDINGS[padding](columns + 2)
    for q_offset in (0, 2, 4, 6, 19, 25, 29):
        for kv_offset in (0, 4):
            given = {"q_length": rows, "kv_length": columns, "q_offset": q_offset, "kv_offset": kv_offset}
            given |= {"mask_function": function, "attention_mask": keep if keep is None else keep.bool()}
            mask = masks.attention_mask(batch_size=3, allow_is_causal_skip=False, **given)
            found = _noted(mask)
            if found is not None:
                noted += 1
                assert torch.equal(_spelled_out(found, 3, rows, columns), mask)
                got, _ = attention.attention_forward(torch.nn.Module(), *tensors, mask)
                torch.testing.assert_close(got.double(), reference(*tensors, mask), rtol=1e-4, atol=1e-5)
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
        packs = masking_utils.packed_sequence_mask_function(masks._packs(positions))
        for function in (remapped, masking_utils.and_masks(remapped, packs)):
            assert masks.described(24, 24, mask_function=function) is None

    def every_third(batch, head, row, column):
        return column % 3 == 0

    for which in ("or_mask_function", "and_mask_function"):
        assert _noted(masking_utils.create_causal_mask(config, x, None, None, **{which: every_third})) is None
    known = {"q_length": 24, "kv_length": 24, "mask_function": masking_utils.causal_mask_function}
    assert masks.described(**known) is not None
    assert masks.described(**known, attention_mask=torch.ones(3, 24, 24)) is None
    assert masks.described(**known, q_offset=torch.zeros((), dtype=torch.long)) is None
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
    got, _ = attention.attention_forward(torch.nn.Module(), q, k, v, mask)
    torch.testing.assert_close(got.double(), reference(q, k, v, mask), rtol=1e-4, atol=1e-5)
    assert (called[0][1]["attn_mask"] is mask) == (change != "none")


@pytest.mark.usefixtures("structured")
def test_a_mask_of_other_sizes_is_refused_with_its_note_too():
    mask = masking_utils.create_sliding_window_causal_mask(
        _config(sliding_window=8), torch.zeros(2, 24, 64), None, None
    )
    with pytest.raises((RuntimeError, ValueError), match=r"broadcast|must match"):
        attention.attention_forward(torch.nn.Module(), *drawn(24, 25), mask)
