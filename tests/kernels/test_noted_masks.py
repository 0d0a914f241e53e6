"""Masks with a note of what they show: who computes by the note, and where the mask counts after all."""

import copy
import functools
import gc
import io
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tilebook
from tilebook import dispatch, left
from tilebook.dispatch.choice import Choice
from tilebook.kernels import attention as package
from tilebook.kernels.attention import drop_in, structure
from tilebook.kernels.attention.structure import Note, Structure, notes
from tilebook.kernels.varlen import packs
from tilebook.notes import Notes

SDPA = F.scaled_dot_product_attention
B, H, S, D = 2, 2, 24, 32
KEYS = torch.arange(S) < torch.tensor([S, 9])[:, None, None, None]
PACKS = torch.tensor([[0] * 7 + [1] * 17, [0] * S])
ROWS, COLUMNS = torch.arange(S)[:, None], torch.arange(S)

SHOWN = {
    "padded keys": (Structure(False, None, KEYS, None), KEYS),
    "a triangle of padded keys": (Structure("bottom_right", None, KEYS, None), KEYS & (COLUMNS <= ROWS)),
    "a window": (Structure("bottom_right", (4, -1), None, None), (COLUMNS <= ROWS) & (COLUMNS >= ROWS - 4)),
    "a window both ways": (Structure(False, (4, 4), None, None), (COLUMNS - ROWS).abs() <= 4),
    "a window of padded keys": (
        Structure("bottom_right", (4, -1), KEYS, None),
        KEYS & (COLUMNS <= ROWS) & (COLUMNS >= ROWS - 4),
    ),
    "a triangle": (Structure("bottom_right", None, None, None), COLUMNS <= ROWS),
    "everything": (Structure(False, None, None, None), COLUMNS >= 0),
    "packs": (Structure("bottom_right", None, None, PACKS), (PACKS[:, :, None] == PACKS[:, None])[:, None]),
    "packs both ways": (Structure(False, None, None, PACKS), (PACKS[:, :, None] == PACKS[:, None])[:, None]),
}


def noted(name="a triangle of padded keys", made_of=()):
    """A mask, with its note."""
    found, shown = SHOWN[name]
    if found.packs is not None and found.causal:
        shown = shown & (COLUMNS <= ROWS)
    mask = shown.expand(B, 1, S, S).clone()
    notes.put(mask, Note(lambda: copy.copy(found), made_of, None if found.packs is None else packs.attention_of_packs))
    return mask


def qkv(dtype=torch.float16, heads_kv=H):
    source = torch.Generator().manual_seed(0)
    shapes = (B, S, H, D), (B, S, heads_kv, D), (B, S, heads_kv, D)
    return [torch.randn(each, generator=source).to(dtype).transpose(1, 2).requires_grad_() for each in shapes]


def step(tensors, mask, function=SDPA, **options):
    for each in tensors:
        each.grad = None
    o = function(*tensors, mask, **options)
    (o.float() * o.detach().float().sin()).sum().backward()
    return [o.detach(), *(each.grad for each in tensors)]


@pytest.fixture
def called(monkeypatch):
    """The structures that were computed."""
    found = []

    def spy(module, name):
        ours = getattr(module, name)

        def function(*args, **options):
            found.append((name, options))
            return ours(*args, **options)

        monkeypatch.setattr(module, name, function)

    spy(package, "attend")
    spy(packs, "attention_varlen")
    yield [] if found else found
    notes.held.clear()


def by_note(called):
    """What was computed without reading the mask."""
    return [each for each in called if (shown := each[1].get("attn_mask")) is None or shown.shape[-2] == 1]


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_mask_shows_is_computed(name, called):
    tensors, mask, (found, _) = qkv(), noted(name), SHOWN[name]
    right = step([x.float().detach().requires_grad_() for x in tensors], mask)
    with dispatch.use("torch"):
        ours = step(tensors, mask, tilebook.scaled_dot_product_attention)
    for got, wanted in zip(ours, right, strict=True):
        torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=1e-2)
    (what, given), *more = called
    assert not more
    if found.packs is not None:
        assert what == "attention_varlen"
        assert (given["max_seqlen_q"], given["causal"]) == (S, bool(found.causal))
    elif found.keys is None and found.window is None:
        assert (given["causal"], given["attn_mask"]) == (bool(found.causal), None)
    else:
        assert (given["causal"], given["window"], given["attn_mask"]) == (found.causal, found.window, found.keys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has this with kernels that are compiled")
def test_our_kernels_compute_it_in_the_interpreter(called):
    pytest.importorskip("triton", reason="there are no kernels without Triton")
    tensors, mask = qkv(), noted()
    right = step([x.float().detach().requires_grad_() for x in tensors], mask)
    with dispatch.use("triton"):
        ours = step(tensors, mask, tilebook.scaled_dot_product_attention)
    assert len(by_note(called)) == 1
    for got, wanted in zip(ours, right, strict=True):
        torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=1e-2)


