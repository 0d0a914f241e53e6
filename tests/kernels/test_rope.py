import contextlib

import pytest
import torch
from drawing import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import tilebook
from tilebook import device as devices
from tilebook import dispatch, op
from tilebook.op import UsageError
from tilebook.tuner.judge.verify import Case, error, floors, verify

OPS = [op.get(name) for name in ("rope_fwd", "rope_bwd")]
FWD, BWD = OPS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")

CONFIGS = [
    op.Config(ROWS=1, HEADS=1, num_warps=1),
    op.Config(ROWS=16, HEADS=2, num_warps=4),
    op.Config(ROWS=2, HEADS=32, num_warps=8),
]


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rotate_every_two(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def plain(q, k, cos, sin, interleaved=False):
    """As models have it, which give the first R numbers of every head to it."""
    cos, sin = (x.unsqueeze(-3) for x in (cos, sin))
    turned, width = rotate_every_two if interleaved else rotate_half, cos.shape[-1]
    parts = [(x[..., :width], x[..., width:]) for x in (q, k)]
    return tuple(torch.cat(((x * cos) + (turned(x) * sin), rest), -1) for x, rest in parts)


def drawn(
    batch=2, heads=4, heads_kv=2, seq=9, width=32, rotated=None, angles=1, dtype=torch.float32, interleaved=False
):
    """q and k as layers make them, and angles that stand twice; `angles`: of how many sequences, 0 for two axes."""
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(batch, seq, n, width, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for n in (heads, heads_kv)
    )
    shape = *((angles,) if angles else ()), seq, (rotated or width) // 2
    turn = torch.rand(shape, generator=generator) * 6.3
    turn = turn.repeat_interleave(2, -1) if interleaved else torch.cat((turn, turn), -1)
    return q, k, turn.cos().to(dtype), turn.sin().to(dtype)


def gradients(function, tensors, **options):
    """Both results, and the gradients of what wants one."""
    ys = function(*tensors, **options)
    dys = [torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(at)) / 4 for at, y in enumerate(ys)]
    wanted = [x for x in tensors if x.requires_grad]
    return *ys, *torch.autograd.grad(ys, wanted, [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)])


def doubled(tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def assert_as_good_as_pytorch(tensors, **options):
    dtype = tensors[0].dtype
    with dispatch.use("triton"):
        ours = gradients(tilebook.apply_rope, tensors, **options)
    theirs, truth = gradients(plain, tensors, **options), gradients(plain, doubled(tensors), **options)
    for at, (mine, other, right) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert (mine.shape, mine.dtype) == (other.shape, dtype)
        floor, seen, allowed = floors(right.float(), dtype, dtype), error(mine, right), error(other, right)
        assert seen.max <= 2 * allowed.max + floor.max, at
        assert seen.rms <= 2 * allowed.rms + floor.rms, at
    return ours


@pytest.mark.sampled(4)
@interpreted
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("each", OPS, ids=lambda each: each.name)
def test_other_configs_are_right_too(each, config):
    for problem in each.problem.examples():
        verify(each.tunable, config, [Case.make(each, problem, "cpu", 1)], repeats=0)


@pytest.mark.parametrize("gpu", devices.CATALOGUE.values(), ids=lambda gpu: gpu.name)
def test_every_head_has_a_default_and_a_space(gpu):
    for each in OPS:
        space = each.tunable.space
        for text in ("B1,H1,S1,D2", "B4,H32,Hkv8,S2048,D64", "B4,H14,Hkv2,S2048,D96,R24", "B1,H3,S8192,D1024"):
            problem = each.problem.parse(text, "bf16")
            assert space.reject(problem, space.default(problem, gpu), gpu) is None
            assert min(2, problem.seq) <= len(space.feasible(problem, gpu)) <= 128, text


def test_one_verdict_serves_a_bucket_of_sequences():
    q, k, cos, sin = drawn(3, 4, 2, 1000, 8)
    assert FWD.problem.of(q, k, cos, sin, False).label == "B4,H4,Hkv2,S1024,D8"
    assert FWD.problem.of(q, q, cos[0, :, :4], sin, True).label == "B4,H4,S1024,D8,R4,interleaved"


@pytest.mark.parametrize("text", ["B1,H2,S4,D16,R7", "B1,H2,S4,D16,R18"])
def test_what_is_rotated_is_an_even_part_of_a_head(text):
    with pytest.raises(UsageError, match="even part of 16"):
        FWD.problem.parse(text, "bf16")


@pytest.mark.parametrize("each", OPS, ids=lambda each: each.name)
def test_the_least_that_is_moved_is_each_tensor_once(each):
    problem = each.problem.parse("B2,H4,Hkv2,S16,D32,R16", "bf16")
    inputs = problem.inputs("cpu", 0)
    moved = [x for x in (*inputs, *each.implementations["torch"](*inputs)) if isinstance(x, torch.Tensor)]
    assert problem.cost().bytes == sum(x.numel() * x.itemsize for x in moved)


@pytest.mark.sampled(3)
@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [32, 24, 2])
@pytest.mark.parametrize("angles", [0, 1, 2])
def test_kernels_and_their_gradients_err_at_most_twice_as_much_as_pytorch(angles, rotated, interleaved, dtype):
    tensors = drawn(rotated=rotated, angles=angles, dtype=dtype, interleaved=interleaved)
    assert_as_good_as_pytorch(tensors, interleaved=interleaved)


