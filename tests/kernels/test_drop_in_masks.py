"""Calls of the drop-in under a mask or with dropout are PyTorch's own, of tensors that its kernels can load."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import dispatch, left
from tilebook.dispatch.choice import Choice
from tilebook.kernels import attention as package
from tilebook.kernels.attention import drop_in, pytorch
from tilebook.kernels.attention.ops import attention_fwd
from tilebook.layout import VECTOR, fits

SDPA = F.scaled_dot_product_attention


@pytest.fixture
def pytorchs(monkeypatch):
    """On a machine whose GPU is the CPU PyTorch's own serves; what its function is given."""
    given, choices = [], {}

    def sdpa(*args, **options):
        given.append((args, options))
        return SDPA(*args, **options)

    def lookup(op, args):
        known = dispatch.key(op, args)
        if known not in choices:
            problem = attention_fwd.problem.of(*args)
            choices[known] = made = Choice(attention_fwd.implementations["torch"], None, "fallback", problem)
            made.kept, made.aligned = True, all(fits(x) for x in args[:3])
        return choices[known]

    for module in (package, drop_in):
        monkeypatch.setattr(module, "way", lambda *_, **__: "direct")
        monkeypatch.setattr(module, "plain_sdpa", sdpa)
    for module in (drop_in, pytorch):
        monkeypatch.setattr(module, "placed", lambda x: isinstance(x, torch.Tensor))
    monkeypatch.setattr(drop_in, "forced", lambda: True)
    monkeypatch.setattr(dispatch, "known", lambda op, args: None)
    monkeypatch.setattr(dispatch, "lookup", lookup)
    dispatch.reload()
    yield given
    dispatch.reload()


def _qkv(*shape, dtype=torch.bfloat16):
    source = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape or (2, 4, 32, 16), generator=source).to(dtype) for _ in range(3))


def _shown(*shape):
    shown = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    shown[..., 0] = True
    return shown


MASKS = {
    "padded keys": lambda: _shown(2, 1, 1, 32).expand(2, 1, 32, 32),
    "of each row": lambda: _shown(32, 32),
    "of each head": lambda: _shown(2, 4, 32, 32),
    "added": lambda: torch.randn(32, 32).bfloat16(),
}


@pytest.mark.parametrize("added", [False, True])
def test_a_mask_of_one_row_that_starts_within_a_vector_is_copied(pytorchs, monkeypatch, added):
    answers = itertools.chain([True], itertools.repeat(False))  # as on a GPU, where nothing is forced
    monkeypatch.setattr(drop_in, "forced", lambda: next(answers))
    (q, *_), (_, k, v) = _qkv(2, 4, 1, 16), _qkv()
    whole = torch.randn(2, 1, 1, 64).bfloat16()
    mask = whole[..., 1:33] if added else (whole > -1)[..., 1:33]
    found = drop_in.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(found, SDPA(q, k, v, attn_mask=mask.contiguous()), rtol=1e-2, atol=1e-2)
    assert not [x for x in pytorchs[-1][0] if isinstance(x, torch.Tensor) and x.data_ptr() % 16]


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_that_can_be_loaded_is_passed_on_as_it_is(pytorchs, name):
    q, mask = _qkv(), MASKS[name]()
    right = SDPA(*q, attn_mask=mask)
    for turn in range(3):
        assert torch.equal(tilebook.scaled_dot_product_attention(*q, attn_mask=mask), right)
        assert len(pytorchs) == turn + 1
        assert pytorchs[-1][0][3] is mask
        assert all(a is b for a, b in zip(pytorchs[-1][0], q, strict=False))


def test_a_call_that_is_known_asks_nobody(pytorchs, monkeypatch):
    q, mask = _qkv(), MASKS["padded keys"]()
    tilebook.scaled_dot_product_attention(*q, attn_mask=mask)
    monkeypatch.setattr(package, "attend", None)
    tilebook.scaled_dot_product_attention(*q, attn_mask=MASKS["padded keys"]())
    assert len(pytorchs) == 2


def _cut(columns):
    """Rows that start anywhere, of numbers to add."""
    return torch.randn(40, 137).bfloat16()[3:35, 5 : 5 + columns]


