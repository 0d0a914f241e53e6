"""PyTorch's norms served by recorded launches, without Python, on a GPU."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tilebook

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _ours(below):
    global _repeated
    _repeated = below.repeated


def _leaves(shape, dtype, vectors=2, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    drawn = [torch.randn(shape, device="cuda", generator=generator)]
    drawn += [torch.randn(shape[-1:], device="cuda", generator=generator) for _ in range(vectors)]
    return [each.to(dtype).requires_grad_() for each in drawn]


def _layer(x, weight=None, bias=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _rms(x, weight=None):
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def _step(norm, leaves):
    y = norm(*leaves)
    return [y.detach(), *torch.autograd.grad(y.float().pow(2).sum() + y.float().sum(), leaves)]


def _assert_near(found, theirs, truth):
    for mine, other, exact in zip(found, theirs, truth, strict=True):
        assert (mine.dtype, mine.shape, mine.stride()) == (other.dtype, other.shape, other.stride())
        far, theirs_far = ((each.double() - exact).abs().max().item() for each in (mine, other))
        assert far <= 2 * theirs_far + 1e-5 * exact.abs().max().item()


CASES = [(_layer, 2), (_layer, 1), (_layer, 0), (_rms, 1), (_rms, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 128), (3, 5, 384), (2, 3, 7, 1500), (1, 4096), (20_000, 96)], ids=str)
@pytest.mark.parametrize(("norm", "vectors"), CASES)
def test_numbers_are_as_near_as_pytorchs(norm, vectors, shape, dtype):
    leaves = _leaves(shape, dtype, vectors)
    theirs = _step(norm, leaves)
    truth = _step(norm, [x.detach().double().requires_grad_() for x in leaves])
    with tilebook.enabled():
        for _ in range(6):
            _assert_near(_step(norm, leaves), theirs, truth)
        assert _repeated() >= 4


@pytest.mark.parametrize("layout", ["transposed", "cut out", "expanded"])
def test_tensors_of_other_layouts(layout):
    def leaf(dtype):
        generator = torch.Generator("cuda").manual_seed(0)
        if layout == "transposed":
            return torch.randn(8, 384, 196, device="cuda", generator=generator, dtype=dtype).transpose(1, 2)
        if layout == "cut out":
            return torch.randn(8, 200, 400, device="cuda", generator=generator, dtype=dtype)[:, 1:197, 8:392]
        return torch.randn(1, 196, 384, device="cuda", generator=generator, dtype=dtype).expand(8, 196, 384)

    x = leaf(torch.float32).requires_grad_()
    others = _leaves((384,), torch.float32)[1:]
    theirs = _step(_layer, [x, *others])
    truth = _step(_layer, [each.detach().double().requires_grad_() for each in (x, *others)])
    with tilebook.enabled():
        for _ in range(6):
            found = _step(_layer, [x, *others])
            for mine, exact in zip(found, truth, strict=True):
                torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
            assert found[0].stride() == theirs[0].stride()
        assert _repeated() >= 4


def test_graphs_streams_and_threads():
    leaves = _leaves((512, 384), torch.float32)
    right = _step(_layer, leaves)
    with tilebook.enabled():
        for _ in range(4):
            _step(_layer, leaves)
        graph, x = torch.cuda.CUDAGraph(), leaves[0].detach().clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            _layer(x, *leaves[1:])
            _repeated()
            with torch.cuda.graph(graph, stream=side):
                y = _layer(x, *leaves[1:])
            assert _repeated() == 1
        x.mul_(2)
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(y, _layer(x, *leaves[1:]), rtol=1e-5, atol=1e-5)
        wrong = []

        def work():
            mine = torch.cuda.Stream()
            mine.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(mine):
                for _ in range(30):
                    for found, wanted in zip(_step(_layer, leaves), right, strict=True):
                        if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-4):
                            wrong.append(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert not wrong


def test_a_kind_that_is_new_under_capture_is_pytorchs():
    x = torch.randn(77, 384, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with tilebook.enabled(), torch.cuda.graph(graph):
        y = _layer(x)
    graph.replay()
    torch.testing.assert_close(y, _layer(x))


def test_autocast_checkpoints_and_second_derivatives():
    leaves = _leaves((512, 384), torch.float32)

    def found():
        with torch.autocast("cuda", torch.bfloat16):
            cast = _layer(leaves[0].bfloat16(), *leaves[1:])
        assert cast.dtype == torch.float32
        again = checkpoint(_layer, *leaves, use_reentrant=False)
        (dx,) = torch.autograd.grad(_layer(*leaves).pow(3).sum(), leaves[0], create_graph=True)
        return [cast.detach(), *torch.autograd.grad(again.square().sum(), leaves),
                *torch.autograd.grad(dx.square().sum(), leaves[:2])]  # fmt: skip

    right = found()
    with tilebook.enabled():
        for _ in range(4):
            for mine, wanted in zip(found(), right, strict=True):
                torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_a_model_trains_to_the_same_losses():
    def losses(on):
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True, norm_first=True).cuda()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        x, found = torch.randn(8, 64, 128, device="cuda"), []
        for _ in range(12):
            with tilebook.enabled() if on else torch.enable_grad():
                loss = (layer(x) - x.flip(1)).square().mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-3)
    assert _repeated() >= 20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_gpu_has_its_own_launches():
    with tilebook.enabled():
        for gpu in (1, 0, 1):
            x = torch.randn(64, 384, device=f"cuda:{gpu}")
            for _ in range(4):
                torch.testing.assert_close(_layer(x), _layer(x.cpu()).to(x.device), rtol=1e-4, atol=1e-4)
