"""PyTorch's attention served by recorded launches below its autograd, on a GPU."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tilebook
from tilebook import dispatch, native

pytestmark = pytest.mark.gpu
sdpa = F.scaled_dot_product_attention


def _drawn(*shape, dtype=torch.bfloat16, layout="tokens first", seed=0):
    """(B, H, S, D): of one tensor for all heads, (B, S, H, D); as it is; or cut out of packed projections."""
    generator = torch.Generator("cuda").manual_seed(seed)
    batch, heads, length, width = shape
    if layout == "heads first":
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)
    pieces = 3 if layout == "packed" else 1
    made = torch.randn(batch, length, pieces, heads, width, device="cuda", generator=generator).to(dtype)
    return made[:, :, -1].transpose(1, 2)


def _leaves(shape, kv=None, **drawn):
    return [_drawn(*(kv if n and kv else shape), seed=n, **drawn).requires_grad_() for n in range(3)]


def _step(leaves, **options):
    grouped = {"enable_gqa": True} if leaves[0].shape[1] != leaves[1].shape[1] else {}
    o = sdpa(*leaves, **options, **grouped)
    return [
        o.detach(),
        *torch.autograd.grad((o.float() * torch.linspace(-1, 1, o.shape[-1], device="cuda")).sum(), leaves),
    ]


def _truth(leaves, **options):
    return _step([x.detach().double().requires_grad_() for x in leaves], **options)


def _assert_near(found, theirs, truth):
    for mine, other, exact in zip(found, theirs, truth, strict=True):
        assert (mine.dtype, mine.shape, mine.stride()) == (other.dtype, other.shape, other.stride())
        far, theirs_far = ((each.double() - exact).abs().max().item() for each in (mine, other))
        assert far <= 2 * theirs_far + 1e-3 * exact.abs().max().item()


CASES = {
    "vision": {"shape": (8, 6, 196, 64)},
    "vision, heads first": {"shape": (8, 6, 197, 64), "layout": "heads first"},
    "packed projections": {"shape": (4, 12, 256, 64), "layout": "packed"},
    "causal": {"shape": (2, 8, 1024, 128), "is_causal": True},
    "causal, odd": {"shape": (2, 4, 333, 64), "is_causal": True},
    "grouped": {"shape": (2, 16, 512, 128), "kv": (2, 4, 512, 128), "is_causal": True},
    "longer keys": {"shape": (2, 8, 100, 64), "kv": (2, 8, 700, 64)},
    "a scale": {"shape": (2, 8, 256, 64), "scale": 0.5},
    "fp16": {"shape": (2, 8, 512, 64), "dtype": torch.float16},
    "narrow": {"shape": (2, 8, 300, 32)},
    "an odd width": {"shape": (2, 8, 300, 72)},
    "wide": {"shape": (1, 4, 512, 256), "is_causal": True},
}


@pytest.mark.parametrize("descriptors", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_numbers_are_as_near_as_pytorchs(below, case, descriptors):
    below.changes = {"DESCRIPTORS": descriptors}
    given = dict(CASES[case])
    options = {name: given.pop(name) for name in ("is_causal", "scale") if name in given}
    leaves = _leaves(**given)
    theirs, truth = _step(leaves, **options), _truth(leaves, **options)
    with tilebook.enabled():
        for _ in range(6):
            _assert_near(_step(leaves, **options), theirs, truth)
            leaves = [(x.detach() + 0).requires_grad_() if "packed" not in case else x for x in leaves]  # elsewhere
        assert below.repeated("attention_fwd") >= 3
        _assert_near(_step(leaves, **options), theirs, truth)
        assert below.repeated() == 2


def test_a_kernel_in_gluon(below):
    below.implementation = "gluon"
    leaves = _leaves((16, 16, 1024, 128))
    theirs, truth = _step(leaves), _truth(leaves)
    with tilebook.enabled():
        for _ in range(6):
            _assert_near(_step(leaves), theirs, truth)
        assert below.repeated("attention_fwd") >= 3


@pytest.mark.parametrize("implementation", ["cudnn", "mem_efficient"])
def test_what_is_no_launch_of_ours_is_run_by_python(below, implementation):
    below.implementation = implementation
    leaves = _leaves((4, 16, 4096, 128))
    theirs, truth = _step(leaves), _truth([x[:1, :2] for x in leaves])
    with tilebook.enabled():
        for _ in range(6):
            found = _step(leaves)
            _assert_near([x[:1, :2] for x in found], [x[:1, :2] for x in theirs], truth)
        assert below.repeated() == 0


def test_graphs_compiled_models_checkpoints_and_inference(below):
    leaves = _leaves((4, 12, 256, 64))
    right = _step(leaves)

    def near(found):
        for mine, wanted in zip(found, right, strict=False):
            torch.testing.assert_close(mine, wanted, rtol=0.05, atol=0.02 * wanted.abs().max().item())

    with tilebook.enabled():
        for _ in range(4):
            near(_step(leaves))
        below.repeated()
        with torch.no_grad():
            for _ in range(4):
                near([sdpa(*leaves)])
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                o = sdpa(*leaves)
            graph.replay()
            near([o])
        assert below.repeated() >= 2
        for mode in (None, "reduce-overhead"):
            torch.compiler.reset()
            step = torch.compile(lambda *leaves: sdpa(*leaves) * 1.0, fullgraph=True, mode=mode)
            for _ in range(6):
                torch.compiler.cudagraph_mark_step_begin()
                o = step(*leaves)
                grads = torch.autograd.grad((o.float() * torch.linspace(-1, 1, 64, device="cuda")).sum(), leaves)
                near([o.detach().clone(), *[each.clone() for each in grads]])
            assert below.repeated() >= 2
        o = checkpoint(sdpa, *leaves, use_reentrant=False)
        near([o.detach()])
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            near([sdpa(*[x.float() for x in leaves])])


def test_of_tokens_that_are_generated_nobody_is_asked(below):
    q = _drawn(2, 8, 1, 64)
    for length in range(300, 316):
        k, v = _drawn(2, 2, length, 64, seed=1), _drawn(2, 2, length, 64, seed=2)
        with tilebook.enabled(), torch.no_grad():
            before = dispatch.here.kinds
            found = sdpa(q, k, v, enable_gqa=True)
            assert dispatch.here.kinds == before
        assert torch.equal(found, sdpa(q, k, v, enable_gqa=True))


def test_deterministic_programs_have_the_same_bits(below):
    leaves = _leaves((2, 8, 512, 64))
    torch.use_deterministic_algorithms(True)
    try:
        with tilebook.enabled():
            found = [_step(leaves) for _ in range(6)]
    finally:
        torch.use_deterministic_algorithms(False)
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, found[0], strict=True))


def test_programs_that_are_only_to_be_warned_are_by_pytorchs_own_kernels(below):
    leaves = _leaves((2, 8, 512, 64))

    def told():
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            _step(leaves)
        return {str(each.message) for each in found if "determin" in str(each.message)}

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_warn_always(True)
    try:
        plain = told()
        assert plain
        with tilebook.enabled():
            assert [told() for _ in range(4)] == [plain] * 4
            assert below.repeated() == 0
    finally:
        torch.set_warn_always(False)
        torch.use_deterministic_algorithms(False)


def test_masks_dropout_and_other_backends_are_pytorchs(below):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    leaves = _leaves((2, 8, 256, 64))
    mask = torch.ones(2, 1, 256, 256, device="cuda", dtype=torch.bool).tril()
    right = _step(leaves, attn_mask=mask)
    with tilebook.enabled():
        for _ in range(5):
            for mine, wanted in zip(_step(leaves, attn_mask=mask), right, strict=True):
                assert torch.equal(mine, wanted)
            _step(leaves, dropout_p=0.1)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                _step(leaves)
        assert below.repeated() == 0


def test_streams_and_threads(below):
    import threading

    leaves, wrong = _leaves((4, 6, 196, 64)), []
    right = _step(leaves)

    def work():
        mine = torch.cuda.Stream()
        mine.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(mine):
            for _ in range(30):
                for found, wanted in zip(_step(leaves), right, strict=True):
                    if not torch.allclose(found, wanted, rtol=0.05, atol=0.02 * wanted.abs().max().item()):
                        wrong.append(1)
        mine.synchronize()

    with tilebook.enabled():
        threads = [threading.Thread(target=work) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert not wrong
    assert below.repeated() > 100


def test_it_is_on(below):
    with tilebook.enabled():
        assert "aten::_scaled_dot_product_cudnn_attention_backward" in tilebook.status().served
        assert F.scaled_dot_product_attention is sdpa
    assert native.available()
