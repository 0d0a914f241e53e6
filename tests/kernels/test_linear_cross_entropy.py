import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tilebook
from tilebook import dispatch
from tilebook.kernels import linear_cross_entropy as family
from tilebook.kernels.linear_cross_entropy import chunks

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PYTORCHS = getattr(F, "linear_cross_entropy", None)


@pytest.fixture
def few(monkeypatch):
    """Chunks of eight rows."""
    monkeypatch.setattr(chunks, "step_of", lambda count, classes, itemsize: max(1, min(count, 8)))


def drawn(rows=20, classes=33, features=24, dtype=torch.float32, bias=True, ignored=True, seed=0):
    """Hidden states, weight, bias, and targets, of which every seventh is ignored."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, features), 1.0), ((classes, features), features**-0.5), ((classes,), 1.0)
    x, w, b = ((torch.randn(shape, generator=generator) * size).to(dtype).requires_grad_() for shape, size in shapes)
    target = torch.randint(classes, (rows,), generator=generator)
    if ignored:
        target[1::7] = -100
    return (x, w, b if bias else None), target


def plain(x, w, target, *, linear_bias=None, softcap=0.0, z_loss=0.0, reduction="mean", ignore_index=-100, **options):
    """The formula, in the dtype of the tensors."""
    logits = F.linear(x, w, linear_bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index, **options)
    counted = target != ignore_index
    if z_loss:
        loss = loss + torch.where(counted, z_loss * logits.logsumexp(-1).square(), 0.0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / counted.sum()}[reduction]


def gradients(function, tensors, target, dy=None, **options):
    x, w, b = tensors
    loss = function(x, w, target, linear_bias=b, **options)
    wanted = [each for each in tensors if each is not None and each.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, dy)]


def ours(*args, **options):
    with dispatch.use("triton"):
        return gradients(tilebook.linear_cross_entropy, *args, **options)


def wide(tensors):
    return tuple(None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors)


def assert_no_worse(found, tensors, target, dy=None, **options):
    """As near to the formula in fp64 as twice what PyTorch makes of it in the tensors' dtype."""
    right = gradients(plain, wide(tensors), target, None if dy is None else dy.double(), **options)
    theirs = gradients(plain, tensors, target, dy, **options)
    for mine, other, truth in zip(found, theirs, right, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        luck = torch.finfo(mine.dtype).eps * (0.1 if mine.ndim else 1.0)
        assert (mine - truth).norm() <= 2 * (other - truth).norm() + luck * truth.norm()


@pytest.mark.sampled(4)
@interpreted
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"rows": 1, "ignored": False},
        {"rows": 8},
        {"rows": 300},  # more chunks than may be rounded
        {"features": 17, "bias": False},
        {"classes": 7},
        {"classes": 2500, "bias": False},
        {"classes": 16389, "features": 5, "rows": 9},  # rows are lined up
    ],
    ids=str,
)
def test_loss_and_gradients_are_right(sizes, dtype):
    tensors, target = drawn(dtype=dtype, **sizes)
    assert_no_worse(ours(tensors, target), tensors, target)


@interpreted
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.3},
        {"softcap": 2.0},
        {"z_loss": 0.1},
        {"softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.3},
        {"ignore_index": 3},
    ],
    ids=str,
)
def test_options_do_what_their_formulas_say(options, reduction, dtype):
    tensors, target = drawn(dtype=dtype, ignored="ignore_index" not in options)
    target[2] = target[5] = options.get("ignore_index", 3)
    dy = torch.tensor(-1.5, dtype=dtype)
    found = ours(tensors, target, dy, reduction=reduction, **options)
    assert_no_worse(found, tensors, target, dy, reduction=reduction, **options)


@interpreted
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("classes", "length"), [(33, 33), (16389, 16416), (16400, 16400)])
def test_of_the_logits_no_more_than_a_chunk_exists_in_rows_of_whole_vectors(classes, length, monkeypatch):
    tensors, target = drawn(rows=40, classes=classes)
    sizes, through = [], chunks._gradient
    monkeypatch.setattr(chunks, "_gradient", lambda *args: sizes.append(args[1]) or through(*args))
    ours(tensors, target)
    assert [(*each.shape, each.stride(0)) for each in sizes] == [(8, classes, length)] * 5
    assert len({each.data_ptr() for each in sizes}) == 1


