"""mLSTM on the GPU that is here: lengths that no interpreter runs, against its formula by chunks in fp64."""

import pytest
import torch
from agreeing import assert_rounded_otherwise, feasible_agreeing

import tilebook
from tilebook import dispatch

pytestmark = pytest.mark.gpu
NAMES = "o", "dq", "dk", "dv", "gates"


def drawn(n, *, batch=1, heads=2, width=64, columns=None, dtype=torch.bfloat16, gates=3.0, seed=0):
    """Positive q and k, so that no divisor is a difference of large numbers; v; gates before their functions."""
    source = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(batch, heads, *shape, device="cuda", generator=source)

    q, k, v = normal(n, width).abs(), normal(n, width).abs(), normal(n, columns or width)
    i, f = (gates * normal(n).clamp(-1, 1) for _ in range(2))
    return [x.requires_grad_() for x in (*(x.to(dtype) for x in (q, k, v)), i, f + gates)]


def results(tensors, above):
    o = tilebook.mlstm(*tensors)
    *grads, di, df = torch.autograd.grad(o, tensors, above.to(o.dtype))
    return [o, *grads, torch.stack((di, df))]


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "width", "columns"), [(1, 64, 64), (100, 64, 64), (2500, 128, 128), (700, 256, 128)])
@pytest.mark.parametrize("gates", [3.0, 30.0])
def test_errors_are_at_most_twice_those_of_the_same_in_pytorch(n, width, columns, dtype, gates):
    tensors = drawn(n, width=width, columns=columns, dtype=dtype, gates=gates)
    above = torch.randn_like(tensors[2])
    with dispatch.use("torch"):
        truth = results([x.detach().double().requires_grad_() for x in tensors], above)
        theirs = results(tensors, above)
    with dispatch.use("triton"):
        found = results(tensors, above)
    # Gates are exponents, which are rounded themselves.
    steps = torch.finfo(dtype).eps * (max(8, gates) if dtype == torch.float32 else 1)
    for name, mine, other, right in zip(NAMES, found, theirs, truth, strict=True):
        # Of one token all that q and k have to do with the result cancels.
        size = max(rms(right), rms((truth[0] * above).sum(-1)) if name == "gates" or n == 1 else 0)
        assert rms(mine - right) <= 2 * rms(other - right) + steps * size + 1e-9, name


def test_a_long_sequence_is_what_it_is_by_parts_and_by_steps():
    rows = [x.detach() for x in drawn(20000)]
    with dispatch.use("triton"):
        o = tilebook.mlstm(*rows)
        parts, at = [], None
        for part in range(0, 20000, 3000):
            some = [x[:, :, part : part + 3000] for x in rows]
            made, at = tilebook.mlstm(*some, initial_state=at, return_state=True)
            parts.append(made)
    torch.testing.assert_close(torch.cat(parts, 2).float(), o.float(), rtol=5e-2, atol=5e-2 * o.float().std().item())
    state = tuple(torch.zeros(1, 2, *shape, device="cuda") for shape in ((64, 64), (64,), ()))
    for t in range(100):
        one, state = tilebook.mlstm_step(*(x[:, :, t] for x in rows), state)
        torch.testing.assert_close(one.float(), o[:, :, t].float(), rtol=2e-2, atol=4e-2 * o.float().std().item())


@pytest.mark.parametrize("name", ["mlstm_fwd", "mlstm_bwd"])
@pytest.mark.parametrize(("shape", "dtype"), [("B2,H4,S3000,D64,initial", "bf16"), ("B2,H4,S900,D128,V64", "fp16")])
def test_feasible_configs_agree(name, shape, dtype):
    assert feasible_agreeing(name, f"{shape},decay,normalized", dtype, 16) > 6


def test_results_repeat_bit_for_bit_and_compiled_they_are_the_same():
    tensors = drawn(3000, batch=4, heads=8)
    above = torch.randn_like(tensors[2])
    with dispatch.use("triton"):
        first, second = (results(tensors, above) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    compiled = torch.compile(lambda *x: 2 * tilebook.mlstm(*x), fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), 2 * tilebook.mlstm(*tensors), rtol=1e-2, atol=1e-2)


def test_a_pack_is_its_sequences():
    lengths = [1000, 0, 1, 3000, 64, 37, 2]
    tensors = drawn(sum(lengths))
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device="cuda")
    with dispatch.use("triton"):
        whole = tilebook.mlstm(*tensors, cu_seqlens=ends)
        parts = zip(*(x.split(lengths, 2) for x in tensors), strict=True)
        apart = torch.cat([tilebook.mlstm(*part) for part in parts if part[0].shape[2]], 2)
    assert_rounded_otherwise(whole, apart)
