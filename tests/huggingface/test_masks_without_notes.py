"""Masks of known parts that have no structure of ours together, and notes that no longer hold."""

import pytest
import torch

masking = pytest.importorskip("transformers.masking_utils", reason="transformers is not installed")

from tilebook.huggingface import masks, sdpa  # noqa: E402
from tilebook.kernels.attention.structure import Note, Structure, notes  # noqa: E402

N = 8


class Disguised:
    """Has the code of what is causal, and calls another."""

    __code__ = masking.causal_mask_function.__code__

    def __call__(self, batch, head, row, column):
        return column >= row


def packs(*numbers):
    return masking.packed_sequence_mask_function(torch.tensor([numbers]))


def causal(*others):
    return masking.and_masks(masking.causal_mask_function, *others)


LEFT, BOTH = masking.sliding_window_overlay, masking.sliding_window_bidirectional_overlay
UNKNOWN = {
    "packs that come again": (causal(packs(0, 0, 1, 1, 0, 0, 0, 0)), {}),
    "packs that fall": (causal(packs(3, 3, 2, 2, 1, 1, 0, 0)), {}),
    "packs of no numbers": (causal(packs(*[float("nan")] * 8)), {}),
    "two windows": (causal(LEFT(5), BOTH(2)), {}),
    "a window of nothing": (causal(LEFT(0)), {}),
    "a window of less": (causal(LEFT(-3)), {}),
    "to both sides, of less": (BOTH(-1), {}),
    "rows before the first": (masking.bidirectional_mask_function, {"q_offset": -2}),
    "something that looks causal": (Disguised(), {}),
}


def described(function, **more):
    return masks.described(N, N, **more, mask_function=function)


@pytest.mark.parametrize("which", UNKNOWN)
def test_parts_that_together_are_nothing_we_know(which):
    function, more = UNKNOWN[which]
    assert described(function, **more) is None


def test_their_likes_are_known():
    assert described(causal(packs(0, 0, 1, 1, 2, 5, 5, 5))).packs is not None
    assert described(BOTH(0)).window == (0, 0)
    assert described(causal(LEFT(1))).window == (0, -1)


def test_other_memory_is_another_mask():
    mask, keep = torch.ones(2, 1, N, N, dtype=torch.bool), torch.ones(2, N, dtype=torch.bool)
    found = Structure(True, None, None, None)
    notes.put(mask, Note(lambda: found, [keep]))
    assert notes.of(mask).structure(mask) is found
    mask.data = torch.zeros_like(mask)
    assert notes.of(mask) is None
    other = Note(lambda: found, [keep])
    keep.data = torch.zeros_like(keep)
    assert other.structure(mask) is None


def test_lengths_that_were_first_asked_for_in_inference_serve_in_training():
    structure = Structure(True, None, None, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]))
    with torch.inference_mode():
        ends = structure.lengths().cu_seqlens_q
    assert not ends.is_inference()
    assert ends.tolist() == [0, 3, 8]


def test_what_transformers_swallows_does_not_break_notes():
    mask = torch.ones(2, 1, N, N, dtype=torch.bool)
    given = {"q_length": N, "kv_length": N, "mask_function": masking.causal_mask_function, "mask": None}
    assert masks.note(mask, **given) is not None


def test_what_a_graph_makes_is_not_noted(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(sdpa, "FEW", 1)
    mask = torch.ones(2, 1, N, N, dtype=torch.bool)
    for capturing in (False, True):
        monkeypatch.setattr(sdpa, "capturing", lambda x, now=capturing: now)
        assert sdpa._worth(mask) == (not capturing)