def _written(mask):
    mask[0, 0, 3, 2] = False
    return mask


def _saved(mask):
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    return torch.load(file)


OTHERS = {
    "written to": _written,
    "written to through a view": lambda mask: (_written(mask[:]), mask)[1],
    "copied": torch.clone,
    "deeply copied": copy.deepcopy,
    "written to and deeply copied": lambda mask: copy.deepcopy(_written(mask)),
    "saved and loaded": _saved,
    "cut": lambda mask: mask[:, :, :, :],
    "expanded": lambda mask: mask.expand(B, H, S, S),
    "detached": torch.detach,
    "of numbers": lambda mask: torch.zeros(mask.shape, dtype=torch.float16).masked_fill(~mask, -torch.inf),
    "combined": lambda mask: mask & (COLUMNS != 5),
}


@pytest.mark.parametrize("change", OTHERS)
def test_a_mask_that_is_another_is_read(change, called):
    kept = noted()
    mask, tensors = OTHERS[change](kept), qkv()
    right = step(
        [x.float().detach().requires_grad_() for x in tensors],
        mask.float().log() if mask.dtype == torch.bool else mask.float(),
    )
    with dispatch.use("torch"):
        ours = step(tensors, mask, tilebook.scaled_dot_product_attention)
    assert not by_note(called)
    for got, wanted in zip(ours, right, strict=True):
        torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=1e-2)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


def _in_mode(call):
    with Mode():
        return call()


def _math(call):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return call()


def _twice():
    return [torch.stack([x.detach(), x.detach()]) for x in qkv()]


UNSERVED = {
    "fp32": lambda mask: tilebook.scaled_dot_product_attention(*qkv(torch.float32), mask),
    "dropout": lambda mask: tilebook.scaled_dot_product_attention(*qkv(), mask, 0.5),
    "negative scale": lambda mask: tilebook.scaled_dot_product_attention(*qkv(), mask, scale=-1.0),
    "fewer rows": lambda mask: tilebook.scaled_dot_product_attention(qkv()[0][:, :, :3], *qkv()[1:], mask[:, :, :3]),
    "values of another width": lambda mask: tilebook.scaled_dot_product_attention(*qkv()[:2], qkv()[2][..., :16], mask),
    "a mode": lambda mask: _in_mode(lambda: tilebook.scaled_dot_product_attention(*qkv(), mask)),
    "the plain formula": lambda mask: _math(lambda: tilebook.scaled_dot_product_attention(*qkv(), mask)),
    "vmap": lambda mask: torch.vmap(lambda *x: tilebook.scaled_dot_product_attention(*x, mask))(*_twice()),
    "a derivative": lambda mask: torch.func.grad(lambda *x: tilebook.scaled_dot_product_attention(*x, mask).sum())(
        *(x.detach() for x in qkv())
    ),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_what_our_kernels_do_not_take_is_left_as_it_was(name, called):
    mask = noted()
    with dispatch.use("torch"):
        UNSERVED[name](mask)
    assert not by_note(called)


def test_on_the_cpu_the_mask_is_read(called):
    tensors, mask = qkv(), noted()
    ours, theirs = step(tensors, mask, tilebook.scaled_dot_product_attention), step(tensors, mask)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert not called


def test_autocast_makes_16_bits_of_fp32(called):
    tensors, mask = qkv(torch.float32), noted()
    with dispatch.use("torch"), torch.autocast("cpu", torch.bfloat16):
        ours = step(tensors, mask, tilebook.scaled_dot_product_attention)
        theirs = step(tensors, mask)
    assert len(by_note(called)) == 1
    assert ours[0].dtype == theirs[0].dtype == torch.bfloat16
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.float(), wanted.float(), rtol=5e-2, atol=5e-2)


def test_what_a_mask_was_made_of_may_change_before_and_after(called):
    keep = KEYS.clone()
    mask, late = noted(made_of=[keep]), noted(made_of=[keep])
    with dispatch.use("torch"):
        tilebook.scaled_dot_product_attention(*qkv(), mask)
        keep[0] = False
        for each in (mask, late):
            tilebook.scaled_dot_product_attention(*qkv(), each)
    assert len(by_note(called)) == 2  # the one that had been looked at has its own copy


