"""The loss of a head on the GPU that is here: cuBLAS's products into chunks, memory, and PyTorch's own composition."""

import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import dispatch
from tilebook.kernels.linear_cross_entropy import chunks

pytestmark = pytest.mark.gpu


def drawn(rows, features, classes, dtype, bias=False):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((rows, features), 1.0), ((classes, features), features**-0.5), ((classes,), 1.0)
    x, w, b = (
        (torch.randn(shape, device="cuda", generator=generator) * size).to(dtype).requires_grad_()
        for shape, size in shapes
    )
    target = torch.randint(classes, (rows,), device="cuda", generator=generator)
    target[1::7] = -100
    return (x, w, b if bias else None), target


def composed(x, w, target, *, linear_bias=None, **options):
    return F.cross_entropy(F.linear(x, w, linear_bias), target, **options)


def gradients(function, tensors, target, dy=None, **options):
    x, w, b = tensors
    loss = function(x, w, target, linear_bias=b, **options)
    return [loss.detach(), *torch.autograd.grad(loss, [each for each in tensors if each is not None], dy)]


def assert_no_worse(found, theirs, right):
    for mine, other, truth in zip(found, theirs, right, strict=True):
        assert mine.dtype == other.dtype
        luck = 1e-6 if mine.ndim else torch.finfo(other.dtype).eps
        assert (mine - truth).norm() <= 2 * (other - truth).norm() + luck * truth.norm()


def wide(tensors):
    return tuple(None if x is None else x.detach().double().requires_grad_() for x in tensors)


SIZES = {"small": (600, 64, 1000), "GPT-2": (2000, 256, 50257), "Llama-3": (2500, 256, 128256), "odd": (999, 65, 20001)}


@pytest.mark.parametrize("step", [None, 384])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_heads_are_right(name, dtype, bias, step, monkeypatch):
    if step:
        monkeypatch.setattr(chunks, "step_of", lambda count, classes, itemsize: step)
    tensors, target = drawn(*SIZES[name], dtype, bias)
    options = {"label_smoothing": 0.1} if bias else {}
    with dispatch.use("triton"):
        found = gradients(tilebook.linear_cross_entropy, tensors, target, **options)
    theirs = gradients(composed, tensors, target, **options)
    assert_no_worse(found, theirs, gradients(composed, wide(tensors), target, **options))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_gradients_are_summed_in_fp32(cast, monkeypatch):
    monkeypatch.setattr(chunks, "step_of", lambda count, classes, itemsize: 512)
    tensors, target = drawn(2500, 256, 32000, torch.float32)
    scale = torch.tensor(65536.0 if cast == torch.float16 else 1.0, device="cuda")
    with torch.autocast("cuda", cast):
        with dispatch.use("triton"):
            found = gradients(tilebook.linear_cross_entropy, tensors, target, scale)
        theirs = gradients(composed, tensors, target, scale)
    assert_no_worse(found, theirs, gradients(composed, wide(tensors), target, scale.double()))


def test_without_being_told_it_takes_large_calls_and_repeats_them():
    tensors, target = drawn(4096, 512, 128256, torch.bfloat16)
    found = [gradients(tilebook.linear_cross_entropy, tensors, target) for _ in range(4)]
    for each in found[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(each, found[0], strict=True))
    theirs = gradients(composed, tensors, target)
    for mine, other in zip(found[0], theirs, strict=True):
        assert (mine.float() - other.float()).norm() <= 2e-2 * other.float().norm()


def test_a_step_holds_a_chunk_of_logits_and_nothing_else_of_their_size():
    (x, w, _), target = drawn(8192, 1024, 128256, torch.bfloat16)
    tilebook.linear_cross_entropy(x, w, target).backward()
    x.grad = w.grad = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tilebook.linear_cross_entropy(x, w, target).backward()
    beyond = torch.cuda.max_memory_allocated() - before - (x.numel() + w.numel()) * 2
    assert beyond <= 1.1 * chunks.CHUNK_BYTES


def test_a_graph_is_captured_and_replayed():
    tensors, target = drawn(2048, 512, 50257, torch.bfloat16)
    for _ in range(3):
        gradients(tilebook.linear_cross_entropy, tensors, target)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(tilebook.linear_cross_entropy, tensors, target)
    with torch.no_grad():
        tensors[0].mul_(0.5)
    graph.replay()
    for mine, right in zip(found, gradients(tilebook.linear_cross_entropy, tensors, target), strict=True):
        assert torch.equal(mine, right)


def test_compiled_it_is_the_same():
    tensors, target = drawn(2048, 512, 50257, torch.bfloat16)
    right = gradients(tilebook.linear_cross_entropy, tensors, target)
    compiled = torch.compile(tilebook.linear_cross_entropy, fullgraph=True)
    for mine, other in zip(gradients(compiled, tensors, target), right, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("by", [1.0, 0.125, -3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_are_multiplied_where_they_lie(dtype, by):
    x = torch.randn(70_001, 37, device="cuda").to(dtype)
    right = (x.float() * by).to(dtype)
    assert chunks.scaled(x, torch.tensor(by, device="cuda"), dtype, True) is x
    assert torch.equal(x, right)


def test_a_language_model_trains_without_logits():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    config = transformers.AutoConfig.for_model("llama", **sizes, num_key_value_heads=2, vocab_size=128256)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).cuda().train()
    ids = torch.randint(128256, (4, 512), device="cuda")

    def step():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        return out.logits, [out.loss.detach(), *[p.grad for p in model.parameters()]]

    _, right = step()
    with tilebook.patched(model, loss_head=True):
        logits, found = step()
    assert logits is None
    for mine, wanted in zip(found, right, strict=True):
        assert mine.dtype == wanted.dtype
        assert (mine - wanted).norm() <= 4e-2 * wanted.norm()
