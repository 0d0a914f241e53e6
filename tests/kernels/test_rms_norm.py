import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import device as devices
from tilebook import dispatch, op
from tilebook.tuner.judge.verify import Case, error, floors, verify

OPS = [op.get(name) for name in ("rms_norm_fwd", "rms_norm_bwd")]
H200 = devices.find("H200")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")

CONFIGS = [
    op.Config(ROWS=1, BLOCK=65536, num_warps=4),  # a whole row at a time, whatever its width
    op.Config(ROWS=4, BLOCK=1024, num_warps=8),  # rows wider than 1024 in pieces
    op.Config(ROWS=16, BLOCK=2048, num_warps=1),
]


def plain(x, weight=None, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def pair(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(size, generator=generator).to(dtype) for size in (shape, shape[-1:]))
    return x.requires_grad_(), weight.requires_grad_()


def gradients(function, tensors, dy):
    y = function(*tensors)
    return y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))


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
            problem = each.problem.parse(f"M8192,N{width}", "bf16")
            assert space.reject(problem, space.default(problem, gpu), gpu) is None
            assert len(space.feasible(problem, gpu)) >= 5


def test_one_verdict_serves_a_bucket_of_rows():
    x, weight = torch.zeros(1000, 64), torch.zeros(64)
    assert OPS[0].problem.of(x, weight, 1e-6).label == "M1024,N64"
    assert OPS[0].problem.of(x[:513], weight, 1e-6).label == "M1024,N64"
    assert OPS[0].problem.of(x[:512], weight, 1e-6).label == "M512,N64"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_the_cpu_it_is_pytorch_bit_for_bit(dtype):
    tensors = pair((3, 5, 48), dtype)
    dy = torch.randn(3, 5, 48)
    for mine, right in zip(gradients(tilebook.rms_norm, tensors, dy), gradients(plain, tensors, dy), strict=True):
        assert torch.equal(mine, right)


@interpreted
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 33, 100), torch.bfloat16), ((64,), torch.float16), ((7, 1500), torch.bfloat16), ((5, 40), torch.float32)],
)
def test_kernels_and_their_gradients_err_at_most_twice_as_much_as_pytorch(shape, dtype):
    tensors = pair(shape, dtype)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    with dispatch.use("triton"):
        ours = gradients(tilebook.rms_norm, tensors, dy)
    theirs = gradients(plain, tensors, dy)
    truth = gradients(plain, [tensor.detach().double().requires_grad_() for tensor in tensors], dy)
    for name, mine, other, right in zip(("y", "dx", "dweight"), ours, theirs, truth, strict=True):
        assert mine.shape == other.shape
        assert mine.dtype == other.dtype
        floor, seen, allowed = floors(right.float(), dtype, dtype), error(mine, right), error(other, right)
        assert seen.max <= 2 * allowed.max + floor.max, name
        assert seen.rms <= 2 * allowed.rms + floor.rms, name


@interpreted
@pytest.mark.parametrize(("shape", "dtype"), [((2, 33, 100), torch.bfloat16), ((7, 1500), torch.float32)])
def test_without_a_weight_it_is_as_with_ones(shape, dtype):
    x, _ = pair(shape, dtype)
    dy = torch.randn(shape).to(dtype)
    with dispatch.use("triton"):
        bare = gradients(tilebook.rms_norm, (x,), dy)
        ones = gradients(lambda x: tilebook.rms_norm(x, torch.ones(shape[-1], dtype=dtype)), (x,), dy)
    for mine, right, pytorch in zip(bare, ones, gradients(plain, (x,), dy), strict=True):
        assert torch.equal(mine, right)
        torch.testing.assert_close(mine, pytorch, rtol=2**-7, atol=2**-7)
    assert torch.equal(tilebook.rms_norm(x), plain(x))


def test_keys_of_before_there_was_one_without_a_weight_stay_valid():
    for each in OPS:
        problem = each.problem.parse("M8,N16", "bf16")
        assert problem.key == '{"dtype":"bf16","rows":8,"width":16}'
        assert each.problem.parse("M8,N16,bare", "bf16").distance(problem) == float("inf")


@interpreted
def test_gradients_repeat_bit_for_bit():
    tensors = pair((100, 96), torch.bfloat16)
    with dispatch.use("triton"):
        first, second = (gradients(tilebook.rms_norm, tensors, torch.ones(100, 96)) for _ in range(2))
    assert all(torch.equal(mine, again) for mine, again in zip(first, second, strict=True))


