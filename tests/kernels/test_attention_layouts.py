"""Tensors that lie otherwise than they might: cut out of larger ones, expanded, at odd addresses."""

import pytest
import torch

from tilebook import device as devices
from tilebook.kernels.attention import pytorch
from tilebook.kernels.attention.form import PLAIN, form
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd
from tilebook.kernels.attention.peers import flash4, torch_flash
from tilebook.launch import intercepted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = devices.find("H200")


def _random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.float16)


def _both(q, k, v, do, kind, *extras):
    """o, lse and all gradients by our kernels' default configs."""
    call = q, k, v, kind, 0.25, *extras
    forward = attention_fwd.tunable.space.default(attention_fwd.problem.of(*call), H200)
    o, lse = attention_fwd.tunable(*call, config=forward)
    call = do, q, k, v, o, lse, kind, 0.25, *extras
    backward = attention_bwd.tunable.space.default(attention_bwd.problem.of(*call), H200)
    return o, lse, *attention_bwd.tunable(*call, config=backward)


def _cut(x, offset, step):
    """The same numbers, `offset` elements into a larger piece of memory, rows `step` elements apart."""
    whole = torch.zeros(offset + x[..., 0].numel() * step + 64, dtype=x.dtype, device=x.device)
    rows = whole[offset : offset + x[..., 0].numel() * step].view(*x.shape[:-1], step)
    return rows[..., : x.shape[-1]].copy_(x)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("kind", ["mask", "bias", "dbias"])
@pytest.mark.parametrize("shape", [(5, 1), (1, 40), (2, 1, 5, 40), (2, 2, 5, 40), (2, 1, 40), (1, 1)])
def test_masks_and_biases_may_be_cut_out_of_larger_ones_anywhere(kind, shape):
    q, do = _random((2, 2, 5, 64), 0), _random((2, 2, 5, 64), 1)
    k, v = _random((2, 2, 40, 64), 2), _random((2, 2, 40, 64), 3)
    table = _random(shape, 4)[(None,) * (4 - len(shape))]
    table = table > -0.5 if kind == "mask" else table
    expected = _both(q, k, v, do, form(bias=kind), table)
    for offset, more in ((1, 0), (3, 1), (0, 7), (7, 24)):
        odd = _cut(table, offset, shape[-1] + more)
        assert torch.equal(odd, table)
        for got, right in zip(_both(q, k, v, do, form(bias=kind), odd), expected, strict=True):
            assert torch.equal(got, right)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), (0, 1, 2)], ids=str)
def test_keys_and_values_may_be_expanded(axes):
    q, do = _random((2, 4, 33, 32), 0), _random((2, 4, 33, 32), 1)
    shape = [1 if axis in axes else n for axis, n in enumerate((2, 4, 40, 32))]
    k, v = (_random(shape, seed).expand(2, 4, 40, 32) for seed in (2, 3))
    found = _both(q, k, v, do, PLAIN)
    for got, right in zip(found, _both(q, k.contiguous(), v.contiguous(), do, PLAIN), strict=True):
        assert torch.equal(got, right)
    assert 0 not in found[3].stride()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("offset", [1, 4, 8])
def test_the_gluon_kernel_s_descriptors_have_addresses_and_steps_that_the_hardware_takes(batch, offset):
    """Contiguous tensors too may begin at any address, and an axis of length 1 may have any step."""
    whole = torch.empty(offset + batch * 2 * 128 * 64, dtype=torch.float16)
    q = whole[offset:].view(batch, 2, 128, 64)
    if batch == 1:
        q = q.as_strided(q.shape, (7, *q.stride()[1:]), offset)
    started = []
    with intercepted(lambda kernel, grid, args, meta: started.append(args)):
        gluon = attention_fwd.implementations["gluon"]
        gluon(q, q, q, PLAIN, 0.2, config=gluon.space.default(attention_fwd.problem.of(q, q, q, PLAIN, 0.2), H200))
    described = [each for each in started[0] if hasattr(each, "block_shape")]
    assert len(described) == 4
    for each in described:
        assert each.base.data_ptr() % 16 == 0
        assert all(step * 2 % 16 == 0 for step in each.strides[:-1])


def test_kernels_of_others_are_given_tensors_that_begin_where_they_load(monkeypatch):
    """PyTorch's and FlashAttention's load 16 bytes at a time without looking; views may begin anywhere."""
    given = []

    def forward(*args, **options):
        given.extend(x for x in args if isinstance(x, torch.Tensor))
        return args[0], args[0].new_empty(2, 3, 40, dtype=torch.float32)

    def backward(*args, **options):
        given.extend(x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.float16)
        return args[1:4]

    class Aten:
        _flash_attention_forward, _flash_attention_backward = staticmethod(forward), staticmethod(backward)

    monkeypatch.setattr(flash4, "_functions", lambda: (forward, backward))
    monkeypatch.setattr(torch_flash, "_aten", Aten)
    q, k, v, do, o = (_cut(_random((2, 3, 40, 32), seed), 1, 32 + seed) for seed in range(5))
    for module in (flash4, torch_flash):
        _, lse = module.forward(q, k, v, PLAIN, 0.2)
        module.backward(do, q, k, v, o, lse, PLAIN, 0.2)
    assert len(given) == 16
    assert all(x.data_ptr() % 16 == 0 for x in given)
    assert all(step * 2 % 16 == 0 for x in given for step in x.stride()[:-1])


@pytest.mark.parametrize("kind", ["added", "boolean", "learnt"])
@pytest.mark.parametrize("columns", [96, 77])
def test_masks_begin_where_pytorchs_kernels_load_them(monkeypatch, kind, columns):
    """They load whole vectors without looking, and a mask that is one row is in one piece wherever it begins."""
    given = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(
        pytorch, "scaled_dot_product_attention", lambda q, k, v, mask, **_: (given.append(mask), q * mask.sum())[1]
    )
    large = torch.randn(7, 131, 137).to(torch.bfloat16)
    if kind == "boolean":
        large = large > -0.5
    large.requires_grad_(kind == "learnt")
    q, k = _random((2, 4, 96, 64), 0).bfloat16(), _random((2, 4, columns, 64), 1).bfloat16()
    cuts = (
        large[0, :96, 1 : 1 + columns], large[0, 3:99, 5 : 5 + columns], large[1:5, :96, 7 : 7 + columns],
        large[0, :96, 3:4], large[0, 2:3, 1 : 1 + columns], large[0, 2:3, 1:2],
    )  # fmt: skip
    for cut in cuts:
        mask = cut.view(*[1] * (4 - cut.ndim), *cut.shape)
        pytorch.sdpa(q, k, k, False, None, mask)
        found = given.pop()
        assert found.shape[-1] == columns
        assert found.data_ptr() % 16 == 0
        assert all(step * 2 % 16 == 0 for step, n in zip(found.stride()[:-1], found.shape, strict=False) if n > 1)
