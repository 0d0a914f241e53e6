"""The backward pass that adds dq up in memory, on the GPU that is here: as exact as PyTorch's, time after time."""

import random

import pytest

from tilebook import device as devices
from tilebook.kernels.attention.backward import attention_bwd
from tilebook.tuner.judge.verify import FINAL_REPEATS, Case, verify

pytestmark = pytest.mark.gpu

REDUCE = attention_bwd.implementations["triton_reduce"]
PROBLEM = attention_bwd.problem

# Shared among programs in every way: ragged ends, several heads to a key, more blocks than SMs, one block.
TEXTS = [
    "B1,H2,S1,D64",
    "B2,H4,S197,D64",
    "B2,H4,S453,Sk333,D128,causal",
    "B2,H8,Hkv2,S1000,D64,causal",
    "B2,H4,S1000,Sk197,D96",
    "B1,H2,S1000,D128,causal,window300x0",
    "B4,H16,S2048,D128",
    "B2,H8,S4096,D128,causal",
    "B2,H8,Hkv4,S4096,D64",
]


def _verify(problem, config, repeats):
    """Whether it ran: what no SM has room for is no fault here."""
    try:
        verify(REDUCE, config, [Case.make(attention_bwd, problem, "cuda", 0)], repeats=repeats)
    except Exception as broken:
        if type(broken).__name__ != "OutOfResources":
            raise AssertionError(f"{problem.label} {config}: {broken}") from broken
        return False
    return True


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("text", TEXTS)
def test_default_and_random_configs_err_at_most_twice_as_much_as_pytorch(text, dtype):
    gpu, problem = devices.current(), PROBLEM.parse(text, dtype)
    default, feasible = REDUCE.space.default(problem, gpu), REDUCE.space.feasible(problem, gpu)
    assert _verify(problem, default, 1)
    for config in random.Random(text).sample(feasible, min(4, len(feasible))):
        _verify(problem, config, 1)


@pytest.mark.parametrize("text", ["B2,H4,S1000,Sk197,D96", "B2,H8,S4096,D128,causal", "B2,H8,Hkv4,S4096,D64"])
def test_configs_without_a_pipeline_are_right_or_rejected(text):
    """On an H200 those with 32 rows gave a wrong dq or accessed memory that is not theirs."""
    gpu, problem, ran = devices.current(), PROBLEM.parse(text, "bf16"), 0
    for rows, columns, warps in ((32, 64, 4), (32, 64, 8), (32, 128, 8), (64, 64, 4), (64, 64, 8), (128, 64, 8)):
        config = REDUCE.space.default(problem, gpu).replace(
            BLOCK_M=rows, BLOCK_N=columns, num_warps=warps, num_stages=1, DESCRIPTORS=0
        )
        if REDUCE.space.reject(problem, config, gpu) is None:
            ran += _verify(problem, config, 1)
    assert ran


@pytest.mark.parametrize("text", ["B2,H4,S197,D64", "B2,H8,S1000,D128,causal", "B1,H8,S4096,D128"])
def test_every_one_of_many_runs_is_right(text):
    """Sums in another order each time; a write that comes before its zero, or is lost, would show."""
    gpu, problem = devices.current(), PROBLEM.parse(text, "bf16")
    configs = [REDUCE.space.default(problem, gpu)]
    configs += [config for config in REDUCE.space.feasible(problem, gpu) if config["DESCRIPTORS"]][:1]
    for config in configs:
        _verify(problem, config, FINAL_REPEATS)
