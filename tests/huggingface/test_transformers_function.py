"""The attention function that transformers' models call, beside the formula."""

import pytest
import torch
from spelled_out import drawn, reference, tril

import tilebook
from tilebook.huggingface import attention
from tilebook.huggingface.masks import Structure

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

tilebook.register_transformers()


def _most_negative(seen):
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def _blind(seen):
    """With a row that sees nothing."""
    return _most_negative(seen).index_fill(0, torch.tensor(2), torch.finfo(torch.float32).min)


BLIND = tril(5, 12).index_fill(0, torch.tensor(2), False)

FORMS = {
    "causal": ({}, {}, lambda n: None, tril(12, 12)),
    "full": ({}, {"is_causal": False}, lambda n: None, torch.ones(12, 12, dtype=torch.bool)),
    "one row": ({"n_q": 1}, {}, lambda n: None, torch.ones(1, 12, dtype=torch.bool)),
    "static cache": ({"n_q": 5}, {}, lambda n: None, torch.ones(5, 12, dtype=torch.bool).tril()),
    "boolean mask": ({"n_q": 5}, {}, lambda n: n, tril(5, 12)),
    "mask of most negative numbers": ({"n_q": 5}, {}, _most_negative, tril(5, 12)),
    "a row of most negative numbers alone": ({"n_q": 5}, {}, _blind, BLIND),
    "scale and soft-cap": ({}, {"scaling": 0.3, "softcap": 2.0}, lambda n: n, tril(12, 12)),
    "soft-cap of causal": ({}, {"softcap": 2.0}, lambda n: None, tril(12, 12)),
    "other values' width": ({"v_width": 8}, {}, lambda n: None, tril(12, 12)),
    "other values' width, mask": ({"v_width": 8}, {}, lambda n: n, tril(12, 12)),
    "other values' width, soft-cap": ({"v_width": 24}, {"softcap": 2.0}, lambda n: n, tril(12, 12)),
    "sinks": ({}, {"s_aux": 4}, lambda n: None, tril(12, 12)),
    "sinks, mask": ({"n_q": 5}, {"s_aux": 4}, lambda n: n, tril(5, 12)),
    "sinks, most negative numbers": ({"n_q": 5}, {"s_aux": 4}, _most_negative, tril(5, 12)),
    "sinks, other width": ({"v_width": 8}, {"s_aux": 4}, lambda n: n, tril(12, 12)),
    "bias": ({}, {"position_bias": (1, 4, 12, 12), "is_causal": False}, lambda n: None, torch.ones(12, 12).bool()),
    "bias, causal": ({}, {"position_bias": (1, 4, 12, 12)}, lambda n: None, tril(12, 12)),
    "bias, static cache": (
        {"n_q": 5},
        {"position_bias": (1, 4, 5, 12)},
        lambda n: None,
        torch.ones(5, 12).bool().tril(),
    ),
    "bias, mask": ({}, {"position_bias": (2, 4, 12, 12)}, lambda n: n, tril(12, 12)),
    "bias, sinks": ({}, {"position_bias": (1, 4, 12, 12), "s_aux": 4}, lambda n: n, tril(12, 12)),
}


@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_of_every_form_are_what_is_spelled_out(form):
    sizes, options, masked, seen = FORMS[form]
    options = dict(options)
    tensors = drawn(**sizes)
    for name in ("s_aux", "position_bias"):
        if name in options:
            options[name] = torch.randn(options[name]).requires_grad_()
    wanted = [*tensors, *[options[name] for name in ("s_aux", "position_bias") if name in options]]
    mask = masked(seen)
    mask = mask if mask is None else mask.expand(2, 1, *mask.shape)
    got, weights = attention.attention_forward(torch.nn.Module(), *tensors, mask, **options)
    assert weights is None
    assert got.is_contiguous()
    renamed = {"scaling": "scale", "position_bias": "bias", "s_aux": "sinks", "softcap": "softcap"}
    more = {renamed[key]: value for key, value in options.items() if key in renamed}
    right = reference(*tensors, seen, **more)
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
    q, k, v = drawn(n_q, n_k, batch=1)
    got, _ = attention.attention_forward(
        torch.nn.Module(), q, k, v, None, dropout=dropout, is_causal=causal, softcap=softcap,
        cu_seq_lens_q=torch.tensor(ends_q), cu_seq_lens_k=torch.tensor(ends_k),
        max_length_q=12, max_length_k=torch.tensor(12),
    )  # fmt: skip
    assert called[0][0] == expected
    seen = torch.zeros(n_q, n_k, dtype=torch.bool)
    for first, last, start, end in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        block = tril(last - first, end - start) if causal else torch.ones(last - first, end - start).bool()
        seen[first:last, start:end] = block
    torch.testing.assert_close(got.double(), reference(q, k, v, seen, softcap=softcap), rtol=1e-4, atol=1e-5)