@interpreted
@settings(max_examples=examples(20), deadline=None)
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 5), heads_kv=st.integers(1, 5), seq=st.integers(1, 20),
    half=st.integers(1, 40), rest=st.integers(0, 20), dtype=st.sampled_from(DTYPES), interleaved=st.booleans(),
)  # fmt: skip
def test_any_shape_is_right(batch, heads, heads_kv, seq, half, rest, dtype, interleaved):
    how = {"rotated": 2 * half, "dtype": dtype, "interleaved": interleaved}
    tensors = drawn(batch, heads, heads_kv, seq, 2 * half + rest, **how)
    with dispatch.use("triton"):
        ours = gradients(tilebook.apply_rope, tensors, interleaved=interleaved)
    for mine, right in zip(ours, gradients(plain, doubled(tensors), interleaved=interleaved), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=torch.finfo(dtype).eps * 4)


@interpreted
@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_that_differ_within_a_pair_are_taken_as_they_are(interleaved):
    q, k, *_ = drawn()
    cos, sin = torch.randn(2, 1, 9, 32, generator=torch.Generator().manual_seed(3))
    assert_as_good_as_pytorch((q, k, cos, sin), interleaved=interleaved)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_angles_in_fp32_leave_narrower_heads_their_dtype(dtype):
    q, k, *_ = drawn(dtype=dtype)
    tensors = q, k, *drawn()[2:]
    with dispatch.use("triton"):
        ours = gradients(tilebook.apply_rope, tensors)
    for mine, right in zip(ours, gradients(plain, doubled(tensors)), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), right, rtol=torch.finfo(dtype).eps, atol=1e-6)
    for mine, other in zip(gradients(tilebook.apply_rope, tensors), ours, strict=True):
        assert mine.dtype == dtype, "on the CPU, too"
        torch.testing.assert_close(mine, other, rtol=0, atol=4 * torch.finfo(dtype).eps)


LAYOUTS = {
    "heads first": lambda x: x.contiguous(),
    "part of a projection": lambda x: torch.cat((x, x), 1).transpose(1, 2).contiguous()[:, :, : x.shape[1]].mT.mT,
    "last axis first": lambda x: x.mT.contiguous().mT,
    "a head for all": lambda x: x[:, :1].expand(x.shape),
    "columns of wider heads": lambda x: torch.cat((x, x), -1)[..., 3 : 3 + x.shape[-1]],
}


@interpreted
@pytest.mark.parametrize("name", LAYOUTS)
def test_heads_are_taken_with_their_strides(name):
    q, k, cos, sin = drawn()
    laid = [LAYOUTS[name](x.detach()).requires_grad_() for x in (q, k)]
    if name == "part of a projection":
        laid = [x.detach().transpose(1, 2).requires_grad_() for x in laid]
    assert_as_good_as_pytorch((*laid, cos, sin))


@interpreted
@pytest.mark.parametrize("function", ["kernel", "PyTorch's"])
def test_results_lie_in_memory_as_their_heads_do(function):
    q, k, cos, sin = drawn()
    for laid in (q, q.contiguous()):
        with dispatch.use("triton") if function == "kernel" else contextlib.nullcontext():
            found, _ = tilebook.apply_rope(laid, k, cos, sin)
        assert found.stride() == laid.stride()


@interpreted
@pytest.mark.parametrize("sequences", [1, 2])
def test_angles_are_taken_with_their_strides(sequences):
    q, k, cos, sin = drawn(angles=sequences)
    wide = torch.stack((cos, sin), -1)
    apart = torch.cat((cos, sin), -1)
    one_for_all = cos[:1].expand(2, 9, 32), sin.expand(2, 9, 32)
    for angles in ((wide[..., 0], wide[..., 1]), (apart[..., :32], apart[..., 32:]), one_for_all):
        assert_as_good_as_pytorch((q, k, *angles))


@interpreted
@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_angles_alone_are_kept(choice):
    seen, (q, k, cos, sin) = [], drawn()
    with dispatch.use(choice), torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
        tilebook.apply_rope(q, k, cos, sin)
    assert {x.untyped_storage().data_ptr() for x in seen} == {x.untyped_storage().data_ptr() for x in (cos, sin)}