@pytest.mark.parametrize(
    ("count", "classes", "expected"),
    [
        (8192, 128256, 4096),
        (8192, 50257, 8192),
        (10000, 128256, 3456),
        (3, 128256, 3),
        (8192, 1 << 20, 1024),
        (0, 9, 1),
    ],
)
def test_chunks_are_large_and_alike(count, classes, expected):
    assert chunks.step_of(count, classes, 2) == expected


@interpreted
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_all_rows_are_ignored_it_is_what_pytorch_makes_of_it(reduction, dtype):
    tensors, target = drawn(dtype=dtype)
    target[:] = -100
    loss, *grads = ours(tensors, target, reduction=reduction)
    assert loss.isnan() if reduction == "mean" else loss == 0
    assert not any(grad.any() for grad in grads)


@interpreted
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("learnt", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_only_what_learns_gets_gradients(learnt, monkeypatch):
    tensors, target = drawn()
    for x, learns in zip(tensors, learnt, strict=True):
        x.requires_grad_(bool(learns))
    assert_no_worse(ours(tensors, target), tensors, target)
    monkeypatch.setattr(chunks, "_gradient", None)
    with torch.no_grad(), dispatch.use("triton"):
        found = tilebook.linear_cross_entropy(*tensors[:2], target, linear_bias=tensors[2])
    torch.testing.assert_close(found, plain(*tensors[:2], target, linear_bias=tensors[2]))


@interpreted
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_casts_the_products_and_sums_gradients_in_fp32(dtype, cast):
    tensors, target = drawn(rows=40)
    tensors = (tensors[0].detach().to(dtype).requires_grad_(), *tensors[1:])
    with torch.autocast("cpu", cast):
        found = ours(tensors, target)
        theirs = gradients(plain, tensors, target)
    right = gradients(plain, wide(tensors), target)
    assert [x.dtype for x in found] == [torch.float32, dtype, torch.float32, torch.float32]
    for mine, other, truth in zip(found, theirs, right, strict=True):
        assert (mine - truth).norm() <= 1.2 * (other - truth).norm() + 1e-5


@pytest.mark.parametrize("cast", [False, True])
def test_a_scaled_loss_does_not_lose_small_gradients_in_fp16(cast):
    dtype = torch.float32 if cast else torch.float16
    tensors, target = drawn(rows=2048, classes=2000, features=4, dtype=dtype, ignored=False)
    with torch.autocast("cpu", torch.float16, enabled=cast), dispatch.use("torch"):
        found = gradients(tilebook.linear_cross_entropy, tensors, target, torch.tensor(1024.0, dtype=dtype))
    right = gradients(plain, wide(tensors), target, torch.tensor(1024.0, dtype=torch.float64))
    for mine, truth in zip(found[1:], right[1:], strict=True):
        assert (mine - truth).norm() <= 4e-3 * truth.norm()


def test_sums_that_are_too_large_for_fp16_have_a_mean_in_it():
    (x, w, b), target = drawn(rows=4096, dtype=torch.float16)
    target[:] = 3
    tensors = (x.detach().fill_(30.0).requires_grad_(), w, b)
    with dispatch.use("torch"):
        found = gradients(tilebook.linear_cross_entropy, tensors, target)
    for mine, right in zip(found, gradients(plain, wide(tensors), target), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=5e-3, atol=1e-2)


@interpreted
@pytest.mark.usefixtures("few")
def test_more_axes_and_other_strides_are_taken():
    (x, w, b), target = drawn(rows=24)
    for given in (x.view(2, 3, 4, 24), torch.stack([x, x], -1)[..., 0].view(2, 3, 4, 24)):
        given = given.detach().requires_grad_()
        strided = w.detach().t().contiguous().t().requires_grad_()
        loss, dx, dw, db = ours((given, strided, b), target.view(2, 3, 4))
        right = gradients(plain, (x, w, b), target)
        for mine, truth in zip((loss, dx.reshape(24, 24), dw, db), right, strict=True):
            torch.testing.assert_close(mine, truth)


@interpreted
@pytest.mark.usefixtures("few")
def test_gradients_repeat_bit_for_bit_and_from_a_graph_that_is_kept():
    tensors, target = drawn(dtype=torch.bfloat16)
    with dispatch.use("triton"):
        loss = tilebook.linear_cross_entropy(*tensors[:2], target)
        once = [
            torch.autograd.grad(loss, tensors[:2], torch.tensor(f).bfloat16(), retain_graph=True) for f in (3.0, 1.0)
        ]
        last = torch.autograd.grad(loss, tensors[:2])
    again = ours((*tensors[:2], None), target)[1:]
    for three, first, second, third in zip(*once, last, again, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        torch.testing.assert_close(three, 3 * first, rtol=2**-7, atol=0)


@interpreted
@pytest.mark.usefixtures("few")
def test_a_last_backward_pass_copies_nothing(monkeypatch):
    (x, w, _), target = drawn()
    made, through = [], chunks.run
    monkeypatch.setattr(chunks, "run", lambda *args: made.append(through(*args)) or made[0])
    with dispatch.use("triton"):
        tilebook.linear_cross_entropy(x, w, target).backward()
    assert [x.grad.data_ptr(), w.grad.data_ptr()] == [each.data_ptr() for each in made[0][2:4]]


@interpreted
@pytest.mark.usefixtures("few")
def test_they_differentiate_again():
    (x, w, b), target = drawn()
    found = []
    for function in (tilebook.linear_cross_entropy, plain):
        with dispatch.use("triton"):
            once = torch.autograd.grad(function(x, w, target, linear_bias=b), (x, w, b), create_graph=True)
            found.append(torch.autograd.grad(sum(each.square().sum() for each in once), (x, w, b)))
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right)


@interpreted
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_it_is_the_same(reentrant):
    tensors, target = drawn()

    def again(x, w, target, *, linear_bias):
        return checkpoint(lambda *args: tilebook.linear_cross_entropy(*args, target, linear_bias=linear_bias), x, w,
                          use_reentrant=reentrant)  # fmt: skip

    with dispatch.use("triton"):
        found = []
        for function in (again, tilebook.linear_cross_entropy):
            for each in tensors:
                each.grad = None
            function(*tensors[:2], target, linear_bias=tensors[2].detach()).backward()
            found.append([each.grad for each in tensors[:2]])
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right)


