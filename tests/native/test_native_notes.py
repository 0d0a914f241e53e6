"""Masks whose structure is noted, where PyTorch's own attention meets them in C++."""

import threading

import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import dispatch, native
from tilebook.kernels.attention import drop_in
from tilebook.notes import Notes

B, H, S, D = 2, 3, 8, 16
SHAPE = B, H, S, D


def qkv(**how):
    source = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=source, **how).requires_grad_() for _ in range(3)]


class Told:
    """What notes are asked for; answers with twice what is right, so that it is seen, or with what a test says."""

    def __init__(self, extension):
        self.notes, self.asked, self.answer = Notes(), [], lambda *call: 2 * self.right(*call)
        self.tell = lambda bound, training=0.0: extension.notes(
            self.notes.held, self.answered, (float(bound), float(training))
        )
        self.tell(0)

    def answered(self, *call):
        self.asked.append(call)
        return self.answer(*call)

    def right(self, q, k, v, mask, scale, grouped):
        return F.scaled_dot_product_attention(q, k, v, mask.clone(), scale=scale, enable_gqa=grouped)

    def mask(self, *shape):
        mask = torch.ones(shape or (B, 1, S, S), dtype=torch.bool).tril()
        self.notes.put(mask, "noted")
        return mask


@pytest.fixture
def told(it):
    yield Told(it)
    it.notes({}, print, (0.0, 0.0))


def test_a_call_under_a_noted_mask_is_answered_with_its_gradients(told):
    tensors, mask = qkv(dtype=torch.float64), told.mask()
    o = F.scaled_dot_product_attention(*tensors, mask, scale=0.5)
    right = F.scaled_dot_product_attention(*tensors, mask.clone(), scale=0.5)
    ((*given, scale, grouped),) = told.asked
    assert all(one is other for one, other in zip(given, [*tensors, mask], strict=True))
    assert (scale, grouped) == (0.5, False)
    torch.testing.assert_close(o, 2 * right)
    ours, theirs = (torch.autograd.grad(x.sum(), tensors) for x in (o, right))
    torch.testing.assert_close(ours, tuple(2 * each for each in theirs))


def test_where_the_mask_is_to_serve_the_call_goes_on(told):
    told.answer = lambda *call: None
    tensors, mask = qkv(), told.mask()
    right = F.scaled_dot_product_attention(*tensors, mask.clone())
    assert torch.equal(F.scaled_dot_product_attention(*tensors, mask), right)
    assert len(told.asked) == 1


OTHERS = {
    "another mask": lambda told: F.scaled_dot_product_attention(*qkv(), told.mask().clone()),
    "no mask": lambda told: F.scaled_dot_product_attention(*qkv()),
    "dropout": lambda told: F.scaled_dot_product_attention(*qkv(), told.mask(), 0.5),
    "three axes": lambda told: F.scaled_dot_product_attention(*[x[0] for x in qkv()], told.mask()[0]),
    "a small call": lambda told: (
        told.tell(0.0, B * H * S * D * S),
        F.scaled_dot_product_attention(*qkv(), told.mask()),
    ),
    "vmap": lambda told: torch.vmap(F.scaled_dot_product_attention)(
        *[torch.stack([x.detach(), x.detach()]) for x in qkv()], torch.stack([told.mask()] * 2)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_of_others_nobody_is_asked(told, name):
    OTHERS[name](told)
    assert not told.asked


def test_while_it_is_off_nobody_is_asked(told, it):
    mask = told.mask()
    it.stop()
    F.scaled_dot_product_attention(*qkv(), mask)
    assert not told.asked
    it.start(lambda name, given: (None, False, None))
    F.scaled_dot_product_attention(*qkv(), mask)
    assert len(told.asked) == 1


def test_under_autocast_the_tensors_have_its_dtype(told):
    mask = told.mask()
    with torch.autocast("cpu", torch.bfloat16):
        F.scaled_dot_product_attention(*qkv(), mask)
    assert told.asked[0][0].dtype == torch.bfloat16
    assert told.asked[0][3] is mask


def test_what_is_raised_comes_out(told):
    def broken(*call):
        raise KeyError("noted")

    told.answer = broken
    with pytest.raises(KeyError, match="noted"):
        F.scaled_dot_product_attention(*qkv(), told.mask())


def test_threads_and_backward_passes_ask_too(told):
    mask, found = told.mask(), []

    def layer(*tensors):
        return torch.utils.checkpoint.checkpoint(
            lambda *each: F.scaled_dot_product_attention(*each, mask), *tensors, use_reentrant=False
        )

    def run():
        tensors = qkv()
        found.append(torch.autograd.grad(layer(*tensors).sum(), tensors))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(told.asked) == 6
    assert all(torch.equal(one, other) for each in found for one, other in zip(each, found[0], strict=True))


def test_a_gate_lets_a_noted_mask_through_to_python(gated, told):
    function, tensors = tilebook.scaled_dot_product_attention, [x.detach() for x in qkv()]
    mask = told.mask()
    gated.known(function, *tensors, mask.clone())
    hit, found = gated.answered(function, *tensors, mask.clone())
    assert hit
    assert gated.looked_at(function, *tensors, mask)
    told.tell(B * H * S * D * S, B * H * S * D * S)  # small ones are what they are without
    hit, other = gated.answered(function, *tensors, mask)
    assert hit
    assert torch.equal(found, other)


def test_the_extension_is_told_of_the_notes_there_are(monkeypatch):
    told = []
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "serve", lambda standings, notes: told.append(notes))
    monkeypatch.setattr(native, "stop", lambda: None)
    with tilebook.enabled():
        assert told == [drop_in.NOTES]
    held, answer, bounds = drop_in.NOTES
    assert held is drop_in.notes.held
    assert bounds == drop_in.BOUNDS
    mask = torch.ones(B, 1, S, S, dtype=torch.bool)
    assert answer(*[x.half() for x in qkv()], mask, None, False) is None
    with dispatch.use("torch"):
        assert answer(*[x.half() for x in qkv()], mask, None, False) is None