def test_described_packs_hold_beside_a_mask_too():
    q, k, v = drawn(batch=1)
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
    seen = tril(12, 12)
    blocks = seen.clone()
    blocks[5:, :5] = False
    for mask in (seen[None, None], _most_negative(seen)[None, None]):
        got, _ = attention.attention_forward(torch.nn.Module(), q, k, v, mask, **given)
        torch.testing.assert_close(got.double(), reference(q, k, v, blocks), rtol=1e-4, atol=1e-5)


def test_what_a_static_cache_does_not_hold_yet_is_cut_off(called):
    attention.attention_forward(torch.nn.Module(), *drawn(5, 12), None)
    assert called[0][1]["k"].shape == called[0][1]["v"].shape == (2, 2, 5, 16)


def test_a_layer_says_whether_it_is_causal_and_how_its_results_repeat(called):
    layer = torch.nn.Module()
    for layer.is_causal in (False, True):
        attention.attention_forward(layer, *drawn(), None)
        assert called[-1][1]["causal"] is layer.is_causal
    attention.attention_forward(layer, *drawn(), None, deterministic=True)
    assert called[-1][0] == "attention"
    assert called[-1][1]["deterministic"]


def test_structures_are_for_tensors_that_kernels_take(monkeypatch):
    def served(dtype=torch.bfloat16, **sizes):
        return attention._served(*[x.to(dtype) for x in drawn(**sizes)], Structure(True, (7, -1), None, None))

    assert not served()  # on the CPU
    monkeypatch.setattr(attention, "way", lambda *_: "direct")
    assert served()
    assert served(torch.float16, width=256)
    assert not served(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert served(torch.float32)
    for sizes in ({"width": 12}, {"width": 8}, {"width": 264}, {"width": 32, "v_width": 16}):
        assert not served(**sizes)


def test_dropout_drops_and_a_seed_repeats_it():
    q, k, v = drawn(64, 64)
    ones = torch.ones_like(v)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(attention.attention_forward(torch.nn.Module(), q, k, ones, None, dropout=0.5)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[0].mean().item() == pytest.approx(1.0, abs=0.1)
    assert found[0].std().item() > 0.1


@pytest.mark.parametrize("argument", ["indices", "block_indices", "sinks"])
def test_what_would_be_left_out_is_refused(argument):
    with pytest.raises(ValueError, match=f"takes no {argument}"):
        attention.attention_forward(torch.nn.Module(), *drawn(), None, **{argument: torch.zeros(1)})


def test_positions_that_begin_anew_are_looked_for_once():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    q = torch.zeros(1, 2, 5, 16)
    found = attention._restarted(positions, None, q, q)
    assert found.cu_seqlens_q.tolist() == [0, 3, 5]
    assert found.max_seqlen_q == 3
    assert attention._restarted(positions, None, q, q) is found
    positions[0, 3] = 7
    assert attention._restarted(positions, None, q, q) is None
    for others in ([[1, 1, 0, 1, 2]], [[1, 0, 1, 0, 1]], [[3, 4, 5, 6, 7]], [[0, 1, 2, 0, 1]] * 2):
        assert attention._restarted(torch.tensor(others), None, q, q) is None
    assert attention._restarted(torch.tensor([[0, 1, 2, 0, 1]]), torch.ones(1, 1, 5, 5).bool(), q, q) is None


def test_weights_of_attention_are_asked_for_in_vain(monkeypatch):
    said = []
    logger = transformers.utils.logging.get_logger(attention.__name__)
    monkeypatch.setattr(logger, "warning_once", said.append)
    for asked in (False, True):
        _, weights = attention.attention_forward(torch.nn.Module(), *drawn(), None, output_attentions=asked)
        assert weights is None
    assert len(said) == 1
    assert "output_attentions=True" in said[0]