def test_heads_may_be_shared(called):
    tensors, mask = qkv(heads_kv=1), noted()
    with dispatch.use("torch"):
        ours = step(tensors, mask, tilebook.scaled_dot_product_attention, enable_gqa=True)
    theirs = step([x.float().detach().requires_grad_() for x in tensors], mask, enable_gqa=True)
    assert len(by_note(called)) == 1
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_steps_that_are_computed_again_save_the_same(reentrant, called):
    tensors, mask = qkv(), noted()

    def layer(q, k, v, _):
        function = functools.partial(tilebook.scaled_dot_product_attention, attn_mask=mask)
        return torch.utils.checkpoint.checkpoint(function, q, k, v, use_reentrant=reentrant)

    with dispatch.use("torch"):
        ours = step(tensors, None, layer)
    assert len(by_note(called)) == 2
    right = step([x.float().detach().requires_grad_() for x in tensors], mask)
    for got, wanted in zip(ours, right, strict=True):
        torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=1e-2)


def test_threads_share_a_note(called):
    tensors, mask, found = qkv(), noted("packs"), []

    def run():
        with torch.no_grad():
            found.append(tilebook.scaled_dot_product_attention(*tensors, mask))

    with dispatch.use("torch"):
        threads = [threading.Thread(target=run) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert len(found) == len(called) == 4
    assert all(torch.equal(found[0], each) for each in found)


# On a machine whose GPU is the CPU


@pytest.fixture
def gpu(monkeypatch, called):
    """Calls are served as on a GPU, by PyTorch's formula in our place; `native` says whose the choice is."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(left, "_capturing", lambda: False)
    monkeypatch.setattr(drop_in, "placed", lambda x: False)
    for module in (package, drop_in, structure):
        monkeypatch.setattr(module, "way", lambda *_, **__: "direct")
    native, choices = {"is": False}, {}

    def lookup(op, args):
        known = native["is"], dispatch.key(op, args)
        if known not in choices:
            made = Choice(op.implementations["torch"], None, "fallback", op.problem.of(*args))
            made.kept, made.aligned, made.native = True, True, native["is"]
            choices[known] = made
        return choices[known]

    monkeypatch.setattr(dispatch, "known", lambda op, args: None)
    monkeypatch.setattr(dispatch, "lookup", lookup)
    dispatch.reload()
    yield native
    dispatch.reload()


def _bounds(monkeypatch, forward, training):
    for module in (drop_in, package, structure):
        monkeypatch.setattr(module, "BOUNDS", (forward, training))


SIZE = float(B * H * S * D * S)


@pytest.mark.parametrize(
    ("name", "bounds", "expected"),
    [
        ("a window", (SIZE, SIZE), 0),
        ("a window", (SIZE - 1, SIZE), 1),
        ("packs", (SIZE / 2, SIZE), 0),
        ("packs", (SIZE / 5, SIZE), 1),
    ],
)
def test_small_calls_are_pytorchs(gpu, monkeypatch, called, name, bounds, expected):
    _bounds(monkeypatch, *bounds)
    mask = noted(name)
    monkeypatch.setattr(packs, "attention_varlen", lambda q, *_, **given: (called.append(("varlen", given)), q)[1])
    with torch.no_grad():
        for _ in range(4):
            tilebook.scaled_dot_product_attention(*qkv(), mask)
    assert len(by_note(called)) == expected * 4


def test_a_kind_of_call_with_a_note_is_another_than_without(gpu, monkeypatch, called):
    _bounds(monkeypatch, 0.0, 0.0)
    mask = noted("padded keys")
    bare, tensors = mask.clone(), qkv()
    with torch.no_grad():
        for native in (True, False):
            gpu["is"] = native
            dispatch.reload()
            for _ in range(4):
                for each in (bare, mask):
                    tilebook.scaled_dot_product_attention(*tensors, each)
            asked = len(by_note(called))
            # What dispatch leaves to PyTorch is asked about once.
            assert asked == (1 if native else 1 + 4)


def test_what_pytorch_serves_has_the_mask_as_it_was(gpu, monkeypatch, called):
    _bounds(monkeypatch, 0.0, 0.0)
    given = []

    def sdpa(*args, **options):
        given.append(args[3])
        return SDPA(*args, **options)

    monkeypatch.setattr(drop_in, "plain_sdpa", sdpa)
    gpu["is"], mask = True, noted("padded keys")
    with torch.no_grad():
        for _ in range(3):
            tilebook.scaled_dot_product_attention(*qkv(), mask)
    assert len(given) == 3
    assert all(each is mask for each in given)


# Notes


def test_a_note_lives_as_long_as_its_tensor():
    kept, x = Notes(), torch.ones(2)
    kept.put(x, "noted")
    assert kept.of(x) == "noted"
    assert kept.of(x[:]) is None
    x.add_(1)
    assert kept.of(x) is None
    kept.put(x, "again")
    assert kept.of(x) == "again"
    del x
    gc.collect()
    assert not kept.held


def test_of_inference_tensors_nothing_is_noted():
    kept = Notes()
    with torch.inference_mode():
        x = torch.ones(2)
        kept.put(x, "noted")
        assert kept.of(x) is None
    kept.put(x, "noted")
    assert not kept.held
