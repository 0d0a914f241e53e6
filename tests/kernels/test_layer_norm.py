import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import device as devices
from tilebook import dispatch, op
from tilebook.tuner.judge.verify import Case, error, floors, verify

OPS = [op.get(name) for name in ("layer_norm_fwd", "layer_norm_bwd")]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")

CONFIGS = [
    op.Config(ROWS=1, BLOCK=65536, num_warps=4),  # a whole row at a time, whatever its width
    op.Config(ROWS=4, BLOCK=1024, num_warps=8),  # rows wider than 1024 in pieces
    op.Config(ROWS=16, BLOCK=2048, num_warps=1),
]


def plain(x, weight=None, bias=None, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def triple(shape, dtype=torch.float32, offset=0.0):
    """x, weight, bias as leaves that ask for gradients."""
    generator = torch.Generator().manual_seed(0)
    x, *vectors = (torch.randn(size, generator=generator) for size in (shape, shape[-1:], shape[-1:]))
    return [each.to(dtype).requires_grad_() for each in (x + offset, *vectors)]


def gradients(function, tensors, dy):
    y = function(*tensors)
    return y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))


def assert_no_worse(ours, theirs, truth, dtype):
    for name, mine, other, right in zip(("y", "dx", "dweight", "dbias"), ours, theirs, truth, strict=False):
        assert mine.shape == other.shape
        assert mine.dtype == other.dtype
        floor, seen, allowed = floors(right.float(), dtype, dtype), error(mine, right), error(other, right)
        assert seen.max <= 2 * allowed.max + floor.max, name
        assert seen.rms <= 2 * allowed.rms + floor.rms, name


@pytest.mark.sampled(4)
@interpreted
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("each", OPS, ids=lambda each: each.name)
def test_other_configs_are_right_too(each, config):
    if each.direction == "bwd":
        config = config.replace(PER_SM=1)
    for problem in each.problem.examples():
        verify(each.tunable, config, [Case.make(each, problem, "cpu", 1)], repeats=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("gpu", devices.CATALOGUE.values(), ids=lambda gpu: gpu.name)
def test_every_width_has_a_default_and_a_space(gpu):
    for each in OPS:
        space = each.tunable.space
        for width in (1, 24, 1000, 4096, 16384, 65536):
            for parameters in ("", ",unbiased", ",bare"):
                problem = each.problem.parse(f"M8192,N{width}{parameters}", "bf16")
                assert space.reject(problem, space.default(problem, gpu), gpu) is None
                assert len(space.feasible(problem, gpu)) >= 5


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_the_cpu_it_is_pytorch_bit_for_bit(dtype, count):
    tensors = triple((3, 5, 48), dtype)[:count]
    dy = torch.randn(3, 5, 48)
    for mine, right in zip(gradients(tilebook.layer_norm, tensors, dy), gradients(plain, tensors, dy), strict=True):
        assert torch.equal(mine, right)


@interpreted
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 33, 100), torch.bfloat16), ((64,), torch.float16), ((7, 1500), torch.bfloat16), ((5, 40), torch.float32)],
)
def test_kernels_and_their_gradients_err_at_most_twice_as_much_as_pytorch(shape, dtype, count):
    tensors = triple(shape, dtype)[:count]
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    with dispatch.use("triton"):
        ours = gradients(tilebook.layer_norm, tensors, dy)
    truth = gradients(plain, [tensor.detach().double().requires_grad_() for tensor in tensors], dy)
    assert_no_worse(ours, gradients(plain, tensors, dy), truth, dtype)


@interpreted
@pytest.mark.parametrize("config", [None, CONFIGS[1]], ids=["whole rows", "in pieces"])
def test_a_large_mean_costs_no_more_digits_than_it_costs_pytorch(config):
    tensors = triple((9, 3000), offset=1e4)
    dy = torch.randn(9, 3000, generator=torch.Generator().manual_seed(7))
    with dispatch.use("triton", config):
        y = tilebook.layer_norm(*tensors)
        with dispatch.use("triton", config and config.replace(PER_SM=1)):
            ours = y, *torch.autograd.grad(y, tensors, dy)
    truth = gradients(plain, [tensor.detach().double().requires_grad_() for tensor in tensors], dy)
    assert_no_worse(ours, gradients(plain, tensors, dy), truth, torch.float32)


@interpreted
def test_gradients_repeat_bit_for_bit_and_only_what_is_wanted_is_given():
    x, weight, bias = triple((100, 96), torch.bfloat16)
    dy = torch.ones(100, 96).bfloat16()
    with dispatch.use("triton"):
        first, second = (gradients(tilebook.layer_norm, (x, weight, bias), dy) for _ in range(2))
        alone = tilebook.layer_norm(x.detach(), weight.detach(), bias)
        (dbias,) = torch.autograd.grad(alone, bias, dy)
    assert all(torch.equal(mine, again) for mine, again in zip(first, second, strict=True))
    assert torch.equal(dbias, first[3])


@interpreted
def test_vectors_are_taken_with_their_strides_and_dtypes():
    x, weight, bias = triple((40, 48), torch.bfloat16)
    dy = torch.randn(40, 48).bfloat16()
    wide = [torch.stack((each.detach().float(), each.detach().float() + 1), 1)[:, 0] for each in (weight, bias)]
    with dispatch.use("triton"):
        right = gradients(tilebook.layer_norm, (x, weight, bias), dy)
        ours = gradients(tilebook.layer_norm, (x, *(each.requires_grad_() for each in wide)), dy)
    assert [each.dtype for each in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for mine, other in zip(ours, right, strict=True):
        torch.testing.assert_close(mine.to(other.dtype), other, rtol=0, atol=0)


@interpreted
def test_a_bias_without_a_weight_is_pytorchs_and_empty_stays_empty():
    x, _, bias = triple((6, 24))
    with dispatch.use("triton"):
        assert torch.equal(tilebook.layer_norm(x, None, bias), plain(x, None, bias))
        assert tilebook.layer_norm(x[:0], None, bias).shape == (0, 24)
    assert torch.equal(tilebook.layer_norm(torch.full((3, 8), 7.0), torch.ones(8)), torch.zeros(3, 8))


def test_the_dtype_is_that_of_x_under_autocast_too():
    x, weight, bias = triple((6, 24), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tilebook.layer_norm(x, weight.float(), bias.float()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"x must be floating point \(…, N\), not torch.float32 \(\)"),
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, "must be floating point"),
        ({"weight": torch.zeros(7)}, r"and weight \(N,\), not \(3, 8\) and \(7,\)"),
        ({"bias": torch.zeros(2, 8)}, r"and bias \(N,\), not \(3, 8\) and \(2, 8\)"),
        ({"bias": torch.zeros(8, device="meta")}, "bias is on meta, but x on cpu"),
        ({"bias": torch.zeros(8, dtype=torch.int64)}, "bias must be floating point"),
        ({"weight": 1.0}, "expected a tensor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_inputs_are_named(change, message):
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(8), "bias": torch.zeros(8)} | change
    with pytest.raises(ValueError, match=message):
        tilebook.layer_norm(**arguments)


def test_fp64_stays_fp64_beside_parameters_in_fp32():
    x, weight, bias = torch.randn(5, 64, dtype=torch.float64, requires_grad=True), torch.randn(64), torch.randn(64)
    wide = x.detach().clone().requires_grad_()
    y, truth = tilebook.layer_norm(x, weight, bias), F.layer_norm(wide, (64,), weight.double(), bias.double(), 1e-5)
    y.sum().backward()
    truth.sum().backward()
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, wide.grad, rtol=1e-12, atol=1e-12)