@interpreted
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_it_is_one_op(dynamic):
    graphs = []

    def backend(graph, inputs):
        graphs.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    tensors, target = drawn()
    compiled = torch.compile(tilebook.linear_cross_entropy, backend=backend, fullgraph=True, dynamic=dynamic)
    with dispatch.use("triton"):
        found = gradients(compiled, tensors, target)
    assert any("linear_cross_entropy_fwd" in each for each in graphs)
    assert_no_worse(found, tensors, target)


def test_small_calls_are_left_to_pytorch(monkeypatch):
    x, w = torch.zeros(1024, 64, device="meta"), torch.zeros(1000, 64, device="meta")
    target = torch.zeros(1024, dtype=torch.int64, device="meta")
    monkeypatch.setattr(dispatch.here, "forced", None)
    assert not family.takes(x, w, target, None, -100, 0.0, 0.0, 0.0)
    assert family.takes(x, torch.zeros(1 << 20, 64, device="meta"), target, None, -100, 0.0, 0.0, 0.0)


@interpreted
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("by", [1.0, 3.0])
def test_the_kernel_multiplies_by_a_number_on_the_gpu(by, same):
    for dtype in DTYPES:
        x = torch.randn(9001).to(dtype)
        right = (x.float() * by).to(dtype)
        out = x if same else torch.empty_like(x)
        chunks.scale(x, torch.tensor(by), out)
        assert torch.equal(out, right)