@interpreted
def test_views_and_expanded_gradients_give_the_same():
    x, weight = pair((40, 48), torch.bfloat16)
    wide = torch.full((41, 64), float("nan"), dtype=torch.bfloat16)
    view = wide[:40, 3:51]
    view.copy_(x.detach())
    with dispatch.use("triton"):
        y = tilebook.rms_norm(x, weight)
        assert torch.equal(tilebook.rms_norm(view, weight), y)
        assert torch.equal(tilebook.rms_norm(x.t().contiguous().t(), weight), y)
        (expanded,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        (dense,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(expanded, dense)


@interpreted
@pytest.mark.parametrize(
    "vector",
    [lambda base: torch.stack((base, -base), 1)[:, 0], lambda base: base[:1].expand(48)],
    ids=["column of a matrix", "one number expanded"],
)
def test_a_weight_is_taken_with_its_stride(vector):
    x, base = pair((40, 48))
    dy = torch.randn(40, 48)
    with dispatch.use("triton"):
        ours = gradients(lambda *given: tilebook.rms_norm(given[0], vector(given[1])), (x, base), dy)
    theirs = gradients(lambda *given: plain(given[0], vector(given[1])), (x, base), dy)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


@interpreted
def test_a_launcher_takes_vectors_with_their_strides():
    x, weight = (tensor.detach() for tensor in pair((40, 48)))
    strided = torch.stack((weight, -weight), 1)[:, 0]
    with dispatch.use("triton"):
        y, rstd = dispatch.run(OPS[0], x, weight, 1e-6)
        assert torch.equal(dispatch.run(OPS[0], x, strided, 1e-6)[0], y)
        apart = torch.stack((rstd, -rstd), 1)[:, 0]
        dense, other = (dispatch.run(OPS[1], x, x, *vectors) for vectors in ((weight, rstd), (strided, apart)))
    assert all(torch.equal(mine, right) for mine, right in zip(dense, other, strict=True))


@interpreted
def test_a_weight_in_fp32_beside_bf16_keeps_its_dtype_in_the_gradient():
    x, _ = pair((20, 48), torch.bfloat16)
    _, weight = pair((20, 48))
    dy = torch.randn(20, 48).bfloat16()
    with dispatch.use("triton"):
        y, dx, dweight = gradients(tilebook.rms_norm, (x, weight), dy)
    right = gradients(plain, (x.detach().float().requires_grad_(), weight), dy)
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(dweight, right[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx.float(), right[1], rtol=2**-7, atol=2**-7)


def test_zeros_stay_zeros_and_empty_stays_empty():
    assert torch.equal(tilebook.rms_norm(torch.zeros(3, 8), torch.ones(8)), torch.zeros(3, 8))
    with dispatch.use("triton"):
        assert tilebook.rms_norm(torch.zeros(0, 8), torch.ones(8)).shape == (0, 8)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(()), torch.zeros(8), r"x must be floating point \(…, N\), not torch.float32 \(\)"),
        (torch.zeros(3, 8), torch.zeros(7), r"not \(3, 8\) and \(7,\)"),
        (torch.zeros(3, 8), torch.zeros(8, device="meta"), "weight is on meta, but x on cpu"),
        (torch.zeros(3, 8, dtype=torch.int64), torch.zeros(8), "must be floating point"),
    ],
)
def test_bad_inputs_are_named(x, weight, message):
    with pytest.raises(ValueError, match=message):
        tilebook.rms_norm(x, weight)


@interpreted
def test_a_wrong_call_of_the_ops_is_a_value_error():
    x, weight, ops = torch.zeros(4, 64), torch.zeros(64), torch.ops.tilebook
    with dispatch.use("triton"):
        with pytest.raises(ValueError, match=r"expected x \(…, N\) and weight \(N,\), not \(4, 64\) and \(7,\)"):
            ops.rms_norm_fwd(x, weight[:7], 1e-6)
        with pytest.raises(ValueError, match=r"expected x \(M, N\) or \(B, S, N\), not \(1, 2, 2, 64\)"):
            ops.rms_norm_fwd(x.view(1, 2, 2, 64), weight, 1e-6)
        for dy, rstd in ((torch.zeros(4, 7), torch.ones(4)), (x, torch.ones(3))):
            with pytest.raises(ValueError, match=r"are not of x \(4, 64\)"):
                ops.rms_norm_bwd(dy, x, weight, rstd, 1e-6, [True, True])


def test_fp64_stays_fp64_beside_a_weight_in_fp32():
    x, weight = torch.randn(5, 64, dtype=torch.float64, requires_grad=True), torch.randn(64)
    wide = x.detach().clone().requires_grad_()
    y, truth = tilebook.rms_norm(x, weight), F.rms_norm(wide, (64,), weight.double(), 1e-6)
    y.sum().backward()
    truth.sum().backward()
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, wide.grad, rtol=1e-12, atol=1e-12)
