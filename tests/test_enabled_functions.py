"""Norms, losses and attention in PyTorch's places take and refuse what PyTorch's do."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import tilebook
from tilebook import dispatch, enabling, left

NAMES = ("scaled_dot_product_attention", "layer_norm", "rms_norm", "cross_entropy")
PYTORCHS = {name: getattr(F, name) for name in NAMES}


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    enabling._state.change(whole=False, blocks=-enabling._state.blocks)
    for name, function in PYTORCHS.items():
        setattr(F, name, function)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [False, True])
def test_what_autocast_makes_of_norms_stays_what_it_is(dtype, cast):
    def shapes():
        x, weight = (torch.empty(size, device="cuda", dtype=dtype) for size in ((2, 5, 32), (32,)))
        with torch.autocast("cuda", torch.bfloat16, enabled=cast):
            return [(y.shape, y.dtype) for y in (F.layer_norm(x, (32,), weight, weight), F.rms_norm(x, (32,), weight))]

    with FakeTensorMode(allow_non_fake_inputs=True):
        right = shapes()
        with tilebook.enabled():
            assert shapes() == right


@pytest.mark.parametrize(
    "arguments",
    [
        ((3, 4), (5,)),
        ((3, 4), (4,), (5,)),
        ((3, 4), (3, 4), (3, 4), (3, 4)),
        ((3, 4), (4,), None, (4,)),
        ((3, 4), ()),
        ((), (1,)),
        ((3, 4), [4], (4,), (4,)),
        ((0, 4), [4], (4,), (4,)),
    ],
    ids=str,
)
def test_norms_take_and_refuse_what_pytorchs_do(arguments):
    shape, normalized, *vectors = arguments
    x = torch.randn(shape)
    given = [None if each is None else torch.randn(each) for each in vectors]

    def outcome(function, given):
        try:
            return function(x, normalized, *given)
        except Exception as refused:
            return type(refused), str(refused)

    for name, most in (("layer_norm", 2), ("rms_norm", 1)):
        right = outcome(PYTORCHS[name], given[:most])
        got = outcome(enabling._ours[name], given[:most])
        assert type(got) is type(right)
        if isinstance(right, torch.Tensor):
            torch.testing.assert_close(got, right)
        else:
            assert got == right


@pytest.mark.parametrize("name", NAMES[1:3])
@pytest.mark.parametrize(
    ("normalized", "size", "device"),
    [((8,), 8, "cuda"), (8, 8, "cuda"), ((8.0,), 8, "cuda"), (None, 8, "cuda"), ((8,), 7, "cuda"),
     ((8,), (1, 8), "cuda"), ((8,), 8, "cpu")],
)  # fmt: skip
def test_on_a_gpu_too_norms_refuse_what_pytorchs_do_as_those_do(monkeypatch, name, normalized, size, device):
    monkeypatch.setattr(enabling, "ORDINARY", {FakeTensor})

    def outcome(function):
        try:
            return function(x, normalized, weight, eps=1e-5).shape
        except Exception as refused:
            return type(refused), str(refused)

    with FakeTensorMode():
        x, weight = torch.empty(3, 8, device="cuda"), torch.empty(size, device=device)
        assert outcome(getattr(enabling, name)) == outcome(PYTORCHS[name])


@pytest.mark.parametrize(("axis", "ours"), [(0, True), (1, True), (2, False)])
def test_a_sequence_in_pieces_on_many_gpus_is_pytorchs(monkeypatch, axis, ours):
    called = []
    monkeypatch.setattr(dispatch.here, "forced", ("torch", None))  # so that the CPU counts as a GPU
    monkeypatch.setattr("tilebook.kernels.attention.attend", lambda q, *_, **__: called.append(q) or q)
    monkeypatch.setattr("tilebook.kernels.attention.drop_in.plain_sdpa", lambda q, *_, **__: q)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        q = distribute_tensor(torch.randn(2, 2, 8, 16), mesh, [Shard(axis)])
        with tilebook.enabled():
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
    finally:
        dist.destroy_process_group()
    assert bool(called) == ours


LOSSES = {
    "indices": ((3, 5), (3,), {}),
    "one row": ((5,), (), {}),
    "planes": ((3, 5, 2, 4), (3, 2, 4), {}),
    "smoothing": ((3, 5), (3,), {"label_smoothing": 0.1}),
    "sum": ((3, 5), (3,), {"reduction": "sum"}),
    "each": ((3, 5, 2), (3, 2), {"reduction": "none"}),
    "as it was": ((3, 5), (3,), {"size_average": False}),
    "each, as it was": ((3, 5), (3,), {"reduce": False}),
    "ignored": ((3, 5), (3,), {"ignore_index": 1}),
    "weights": ((3, 5), (3,), {"weight": torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])}),
    "probabilities": ((3, 5), (3, 5), {"label_smoothing": 0.2}),
    "nothing": ((0, 5), (0,), {}),
    "no such reduction": ((3, 5), (3,), {"reduction": "median"}),
    "too smooth": ((3, 5), (3,), {"label_smoothing": 1.5}),
    "too few": ((3, 5), (2,), {}),
    "no rows": ((), (), {}),
    "another rank": ((3, 5), (3, 1), {}),
    "an index that is none": ((3, 5), (3,), {"ignore_index": 0.5}),
    "too few weights": ((3, 5), (3,), {"weight": torch.ones(4)}),
}


def loss_of(function, name, dtype):
    """(shape and dtype or error, numbers) of a loss and its gradient, or of what is refused."""
    shape, targets, options = LOSSES[name]
    options = {key: value.to(dtype) if key == "weight" else value for key, value in options.items()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(5, targets, generator=generator)
    target = torch.softmax(target.to(dtype), 1) if name == "probabilities" else target
    try:
        loss = function(x, target, **options)
        return (loss.shape, loss.dtype), (loss, *torch.autograd.grad(loss.sum(), x))
    except Exception as refused:
        return (type(refused), str(refused)), ()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_take_and_refuse_what_pytorchs_do(name, dtype):
    right, numbers = loss_of(PYTORCHS["cross_entropy"], name, dtype)
    got, ours = loss_of(enabling.cross_entropy, name, dtype)
    assert got == right
    assert all(torch.equal(mine, other) or mine.isnan().all() for mine, other in zip(ours, numbers, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_by_our_kernels_are_and_refuse_what_pytorchs_do(monkeypatch, name, dtype):
    right, numbers = loss_of(PYTORCHS["cross_entropy"], name, dtype)
    called, through = [], enabling.our_cross_entropy
    monkeypatch.setattr(enabling, "our_cross_entropy", lambda *args: called.append(args) or through(*args))
    with dispatch.use("triton"):
        got, ours = loss_of(enabling.cross_entropy, name, dtype)
    assert got == right
    assert bool(called) == (name in ("indices", "one row", "planes", "smoothing", "sum", "each", "ignored"))
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for mine, other in zip(ours, numbers, strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True, **tolerance)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cast", [False, True])
def test_what_autocast_makes_of_losses_stays_what_it_is(monkeypatch, name, cast):
    shape, targets, options = LOSSES[name]

    def outcome(function):
        x, target = (torch.empty(size, device="cuda") for size in (shape, targets))
        weight = {"weight": torch.empty(options["weight"].shape, device="cuda")} if "weight" in options else {}
        try:
            with torch.autocast("cuda", torch.bfloat16, enabled=cast):
                loss = function(x.bfloat16(), target if shape == targets else target.long(), **options | weight)
        except Exception as refused:
            return type(refused), str(refused)
        return loss.shape, loss.dtype

    with FakeTensorMode(allow_non_fake_inputs=True):
        right = outcome(PYTORCHS["cross_entropy"])
        for ordinary in (enabling.ORDINARY, {FakeTensor}):
            monkeypatch.setattr(enabling, "ORDINARY", ordinary)
            with dispatch.use("torch"):
                assert outcome(enabling.cross_entropy) == right


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_a_norm_known_to_be_pytorchs_is_its_function_with_the_same_arguments(monkeypatch, name):
    """Whatever they are: it is only told apart by its tensors."""
    x, *vectors = torch.randn(3, 4), torch.randn(4), torch.randn(4)
    layouts = [x, *vectors[: 2 if name == "layer_norm" else 1]]
    guards = left._Guards(*layouts, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    known = {(name, x.shape, len(layouts), False): [(guards.check, left.Left(True, True, False), False)]}
    monkeypatch.setattr(left._here, "seen", known)
    monkeypatch.setattr(enabling, "takes_norm", None)  # which would be asked of any other
    for eps in (1e-5, 1, None):
        if name == "rms_norm" or eps is not None:
            given = (x, [4], *layouts[1:], eps)
            assert torch.equal(enabling._ours[name](*given), PYTORCHS[name](*given))
    with pytest.raises(RuntimeError):
        enabling._ours[name](x, [5], *layouts[1:])
    with pytest.raises(TypeError):  # asked, and there is nobody to answer
        enabling._ours[name](torch.randn(2, 4), [4], *layouts[1:])


def test_a_loss_known_to_be_pytorchs_is_its_function_with_the_same_arguments(monkeypatch):
    x, target = torch.randn(3, 4), torch.tensor([3, 0, -100])
    guards = left._Guards(x, target, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    near = "cross_entropy", x.shape, target.shape, False, False, False
    monkeypatch.setattr(left._here, "seen", {near: [(guards.check, left.Left(True, True, False), False)]})
    monkeypatch.setattr(enabling, "_takes_loss", None)  # which would be asked of any other
    for options in ({}, {"reduction": "none"}, {"size_average": False}):
        right = PYTORCHS["cross_entropy"](x, target, **options)
        assert torch.equal(enabling.cross_entropy(x, target, **options), right)
    with pytest.raises(ValueError, match="median"):
        enabling.cross_entropy(x, target, reduction="median")
    for options in ({"label_smoothing": 0.1}, {"weight": torch.ones(4)}):
        with pytest.raises(TypeError):  # asked, and there is nobody to answer
            enabling.cross_entropy(x, target, **options)


def test_nested_tensors_have_pytorchs_attention_in_its_place():
    parts = [torch.randn(n, 4, 32) for n in (5, 17, 9)]
    q = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True).transpose(1, 2)
    right = F.scaled_dot_product_attention(q, q, q)
    with tilebook.enabled():
        found = F.scaled_dot_product_attention(q, q, q)
    assert torch.equal(found.values(), right.values())


@pytest.mark.parametrize("name", ["layer_norm", "cross_entropy"])
def test_a_module_that_holds_what_is_in_pytorchs_place_is_loaded_as_pytorchs(name):
    plain = getattr(F, name)
    with tilebook.enabled():
        held = getattr(F, name)
        assert held is not plain
        written = pickle.dumps(held)
        assert pickle.loads(written) == held
        assert copy.deepcopy(held) == held
    assert b"tilebook" not in written
    assert pickle.loads(written) is plain