HARD = {
    "rows that start anywhere": lambda: _cut(32),
    "one row that starts anywhere": lambda: _cut(32)[2:3],
    "one column for all": lambda: _cut(32)[:, 2:3],
    "one number for all": lambda: _cut(32)[2:3, 2:3],
    "every second column": lambda: torch.randn(32, 64).bfloat16()[:, ::2],
    "heads side by side": lambda: torch.randn(2, 32, 32, 4).bfloat16().permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("name", HARD)
def test_a_mask_that_cannot_be_loaded_is_copied(pytorchs, name):
    q, mask = _qkv(), HARD[name]()
    right = SDPA(*q, attn_mask=mask.contiguous())
    for _ in range(3):
        torch.testing.assert_close(tilebook.scaled_dot_product_attention(*q, attn_mask=mask), right)
        passed = pytorchs[-1][0][3]
        assert passed.shape[-1] == 32
        assert not passed.data_ptr() % VECTOR
        assert not any(n > 1 and step * 2 % VECTOR for n, step in zip(passed.shape[:-1], passed.stride(), strict=False))


@pytest.mark.parametrize("kind", ["shown", "added"])
@pytest.mark.parametrize(("columns", "copied"), [(36, False), (37, True), (38, True)])
def test_rows_without_gaps_may_end_within_a_vector(pytorchs, kind, columns, copied):
    """Of 14 × 14 windows, as image models have them, a row is 196 numbers: 24 and a half vectors."""
    q, k, v = (x[:, :, :n] for x, n in zip(_qkv(2, 4, 40, 16), (32, columns, columns), strict=True))
    mask = _shown(32, columns) if kind == "shown" else torch.randn(2, 4, 32, columns).bfloat16()
    right = SDPA(q, k, v, attn_mask=mask)
    for _ in range(3):
        torch.testing.assert_close(tilebook.scaled_dot_product_attention(q, k, v, attn_mask=mask), right)
        assert (pytorchs[-1][0][3] is not mask) == copied


@pytest.mark.parametrize("kind", ["shown", "shown in vectors", "padded keys", "added", "by heads"])
def test_rows_of_any_length_are_padded_in_memory(pytorchs, kind):
    """Also booleans whose rows start at vectors: of these PyTorch makes numbers without a gap."""
    q, k, v = (x[:, :, :n] for x, n in zip(_qkv(2, 4, 40, 16), (32, 37, 37), strict=True))
    mask = {
        "shown": lambda: _shown(32, 37),
        "shown in vectors": lambda: _shown(32, 48)[:, :37],
        "padded keys": lambda: _shown(2, 1, 1, 37).expand(2, 1, 32, 37),
        "added": lambda: torch.randn(32, 37).bfloat16(),
        "by heads": lambda: torch.randn(2, 32, 37, 4).bfloat16().permute(0, 3, 1, 2),
    }[kind]()
    right = SDPA(q, k, v, attn_mask=mask)
    for _ in range(3):
        torch.testing.assert_close(tilebook.scaled_dot_product_attention(q, k, v, attn_mask=mask), right)
        passed = pytorchs[-1][0][3]
        assert (passed.dtype, passed.shape[-1], *passed.stride()[-2:]) == (torch.bfloat16, 37, 48, 1)


@pytest.mark.parametrize("columns", [32, 37])
def test_a_call_whose_mask_is_copied_is_known_too_and_never_answered_with_the_mask_itself(
    pytorchs, monkeypatch, columns
):
    """What answers calls without Python passes on what it is given."""
    settled = []
    monkeypatch.setattr(left._gated, "settle", lambda side, bounded, choice, tensors: settled.append(tensors))
    q, k, v = (x[:, :, :n] for x, n in zip(_qkv(2, 4, 40, 16), (32, columns, columns), strict=True))
    masks = [_cut(columns), _cut(columns)] if columns == 32 else [_shown(2, 1, 1, columns), _shown(2, 1, 1, columns)]
    tilebook.scaled_dot_product_attention(q, k, v, attn_mask=masks[0])
    monkeypatch.setattr(package, "attend", None)
    for mask in masks:
        found = tilebook.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(found, SDPA(q, k, v, attn_mask=mask.contiguous()))
        assert pytorchs[-1][0][3] is not mask
    assert settled
    assert not any(each is mask for tensors in settled for each in tensors for mask in masks)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["shown", "added", "added in vectors"])
def test_what_autocast_would_cast_has_its_dtype_and_lies_in_vectors(pytorchs, kind, dropout):
    """Its casts leave no gap. A call that is known without it is no other under it."""
    q, k, v = (x[:, :, :n] for x, n in zip(_qkv(2, 4, 40, 16, dtype=torch.float32), (32, 37, 37), strict=True))
    mask = {
        "shown": lambda: _shown(32, 37),
        "added": lambda: torch.randn(32, 37),
        "added in vectors": lambda: torch.randn(32, 48)[:, :37],
    }[kind]()
    for _ in range(3):
        tilebook.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        right = SDPA(q, k, v, attn_mask=mask)
        for _ in range(3):
            found = tilebook.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
            passed = pytorchs[-1][0][3]
            assert (passed.dtype, passed.shape[-1], passed.stride(-2)) == (torch.bfloat16, 37, 48)
            if not dropout:
                torch.testing.assert_close(found, right)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_mask_is_copied_once_a_call(pytorchs, monkeypatch, dropout):
    copied = []
    monkeypatch.setattr(drop_in, "in_vectors", lambda *given: copied.append(given) or pytorch.in_vectors(*given))
    q, k, v = (x[:, :, :n] for x, n in zip(_qkv(2, 4, 40, 16), (32, 37, 37), strict=True))
    for turn in range(3):
        tilebook.scaled_dot_product_attention(q, k, v, attn_mask=_shown(32, 37), dropout_p=dropout)
        assert len(copied) == turn + 1


