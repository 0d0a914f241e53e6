"""Dropout of attention's weights: the same in every implementation, and in the gradients."""

import torch
from attention_formula import DEVICE, FORWARD, H200, shapes, tensors

import tilebook
from tilebook import dispatch
from tilebook.kernels.attention.philox import survives


def test_dropout_is_the_same_in_every_implementation_config_and_direction():
    q, k, v = tensors(*shapes(70, 90))
    found = []
    for name, config in (("triton", None), ("torch", None), ("triton", {"BLOCK_M": 128, "BLOCK_N": 64})):
        torch.manual_seed(3)
        base = FORWARD.tunable.space.default(FORWARD.problem.parse("B1,H2,S70,Sk90,D32", "bf16"), H200)
        with dispatch.use(name, base.replace(**config) if config else None):
            found.append(tilebook.attention(q, k, v, dropout_p=0.4))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=2e-2, atol=2e-2)
    with dispatch.use("triton"):
        assert not torch.allclose(found[0], tilebook.attention(q, k, v, dropout_p=0.4), atol=0.05)


def test_gradients_use_the_weights_that_dropout_kept():
    """o is linear in v and the dropped weights are constants: compare with the mask spelled out."""
    q, k, v = (x.requires_grad_() for x in tensors(*shapes(40, 60), dtype=torch.float32))
    torch.manual_seed(5)
    with dispatch.use("triton"):
        o = tilebook.attention(q, k, v, dropout_p=0.3)
    torch.manual_seed(5)
    seed = torch.randint(1 << 62, (1,), device=DEVICE)
    pairs, rows, columns = (torch.arange(n, device=DEVICE) for n in (2, 40, 60))
    kept = survives(seed, pairs[:, None, None], rows[:, None], columns, 0.3)
    assert abs(kept.float().mean().item() - 0.7) < 0.03
    truth = (kept / 0.7 * (q @ k.mT * 32**-0.5).softmax(-1)) @ v
    (do,) = tensors(o.shape, dtype=torch.float32, seed=9)
    for mine, right in zip(
        torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(truth, (q, k, v), do), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(o, truth, rtol=1e-3, atol=1e-4)


def test_random_bits_are_those_of_philox():
    """Against the known answer of Random123's Philox 4x32-7 for the all-zero counter and key."""
    zero = torch.zeros(1, dtype=torch.int64)
    first = 0x5F6FB709
    assert survives(zero, zero, zero, zero, (first >> 8) / 2**24).item()
    assert not survives(zero, zero, zero, zero, ((first >> 8) + 1) / 2**24).item()