SHAPES = {
    "one row": ((8,), (12, 8), (), {}),
    "rows": ((5, 8), (12, 8), (5,), {}),
    "each": ((5, 8), (12, 8), (5,), {"reduction": "none"}),
    "places": ((5, 8), (12, 3, 8), (5, 3), {"reduction": "none"}),
    "places, smoothed": ((5, 8), (12, 3, 8), (5, 3), {"label_smoothing": 0.1}),
    "ignored": ((5, 8), (12, 8), (5,), {"ignore_index": 3}),
    "classes' weights": ((5, 8), (12, 8), (5,), {"weight": torch.rand(12)}),
}


@pytest.mark.skipif(PYTORCHS is None, reason="this PyTorch has no linear_cross_entropy")
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_pytorchs_function_of_the_same_arguments(name, forced):
    shape, weight, places, options = SHAPES[name]
    x, w, b = torch.randn(shape), torch.randn(weight), torch.randn(weight[:-1])
    target = torch.randint(12, places)
    right = PYTORCHS(x, w, target, linear_bias=b, **options)
    with dispatch.use("torch") if forced else nullcontext():
        found = tilebook.linear_cross_entropy(x, w, target, linear_bias=b, **options)
    torch.testing.assert_close(found, right)
    spread = torch.softmax(torch.randn(*shape[:-1], 12, *places[1:]), len(shape) - 1)
    options = {name: each for name, each in options.items() if name != "ignore_index"}
    right = PYTORCHS(x, w, spread, linear_bias=b, **options)
    torch.testing.assert_close(tilebook.linear_cross_entropy(x, w, spread, linear_bias=b, **options), right)


@pytest.mark.skipif(PYTORCHS is None, reason="this PyTorch has no linear_cross_entropy")
def test_pytorchs_own_chunks_are_had_by_its_options():
    (x, w, _), target = drawn(ignored=False)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    torch.testing.assert_close(tilebook.linear_cross_entropy(x, w, target, options=options), plain(x, w, target))
    with pytest.raises(ValueError, match="no softcap"):
        tilebook.linear_cross_entropy(x, w, target, options=options, softcap=1.0)


def test_losses_of_each_row_have_the_rows_axes():
    (x, w, b), target = drawn(rows=24)
    found = tilebook.linear_cross_entropy(x.view(2, 3, 4, 24), w, target.view(2, 3, 4), linear_bias=b, reduction="none")
    torch.testing.assert_close(found, plain(x, w, target, linear_bias=b, reduction="none").view(2, 3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(())}, r"expected floating point input \(…, H\), not torch.float32 \(\)"),
        ({"input": torch.zeros(3, 8, dtype=torch.int64)}, "expected floating point input"),
        ({"input": 1.0}, "expected a tensor"),
        ({"input": torch.zeros(3, 7)}, "input has 7 features, but linear_weight takes 8"),
        ({"linear_weight": torch.zeros(8)}, "expected linear_weight"),
        ({"linear_weight": torch.zeros(12, 2, 8), "input": torch.zeros(8)}, r"wants input \(N, H\), not \(8,\)"),
        ({"linear_bias": torch.zeros(11)}, r"expected linear_bias \(12,\), not \(11,\)"),
        ({"linear_weight": torch.zeros(12, 8, device="meta")}, "linear_weight is on meta, but input on cpu"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, r"expected target \(3,\)"),
        ({"target": torch.zeros(3, 12), "ignore_index": 1}, "ignore_index is of class indices"),
        ({"reduction": "median"}, "reduction must be one of mean, sum, none, not 'median'"),
        ({"label_smoothing": 1.5}, "label_smoothing must lie between 0 and 1, not 1.5"),
        ({"softcap": math.inf}, "softcap must not be negative, infinite or NaN"),
        ({"z_loss": 0.1, "weight": torch.zeros(12)}, "z_loss takes class indices as targets, and no weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("forced", [False, True])
def test_bad_inputs_are_named(change, message, forced):
    arguments = {"input": torch.zeros(3, 8), "linear_weight": torch.zeros(12, 8), "target": torch.arange(3)} | change
    with dispatch.use("torch") if forced else nullcontext(), pytest.raises(ValueError, match=message):
        tilebook.linear_cross_entropy(**arguments)
