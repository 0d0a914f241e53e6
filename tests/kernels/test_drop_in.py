"""The drop-in gives what PyTorch's function gives, by our kernels."""

import pytest
import torch
import torch.nn.functional as F
from attention_formula import DEVICE, tensors

import tilebook
from tilebook import dispatch
from tilebook.kernels.attention import drop_in


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "scale": 0.3},
        {"attn_mask": torch.rand(20, 30) < 0.6},
        {"attn_mask": torch.randn(2, 1, 1, 30)},
        {"attn_mask": torch.zeros(20, 30, dtype=torch.bool)},
    ],
    ids=["plain", "causal", "boolean", "float", "nothing to see"],
)
@pytest.mark.parametrize("lead", [(), (2,), (3, 2)], ids=["3-D", "4-D", "5-D"])
def test_drop_in_is_pytorch_s_function(options, lead):
    q, k, v = tensors(*[(*lead, 2, n, 32) for n in (20, 30, 30)], dtype=torch.float32)
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    if not lead and "attn_mask" in options and options["attn_mask"].ndim == 4:
        options["attn_mask"] = options["attn_mask"][0]
    ours, theirs = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    expected = F.scaled_dot_product_attention(*theirs, **options)
    with dispatch.use("triton"):
        o = tilebook.scaled_dot_product_attention(*ours, **options)
    assert o.shape == expected.shape
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)
    o.square().sum().backward()
    expected.square().sum().backward()
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, right.grad, rtol=1e-3, atol=1e-4)


def test_drop_in_gives_pytorch_what_no_kernel_has():
    q, k, v = tensors((2, 4, 20, 32), (2, 2, 30, 32), (2, 2, 30, 16), dtype=torch.float32)
    with dispatch.use("triton"):
        o = tilebook.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        assert torch.equal(o, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
        with pytest.raises(RuntimeError):
            tilebook.scaled_dot_product_attention(q, k, v)
        with pytest.raises(RuntimeError, match="is_causal"):
            tilebook.scaled_dot_product_attention(q, k, v, torch.ones(20, 30, dtype=torch.bool), is_causal=True)


@pytest.mark.parametrize("warns", [False, True])
def test_programs_that_are_to_be_warned_of_what_does_not_repeat_get_pytorchs(warns, monkeypatch):
    """Ours repeat their bits, so that nobody would be warned."""
    called = []
    plain = drop_in.plain_sdpa
    monkeypatch.setattr(drop_in, "plain_sdpa", lambda *args, **options: called.append(1) or plain(*args, **options))
    q, k, v = tensors(*[(1, 2, 16, 16)] * 3, dtype=torch.float32)
    torch.use_deterministic_algorithms(True, warn_only=warns)
    try:
        with dispatch.use("triton"):
            tilebook.scaled_dot_product_attention(q, k, v)
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(called) is warns


def _call(*shape, mask=None, dtype=torch.float32, autocast=False, **more):
    return (shape, dtype, mask), more, autocast


REFUSED = {
    "a mask of no axis": _call(2, 4, 8, 16, mask=torch.tensor(0.5)),
    "groups without heads": _call(8, 16, enable_gqa=True),
    "complex numbers": _call(2, 4, 8, 16, mask=torch.ones(8, 8, dtype=torch.bool), dtype=torch.complex64),
    "a mask that autocast casts beside a query that it does not": _call(
        2, 4, 8, 16, mask=torch.zeros(8, 8), dtype=torch.float64, autocast=True
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_pytorch_refuses_is_refused(name):
    (shape, dtype, mask), more, autocast = REFUSED[name]
    q = torch.randn(shape, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with pytest.raises(Exception) as right:  # noqa: PT011
            F.scaled_dot_product_attention(q, q, q, mask, **more)
        with dispatch.use("torch"), pytest.raises(right.type):
            tilebook.scaled_dot_product_attention(q, q, q, mask, **more)