def test_tensors_that_lie_otherwise_are_copied_under_a_mask(pytorchs):
    q, k, v = _qkv()
    odd = torch.randn(2 * 4 * 32 * 16 + 1).bfloat16()[1:].view(2, 4, 32, 16)
    mask = MASKS["of each row"]()
    for given in ((odd, k, v), (q, odd, v), (q, k, odd)):
        for _ in range(2):
            found = tilebook.scaled_dot_product_attention(*given, attn_mask=mask)
            assert torch.equal(found, SDPA(*(x.clone() for x in given), attn_mask=mask))
            assert not any(x.data_ptr() % VECTOR for x in pytorchs[-1][0][:3])


def test_dropout_is_pytorchs(pytorchs):
    q = _qkv()
    for mask in (None, MASKS["of each row"](), _cut(32)):
        torch.manual_seed(3)
        right = SDPA(*q, attn_mask=None if mask is None else mask.contiguous(), dropout_p=0.5)
        torch.manual_seed(3)
        assert torch.equal(tilebook.scaled_dot_product_attention(*q, attn_mask=mask, dropout_p=0.5), right)
        assert pytorchs[-1][0][4] == 0.5
    odd = torch.randn(2 * 4 * 32 * 16 + 1).bfloat16()[1:].view(2, 4, 32, 16)
    tilebook.scaled_dot_product_attention(odd, *q[1:], dropout_p=0.5)
    assert not pytorchs[-1][0][0].data_ptr() % VECTOR


@pytest.mark.parametrize("shape", [(32, 16), (4, 32, 16), (2, 3, 4, 32, 16)], ids=str)
def test_any_number_of_axes_has_pytorchs_numbers(pytorchs, shape):
    q, mask = _qkv(*shape, dtype=torch.float32), MASKS["of each row"]()
    found = tilebook.scaled_dot_product_attention(*q, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, SDPA(*q, attn_mask=mask, scale=0.3))
    assert len(pytorchs) == 1


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3, 4)], ids=str)
def test_beside_four_axes_of_the_query_a_mask_has_four(pytorchs, lead, axes):
    """cuDNN refuses one axis, and of three takes the first for the batch."""
    q = _qkv(*lead, 32, 16, dtype=torch.float32)
    if axes > len(lead) + 2:
        pytest.skip("more than there are")
    mask = _shown(*(*lead, 32, 32)[-axes:])
    found = tilebook.scaled_dot_product_attention(*q, attn_mask=mask)
    torch.testing.assert_close(found, SDPA(*q, attn_mask=mask))
    (asked, _, _, passed, *_), _ = pytorchs[-1]
    assert asked.ndim == passed.ndim == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_of_booleans_autocast_makes_what_the_query_is_under_it(pytorchs, dtype):
    q, mask = _qkv(2, 4, 36, 16, dtype=dtype), _shown(36, 36)
    with torch.autocast("cpu", torch.bfloat16):
        right = SDPA(*q, attn_mask=mask)
        torch.testing.assert_close(tilebook.scaled_dot_product_attention(*q, attn_mask=mask), right)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive_is_followed(pytorchs, scale):
    q, mask = _qkv(dtype=torch.float32), MASKS["of each row"]()
    right = SDPA(-q[0] if scale else q[0] * 0, *q[1:], attn_mask=mask, scale=-scale or 1.0)
    torch.testing.assert_close(tilebook.scaled_dot_product_attention(*q, attn_mask=mask, scale=scale), right)


def test_gradients_are_pytorchs(pytorchs):
    q, mask = [x.requires_grad_() for x in _qkv(dtype=torch.float32)], MASKS["padded keys"]()
    right = torch.autograd.grad(SDPA(*q, attn_mask=mask).square().sum(), q)
    for _ in range(3):
        found = torch.autograd.grad(tilebook.scaled_dot_product_attention(*q, attn_mask=mask).square().sum(), q)
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_attention_under_a_mask_of_the_same_for_all_rows_looks_at_one(monkeypatch):
    """Of keys that are padded one row is made a score for PyTorch's kernels, not all."""
    seen = []
    monkeypatch.setattr(pytorch, "in_vectors", lambda mask, n_k, dtype: seen.append(mask.shape) or mask)
    monkeypatch.setattr(pytorch, "scaled_dot_product_attention", lambda q, *_, **__: q)

    class OnGpu(torch.Tensor):
        is_cuda = True

    q, k, v = (x.as_subclass(OnGpu) for x in _qkv())
    pytorch.sdpa(q, k, v, False, None, MASKS["padded keys"]())
    pytorch.sdpa(q, k, v, False, None, MASKS["of each head"]())
    assert seen == [(2, 1, 1, 32), (2, 4, 32, 32)]


def test_without_a_gpu_it_asks_nobody(monkeypatch):
    monkeypatch.setattr(package, "attend", None)
    monkeypatch.setattr(drop_in, "_fits", None)
    q, mask = _qkv(dtype=torch.float32), MASKS["of each row"]()
    assert torch.equal(tilebook.scaled_dot_product_attention(*q, attn_mask=mask), SDPA(*q, attn_mask=mask))
    assert torch.equal(tilebook.scaled_dot_product_attention(*q, is_causal=True), SDPA(*q, is_causal=True))
