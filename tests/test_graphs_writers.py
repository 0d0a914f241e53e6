"""Graphs in which something else may write to a mask, or another kernel has been asked for: they stay as they are."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_graphs import SDPA, Seen, places, qkv
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilebook import graphs

N = 12
checkpoint = torch.utils.checkpoint.checkpoint


def causal():
    return places(N) <= places(N)[:, None]


def hidden():
    return torch.zeros(N, N).masked_fill(~causal(), -torch.inf)


def run(monkeypatch, attend, *given, takes=True):
    """What is changed of `attend`, which has the numbers and gradients that it has when it is not compiled."""
    monkeypatch.setattr(graphs, "_takes", lambda *_: takes)
    leaves, seen = [x.requires_grad_() for x in qkv()], Seen()
    torch.compiler.reset()
    found, right = torch.compile(attend, backend=seen)(*leaves, *given), attend(*leaves, *given)
    torch.testing.assert_close(found, right)
    pairs = zip(*(torch.autograd.grad(o, leaves, torch.ones_like(o)) for o in (found, right)), strict=True)
    for mine, expected in pairs:
        torch.testing.assert_close(mine, expected)
    return sum(seen.changed)


class Filling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask):
        mask[3, :5] = 0.7
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@torch.library.custom_op("tilebook_tests::filled", mutates_args={"x"})
def filled(x: torch.Tensor) -> None:
    x[3, :5] = 0.7


def _fill(x):
    x[3, :5] = 0.7
    return x.sum()


WRITERS = {
    "an op by its packet": lambda mask, q: torch.ops.tilebook_tests.filled(mask),
    "an op": lambda mask, q: filled(mask),
    "what is checkpointed": lambda mask, q: checkpoint(_fill, mask, use_reentrant=False),
    "a function with a derivative of its own": lambda mask, q: Filling.apply(q, mask),
    "relu": lambda mask, q: F.relu(mask.add_(1.0), inplace=True),
    "an activation": lambda mask, q: F.hardtanh(mask, -1.0, 0.5, inplace=True),
    "dropout": lambda mask, q: F.dropout(mask, 0.0, True, True),
    "out": lambda mask, q: torch.mul(mask, 0.5, out=mask),
    "a list of them": lambda mask, q: torch._foreach_mul_([mask], 0.5),
    "what writes elsewhere too": lambda mask, q: torch.frexp(mask, out=(mask, torch.zeros(N, N, dtype=torch.int32))),
}


@pytest.mark.parametrize("write", WRITERS)
def test_a_mask_that_something_may_write_to_stays(monkeypatch, write):
    def attend(q, k, v):
        mask = hidden()
        WRITERS[write](mask, q)
        return SDPA(q, k, v, mask)

    assert run(monkeypatch, attend) == 0


@pytest.mark.parametrize(
    "write", ["an op by its packet", "what is checkpointed", "a function with a derivative of its own"]
)
def test_keys_that_something_may_write_to_stay(monkeypatch, write):
    def attend(q, k, v, keys):
        keys = keys.clone()
        mask = causal() & (keys[:, None, 0] > -1)
        WRITERS[write](keys[0, :, :12], q)
        return SDPA(q, k, v, mask[:, None])

    assert run(monkeypatch, attend, torch.randn(2, N, N)) == 0


def test_what_only_reads_a_mask_leaves_it_known(monkeypatch):
    def attend(q, k, v):
        mask = hidden()
        a = checkpoint(lambda q, k, v, mask: SDPA(q, k, v, mask) * mask.exp().sum(), q, k, v, mask, use_reentrant=False)
        return SDPA(a, k, v, mask) + mask.softmax(-1).mean() + F.linear(mask.exp(), torch.ones(3, N)).sum()

    assert run(monkeypatch, attend) == 2


def test_one_window_after_another(monkeypatch):
    def attend(q, k, v):
        window = causal() & (places(N) > places(N)[:, None] - 4)
        o = SDPA(q, k, v, window)
        o = SDPA(o, k, o, window)
        return SDPA(q, o, o, causal())

    assert run(monkeypatch, attend) == 3


def test_copies_that_are_written_to_stay(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    q, k, v = (torch.randn(2, heads, N, 16, dtype=torch.bfloat16) for heads in (6, 2, 2))

    def repeated(x):
        return x[:, :, None, :, :].expand(2, 2, 3, N, 16).reshape(2, 6, N, 16)

    def attend(q, k, v):
        a, b = repeated(k), repeated(v)
        a.mul_(0.5)
        return SDPA(q, a, b, causal())

    seen = Seen()
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(attend, backend=seen)(q, k, v), attend(q, k, v))
    (call,) = [node for node in seen.graphs[0].nodes if node.target is graphs.scaled_dot_product_attention]
    assert not call.kwargs["enable_gqa"]


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0, -1])
def test_scales_of_which_a_causal_mask_makes_other_numbers_stay(monkeypatch, scale):
    assert run(monkeypatch, lambda q, k, v: SDPA(q, k, v, causal(), scale=scale)) == 0
    assert run(monkeypatch, lambda q, k, v: SDPA(q, k, v, causal(), scale=0.5)) == 1


def test_infinite_scales_stay():
    assert not graphs._positive(math.inf)
    assert not graphs._positive(math.nan)
    assert graphs._positive(1)


def test_backends_that_were_asked_for_are_kept(monkeypatch):
    def within(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            return SDPA(q, k, v, causal())

    assert run(monkeypatch, within) == 0
    with sdpa_kernel(SDPBackend.MATH):
        assert run(monkeypatch, lambda q, k, v: SDPA(q, k, v, causal())) == 0
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        assert run(monkeypatch, lambda q, k, v: SDPA(q, k, v, causal())) == 1


def test_deterministic_programs_have_deterministic_ops(monkeypatch):
    monkeypatch.setattr(graphs, "_takes", lambda *_: True)

    def attend(q, k, v):
        return SDPA(q, k, v, causal() & (places(N) > places(N)[:, None] - 4))

    for on in (False, True):
        seen = Seen()
        torch.compiler.reset()
        torch.use_deterministic_algorithms(on)
        try:
            torch.compile(lambda q, k, v: SDPA(q, k, v, causal() & (places(N) > places(N)[:, None] - 4)), backend=seen)(
                *qkv()
            )
        finally:
            torch.use_deterministic_algorithms(False)
        (call,) = [node for node in seen.graphs[0].nodes if node.target is graphs._windowed()]
        assert call.args[-1] is on


def test_the_least_number_of_fp16_hides_nothing_from_large_scores():
    q, k, v = (x.half() * 300 for x in qkv())
    seen = Seen()
    torch.compiler.reset()

    def attend(q, k, v):
        return SDPA(q, k, v, torch.full((N, N), torch.finfo(torch.float16).min, dtype=torch.float16).triu(1))

    torch.testing.assert_close(torch.compile(attend, backend=seen)(q, k, v), attend(q, k, v))
    assert seen.changed == [0]


@pytest.mark.parametrize("lies", ["as q", "otherwise"])
def test_on_a_gpu_the_result_lies_as_it_did(monkeypatch, lies):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    node, q = torch.fx.Graph().placeholder("o"), torch.fx.Graph().placeholder("q")
    q.meta["example_value"] = torch.empty(2, 4, N, 16)
    o = torch.empty(2, 4, N, 16) if lies == "as q" else torch.empty(2, N, 4, 16).transpose(1, 2)
    node.meta["example_value"] = o
    assert graphs._lies_alike(node, q) == (lies == "as q")


@pytest.mark.parametrize(
    ("region", "expected"), [((True, torch.bfloat16), torch.bfloat16), ((False, None), torch.float32), (None, None)]
)
def test_regions_of_autocast_in_the_program_say_what_factors_are(region, expected):
    found = []

    def looked_at(module, example_inputs):
        for node in module.graph.nodes:
            if node.target is graphs.scaled_dot_product_attention:
                found.append(graphs._factor(node, node.args[0]))
        return module.forward

    def attend(q, k, v):
        with torch.autocast("cpu", torch.float16):
            q = q @ torch.eye(16) * 1.0
        if region is None:
            return SDPA(q.float(), k, v)
        with torch.autocast("cpu", enabled=region[0], dtype=region[1]):
            return SDPA(q.float(), k, v)

    torch.compiler.reset()
    torch.compile(attend, backend=looked_at)(*qkv())
    assert found == [expected or torch.float32]
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(attend, backend=looked_at)(*qkv())
    assert found[1] == (expected or torch.bfloat16)
