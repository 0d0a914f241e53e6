import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import device as devices
from tilebook import dispatch, op
from tilebook.tuner.judge.verify import Case, error, floors, verify

GRADS = op.get("mlp_grads_bwd")
OPS = [op.get(name) for name in ("mlp_up_fwd", "mlp_down_fwd", "mlp_act_bwd")]
H200 = devices.find("H200")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")

CONFIGS = [
    op.Config(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=group, num_warps=4, num_stages=stages, DESCRIPTORS=descriptors)
    for m, n, k, group, stages, descriptors in (
        (64, 64, 64, 1, 3, 1),
        (64, 128, 64, 8, 4, 2),
        (128, 64, 32, 8, 2, 0),
        (128, 256, 128, 1, 2, 2),
    )
]


def activate(z, activation):
    return F.relu(z) if activation == "relu" else F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def eager(x, w1, b1, w2, b2, activation="gelu"):
    return F.linear(activate(F.linear(x, w1, b1), activation), w2, b2)


def block(rows=(40,), width=48, inner=72, dtype=torch.float32, seed=0):
    """x, w1, b1, w2, b2 as leaves that ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*rows, width), (inner, width), (inner,), (width, inner), (width,))
    scales = (1.0, width**-0.5, 0.5, inner**-0.5, 0.5)
    made = [torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, scales, strict=True)]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def gradients(function, tensors, dy, **options):
    y = function(*tensors, **options)
    return y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))


@interpreted
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("each", OPS, ids=lambda each: each.name)
def test_other_configs_are_right_too(each, config):
    for problem in each.problem.examples():
        verify(each.tunable, config, [Case.make(each, problem, "cpu", 1)], repeats=0)


@interpreted
@pytest.mark.parametrize(
    "config",
    [
        op.Config(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=group, num_warps=warps, num_stages=3)
        for m, n, k, group, warps in ((64, 64, 64, 1, 4), (128, 64, 32, 8, 8), (64, 128, 128, 8, 4))
    ],
    ids=repr,
)
def test_other_configs_of_the_gradients_are_right_too(config):
    for problem in GRADS.problem.examples():
        verify(GRADS.tunable, config, [Case.make(GRADS, problem, "cpu", 1)], repeats=0)


FEW_ROWS = [
    op.Config(BLOCK_M=m, BLOCK_N=64, BLOCK_K=k, GROUP_M=1, num_warps=4, num_stages=3, DESCRIPTORS=0, **split)
    for m, k, split in ((16, 64, {}), (16, 32, {"SPLIT": 4}), (32, 64, {"SPLIT": 2}), (64, 32, {"SPLIT": 8}))
]


@pytest.mark.sampled(4)
@interpreted
@pytest.mark.parametrize("config", FEW_ROWS, ids=repr)
@pytest.mark.parametrize("each", OPS, ids=lambda each: each.name)
def test_few_rows_by_small_tiles_and_shares_of_the_sums_are_right(each, config):
    for text in ("M1,H72,I200", "M16,H320,I136,gelu_tanh", "M11,H45,I91,relu", "M37,H200,I72"):
        verify(each.tunable, config, [Case.make(each, each.problem.parse(text, "bf16"), "cpu", 1)], repeats=2)


def test_small_tiles_and_shares_are_for_few_rows():
    space = OPS[1].tunable.space
    few, many = (OPS[1].problem.parse(text, "bf16") for text in ("M16,H4096,I14336", "M1568,H4096,I14336"))
    assert all(space.reject(few, config, H200) is None for config in FEW_ROWS[:1])
    split = FEW_ROWS[1].replace(BLOCK_K=64)
    assert space.contains(split)
    assert space.reject(few, split, H200) is None
    assert "anew" in space.reject(many, FEW_ROWS[0], H200)
    assert "shares of the sums" in space.reject(many, FEW_ROWS[3], H200)
    assert "large tiles" in space.reject(few, split.replace(DESCRIPTORS=1), H200)
    assert "two blocks" in space.reject(OPS[1].problem.parse("M16,H64,I256", "bf16"), split, H200)
    assert not {"SPLIT"} & {axis for config in space.feasible(many, H200) for axis in config}


def test_large_products_are_left_to_pytorch():
    assert GRADS.tunable.supports(GRADS.problem.parse("M4096,H768,I3072", "bf16"))
    assert not GRADS.tunable.supports(GRADS.problem.parse("M8192,H4096,I14336", "bf16"))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("gpu", devices.CATALOGUE.values(), ids=lambda gpu: gpu.name)
def test_space_is_worth_searching_on_every_gpu(gpu):
    for each in OPS:
        for problem in each.problem.suites()["seeds"]:
            assert 30 <= len(each.tunable.space.feasible(problem, gpu)) <= 1000


def test_a_config_says_why_it_is_rejected():
    (problem,) = OPS[0].problem.suites()["quick"]
    space = OPS[0].tunable.space
    base = space.default(problem, H200)
    odd = OPS[0].problem.parse("M100,H45,I45", "bf16")
    assert "shared memory" in space.reject(problem, base.replace(BLOCK_N=256, BLOCK_K=128, num_stages=5), H200)
    assert "spill" in space.reject(problem, base.replace(BLOCK_M=256, BLOCK_N=256, num_stages=2), H200)
    assert "descriptors" in space.reject(problem, base.replace(DESCRIPTORS=1), devices.find("A100"))
    assert "16 bytes" in space.reject(odd, space.default(odd, H200).replace(DESCRIPTORS=1), H200)


def test_down_projection_shares_its_verdict_between_activations():
    kind = op.get("mlp_down_fwd").problem
    assert kind.parse("M8,H16,I32,relu", "bf16") == kind.parse("M8,H16,I32", "bf16")


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_the_cpu_it_is_pytorch_bit_for_bit(dtype, activation):
    tensors = block((3, 5), dtype=dtype)
    dy = torch.randn(3, 5, 48)
    ours = gradients(tilebook.mlp, tensors, dy, activation=activation)
    theirs = gradients(eager, tensors, dy, activation=activation)
    for mine, right in zip(ours, theirs, strict=True):
        assert torch.equal(mine, right)


def test_missing_biases_and_empty_inputs_run_as_pytorch():
    x, w1, b1, w2, b2 = block()
    assert torch.equal(tilebook.mlp(x, w1, None, w2, None), eager(x, w1, None, w2, None))
    with dispatch.use("triton"):
        assert tilebook.mlp(x[:0], w1, b1, w2, b2).shape == (0, 48)


@interpreted
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(("rows", "dtype"), [((2, 33), torch.bfloat16), ((1,), torch.float16), ((), torch.bfloat16)])
def test_kernels_and_their_gradients_err_at_most_twice_as_much_as_pytorch(rows, dtype, activation):
    tensors = block(rows, dtype=dtype)
    dy = torch.randn(*rows, 48, generator=torch.Generator().manual_seed(7)).to(dtype)
    with dispatch.use("triton"):
        ours = gradients(tilebook.mlp, tensors, dy, activation=activation)
    theirs = gradients(eager, tensors, dy, activation=activation)
    truth = gradients(eager, [t.detach().float().requires_grad_() for t in tensors], dy, activation=activation)
    for name, mine, plain, right in zip(("y", "x", "w1", "b1", "w2", "b2"), ours, theirs, truth, strict=True):
        assert mine.shape == plain.shape
        assert mine.dtype == plain.dtype
        floor, seen, allowed = floors(right, dtype, dtype), error(mine, right), error(plain, right)
        assert seen.max <= 2 * allowed.max + floor.max, name
        assert seen.rms <= 2 * allowed.rms + floor.rms, name


@interpreted
@pytest.mark.parametrize("wanted", range(5))
def test_a_gradient_asked_for_alone_is_the_same(wanted):
    tensors = block(dtype=torch.bfloat16)
    dy = torch.randn(40, 48)
    with dispatch.use("triton"):
        _, *every = gradients(tilebook.mlp, tensors, dy)
        for index, tensor in enumerate(tensors):
            tensor.requires_grad_(index == wanted)
        tilebook.mlp(*tensors).backward(dy.bfloat16())
    # Only the activation that the gradient of w2 alone asks PyTorch for may round differently.
    torch.testing.assert_close(tensors[wanted].grad, every[wanted], rtol=2**-6, atol=2**-6)
    assert sum(tensor.grad is not None for tensor in tensors) == 1


@interpreted
def test_forward_keeps_the_pre_activation_and_nothing_else():
    tensors = block(dtype=torch.bfloat16)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with dispatch.use("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tilebook.mlp(*tensors)
    own = {tensor.data_ptr() for tensor in tensors}
    assert sum(size for pointer, size in kept.items() if pointer not in own) == 40 * 72 * 2


@interpreted
@pytest.mark.parametrize("descriptors", [0, 2])
def test_views_are_read_in_place_and_nothing_beside_them(descriptors):
    x, w1, b1, w2, b2 = block(dtype=torch.bfloat16)
    config = CONFIGS[0].replace(DESCRIPTORS=descriptors)
    for offset in (0, 8, 3):  # at 3 rows are not aligned, and descriptors must step aside
        wide = torch.full((41, 48 + 16), float("nan"), dtype=torch.bfloat16)
        view = wide[:40, offset : offset + 48]
        view.copy_(x.detach())
        with dispatch.use("triton", config), torch.no_grad():
            assert torch.equal(tilebook.mlp(view, w1, b1, w2, b2), tilebook.mlp(x, w1, b1, w2, b2))


@interpreted
def test_transposed_inputs_and_expanded_gradients_give_the_same():
    x, w1, b1, w2, b2 = block(dtype=torch.bfloat16)
    with dispatch.use("triton"):
        y = tilebook.mlp(x.t().contiguous().t(), w1.t().contiguous().t(), b1, w2, b2)
        assert torch.equal(y, tilebook.mlp(x, w1, b1, w2, b2))
        (expanded,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        (dense,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(expanded, dense)


@interpreted
@pytest.mark.parametrize("vector", [lambda b: torch.stack((b, -b), 1)[:, 0], lambda b: b[:1].expand(len(b))])
def test_biases_are_taken_with_their_strides(vector):
    x, w1, b1, w2, b2 = block(dtype=torch.bfloat16)
    dy = torch.randn(40, 48, generator=torch.Generator().manual_seed(3)).bfloat16()

    def strided(x, w1, b1, w2, b2):
        return tilebook.mlp(x, w1, vector(b1), w2, vector(b2))

    def dense(x, w1, b1, w2, b2):
        return tilebook.mlp(x, w1, vector(b1).contiguous(), w2, vector(b2).contiguous())

    with dispatch.use("triton"):
        ours, right = (gradients(each, (x, w1, b1, w2, b2), dy) for each in (strided, dense))
    for mine, other in zip(ours, right, strict=True):
        assert torch.equal(mine, other)


@interpreted
def test_the_activations_backward_takes_z_with_its_strides():
    x, w1, b1, w2, _ = (tensor.detach() for tensor in block(dtype=torch.bfloat16))
    with dispatch.use("triton"):
        _, z = dispatch.run(op.get("mlp_up_fwd"), x, w1, b1, "gelu", True)
        dy, turned = torch.ones(40, 48, dtype=torch.bfloat16), z.t().contiguous().t()
        right, mine = (dispatch.run(op.get("mlp_act_bwd"), dy, w2, each, "gelu") for each in (z, turned))
    assert all(torch.equal(one, other) for one, other in zip(right, mine, strict=True))


@interpreted
def test_backward_recomputes_the_activation_bit_for_bit():
    for activation in ("gelu", "gelu_tanh", "relu"):
        for dtype in (torch.bfloat16, torch.float16):
            x, w1, b1, w2, _ = (tensor.detach() for tensor in block(dtype=dtype))
            with dispatch.use("triton"):
                h, z = dispatch.run(op.get("mlp_up_fwd"), x, w1, b1, activation, True)
                dy = torch.ones(40, 48, dtype=dtype)
                _, again = dispatch.run(op.get("mlp_act_bwd"), dy, w2, z, activation)
                (alone, none) = dispatch.run(op.get("mlp_up_fwd"), x, w1, b1, activation, False)
            assert torch.equal(h, again)
            assert torch.equal(h, alone)
            assert none.numel() == 0


@interpreted
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_activations_hold_at_the_ends_of_the_range(activation):
    big = torch.finfo(torch.bfloat16).max
    z = torch.tensor([[0.0, -0.0, 1e-30, -1e-30, 4.9, -4.9, 5.1, -5.1, 12.0, -12.0, 1e4, -1e4, big, -big, -1.0, 1.0]])
    x = z.bfloat16()
    eye = torch.eye(16, dtype=torch.bfloat16)
    # The bias carries the values: what a product with 0 adds to them is nothing.
    with dispatch.use("triton"):
        (h, kept) = dispatch.run(op.get("mlp_up_fwd"), torch.zeros_like(x), eye, x[0], activation, True)
        dz, again = dispatch.run(op.get("mlp_act_bwd"), torch.ones_like(x), eye, kept, activation)
    assert torch.equal(h, again)
    right = z.bfloat16().double().requires_grad_()
    truth = activate(right, activation)
    truth.sum().backward()
    torch.testing.assert_close(h.double(), truth.detach(), rtol=2**-7, atol=2e-6)
    moderate = right.abs() < 1e6  # beyond, PyTorch's own derivative of tanh GELU is 0 · infinity
    torch.testing.assert_close(dz.double()[moderate], right.grad[moderate], rtol=2**-7, atol=1e-4)


def test_autocast_casts_as_linear_does():
    tensors = block()
    dy = torch.randn(40, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = gradients(eager, tensors, dy)
        ours = gradients(tilebook.mlp, tensors, dy)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.dtype == right.dtype
        assert torch.equal(mine, right)


@interpreted
def test_under_autocast_the_kernels_serve_fp32_parameters():
    tensors = block()
    with torch.autocast("cpu", dtype=torch.bfloat16), dispatch.use("triton"):
        y = tilebook.mlp(*tensors)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, "activation must be one of gelu, gelu_tanh, relu, not 'swish'"),
        ({"x": torch.zeros(())}, "expected x"),
        ({"w1": torch.zeros(72)}, "expected x"),
        ({"x": torch.zeros(40, 47)}, r"w1 \(72, 48\) asks for x \(…, 48\)"),
        ({"w2": torch.zeros(72, 48)}, r"and w2 \(48, 72\), not \(40, 48\) and \(72, 48\)"),
        ({"b1": torch.zeros(48)}, r"b1 must have shape \(72,\)"),
        ({"b2": torch.zeros(1, 48)}, r"b2 must have shape \(48,\)"),
        ({"w2": torch.zeros(48, 72, dtype=torch.float16)}, "w2 is torch.float16 on cpu, but x is torch.float32 on cpu"),
        ({"b1": torch.zeros(72, device="meta")}, "b1 is torch.float32 on meta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_inputs_are_named(change, message):
    arguments = dict(zip(("x", "w1", "b1", "w2", "b2"), block(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        tilebook.mlp(**arguments)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="floating point"):
        tilebook.mlp(*(tensor.detach().to(torch.int32) for tensor in block()))


@interpreted
@pytest.mark.parametrize("at", range(5))
def test_a_wrong_call_of_the_op_is_a_value_error(at):
    tensors = [x.detach() for x in block(dtype=torch.bfloat16)]
    tensors[at] = tensors[at][..., :-8]
    with dispatch.use("triton"), pytest.raises(ValueError, match=r"must have shape|asks for"):
        torch.ops.tilebook.mlp_fwd(*tensors, "gelu", True)


@interpreted
def test_gradients_of_another_shape_are_a_value_error():
    tensors = [x.detach() for x in block(dtype=torch.bfloat16)]
    with dispatch.use("triton"):
        y, z = torch.ops.tilebook.mlp_fwd(*tensors, "gelu", True)
        for dy, saved in ((y[1:], z), (y, z[:, 1:])):
            with pytest.raises(ValueError, match=r"are not of x \(40, 48\)"):
                torch.ops.tilebook.mlp_bwd(dy, *tensors, saved, "gelu", True, [True] * 5)


@pytest.mark.parametrize("at", range(5))
def test_what_is_no_tensor_is_a_value_error(at):
    tensors = [x.detach() for x in block()]
    tensors[at] = 1.0
    with pytest.raises(ValueError, match="expected a tensor, not float"):
        tilebook.mlp(*tensors)
