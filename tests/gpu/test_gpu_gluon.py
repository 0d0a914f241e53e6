"""The forward in Gluon on a Hopper GPU, which alone runs it: ragged lengths, grouped heads, more tiles than SMs."""

import random

import pytest
import torch

from tilebook import device as devices
from tilebook.kernels.attention import eager
from tilebook.kernels.attention.form import CAUSAL, PLAIN
from tilebook.kernels.attention.gluon import launch as forward_gluon
from tilebook.kernels.attention.ops import attention_fwd

pytestmark = pytest.mark.gpu

GLUON = attention_fwd.implementations["gluon"]
SHAPES = [(1, 1, 1, 64, 64), (2, 4, 2, 200, 333), (1, 4, 4, 1000, 1000), (2, 3, 1, 17, 129), (1, 8, 8, 4096, 4096)]


@pytest.fixture(autouse=True)
def _hopper():
    if not forward_gluon.available(devices.current()):
        pytest.skip("written for sm_90")


def configs(width):
    """The default and some others, the same every time."""
    problem = attention_fwd.problem.parse(f"B2,H16,S4096,D{width},causal", "bf16")
    feasible = GLUON.space.feasible(problem, devices.current())
    default = GLUON.space.default(problem, devices.current())
    return [default, *random.Random(width).sample(feasible, min(4, len(feasible)))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("form", [PLAIN, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("batch", "heads", "heads_kv", "n_q", "n_k"), SHAPES)
def test_it_errs_at_most_twice_as_much_as_pytorch_and_repeats(batch, heads, heads_kv, n_q, n_k, width, form, dtype):
    source = torch.Generator("cuda").manual_seed(1)
    shapes = (batch, heads, n_q, width), (batch, heads_kv, n_k, width), (batch, heads_kv, n_k, width)
    q, k, v = (torch.randn(shape, generator=source, device="cuda", dtype=dtype) for shape in shapes)
    truth, lse = eager.forward(q.float(), k.float(), v.float(), form, width**-0.5)
    usual, _ = eager.forward(q, k, v, form, width**-0.5)
    allowed = 2 * (usual.float() - truth).abs().max() + 1e-3
    for config in configs(width):
        first = GLUON(q, k, v, form, width**-0.5, config=config)
        assert (first[0].float() - truth).abs().max() <= allowed, config
        assert (first[1] - lse).abs().max() < 2e-3, config
        for _ in range(5):
            again = GLUON(q, k, v, form, width**-0.5, config=config)
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True)), config


def test_tensors_that_descriptors_cannot_address_are_copied():
    q = torch.randn(2, 256, 4, 129, device="cuda", dtype=torch.bfloat16)[..., :128].transpose(1, 2)
    o, _ = GLUON(q, q, q, PLAIN, 0.1, config=configs(128)[0])
    torch.testing.assert_close(o, eager.forward(q, q, q, PLAIN, 0.1)[0], rtol=2e-2, atol=2e-2)