@interpreted
@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_two_may_be_frozen_or_of_no_use(which):
    tensors = drawn()
    right = gradients(plain, tensors)[2 + which]
    frozen = [x.detach().requires_grad_(at == which) for at, x in enumerate(tensors)]
    with dispatch.use("triton"):
        (found,) = gradients(tilebook.apply_rope, frozen)[2:]
        torch.testing.assert_close(found, right)
        used = tilebook.apply_rope(*tensors)[which]
        dy = torch.randint(-8, 9, used.shape, generator=torch.Generator().manual_seed(which)) / 4
        alone, other = torch.autograd.grad(used, (tensors[which], tensors[1 - which]), dy)
    torch.testing.assert_close(alone, right)
    assert not other.any()


@interpreted
def test_gradients_of_angles_are_pytorchs():
    q, k, cos, sin = drawn()
    tensors = q, k, cos.requires_grad_(), sin.requires_grad_()
    with dispatch.use("triton"):
        found = gradients(tilebook.apply_rope, tensors)
    for mine, right in zip(found, gradients(plain, tensors), strict=True):
        assert torch.equal(mine, right)


@interpreted
def test_no_tokens_and_no_heads_pass():
    with dispatch.use("triton"):
        for how in ({"seq": 0}, {"batch": 0}, {"heads_kv": 0}):
            q, k, cos, sin = drawn(**how)
            found = tilebook.apply_rope(q, k, cos, sin)
            assert [x.shape for x in found] == [q.shape, k.shape]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [32, 16])
def test_on_the_cpu_it_is_pytorch_bit_for_bit(rotated, interleaved, dtype):
    tensors = drawn(dtype=dtype, rotated=rotated, interleaved=interleaved)
    found = (gradients(each, tensors, interleaved=interleaved) for each in (tilebook.apply_rope, plain))
    for mine, right in zip(*found, strict=True):
        assert torch.equal(mine, right)


def test_it_is_transformers_function_of_llama_and_of_phi_bit_for_bit():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    phi = pytest.importorskip("transformers.models.phi3.modeling_phi3")
    for model, rotated in ((llama, 32), (phi, 32), (phi, 16)):
        tensors = drawn(dtype=torch.bfloat16, rotated=rotated)
        found = (gradients(each, tensors) for each in (tilebook.apply_rope, model.apply_rotary_pos_emb))
        for mine, right in zip(*found, strict=True):
            assert torch.equal(mine, right)


def test_a_compiled_call_is_one_graph_and_asks_for_both_ops_where_it_is_trained(monkeypatch):
    asked = []

    def ahead(family, names, args, device, *, flat):
        asked.append((family, names, flat))
        return len(asked) < 3

    ahead._dynamo_marked_constant = True
    monkeypatch.setattr("tilebook.kernels.rope.ahead", ahead)
    monkeypatch.setattr(dispatch.here, "forced", ("torch", None))  # so that the CPU counts as a GPU
    tensors = drawn()
    for trained in (True, False, True):
        torch._dynamo.reset()
        compiled = torch.compile(tilebook.apply_rope, backend="aot_eager", fullgraph=True)
        if trained:
            found, right = (gradients(each, tensors) for each in (compiled, plain))
        else:
            found, right = (each(*[x.detach() for x in tensors]) for each in (compiled, plain))
        torch.testing.assert_close(found, right)
    assert asked[0] == ("rope", ("rope_fwd", "rope_bwd"), False)
    assert asked[1] == ("rope", ("rope_fwd",), False)


Q, K, COS, SIN = (x.detach() for x in drawn())
WRONG = {
    "three axes": ((Q[0], K[0], COS, SIN), r"expected q \(B, H, S, D\)"),
    "other lengths": ((Q, K[:, :, :3], COS, SIN), r"not \(2, 4, 9, 32\) and \(2, 2, 3, 32\)"),
    "integers": ((Q.long(), K, COS, SIN), "q must be floating point"),
    "another device": ((Q, K, COS, SIN.to("meta")), "sin must be floating point on cpu"),
    "fewer angles": ((Q, K, COS[:, :3], SIN[:, :3]), r"expected cos and sin \(9, R\)"),
    "angles of other sequences": ((Q, K, COS.expand(3, 9, 32), SIN.expand(3, 9, 32)), r"or \(2, 9, R\)"),
    "no sine for some": ((Q, K, COS, SIN[..., :8]), r"not \(1, 9, 32\) and \(1, 9, 8\)"),
    "an odd width": ((Q, K, COS[..., :7], SIN[..., :7]), "an even width of at most 32, not 7"),
    "more than there is": ((Q[..., :8], K[..., :8], COS, SIN), "an even width of at most 8, not 32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_inputs_are_named(name):
    given, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        tilebook.apply_rope(*given)


def test_heads_that_lie_too_far_apart_to_count_are_copied():
    from tilebook.kernels.rope.entry import addressed

    far = torch.empty_strided((1, 128, 4, 64), (1 << 33, 1 << 24, 64, 1), device="meta")
    near = torch.empty_strided((1, 127, 4, 64), (1 << 33, 1 << 24, 64, 1), device="meta")
    angles = torch.empty(1, 4, 64, device="meta")
    q, k, *_ = addressed((far, near, angles, angles))
    assert q.shape[1] * q.stride(1) < 1 << 31
    assert k is near
