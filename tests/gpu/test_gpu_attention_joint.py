"""The backward pass in one launch, on the GPU that is here: as exact as PyTorch's, and the same bits every time."""

import random

import pytest

from tilebook import device as devices
from tilebook.kernels.attention.backward import attention_bwd
from tilebook.replay import record
from tilebook.tuner.judge.verify import FINAL_REPEATS, Case, verify

pytestmark = pytest.mark.gpu

JOINT = attention_bwd.implementations["triton_joint"]
PROBLEM = attention_bwd.problem

# Both kinds of programs in every proportion: ragged ends, several heads to a key, more blocks than SMs, one block.
TEXTS = [
    "B1,H2,S1,D64",
    "B8,H6,S196,D64",
    "B16,H12,S256,D64",
    "B2,H4,S453,Sk333,D128,causal",
    "B2,H16,Hkv2,S1000,D64,causal",
    "B2,H4,S1000,Sk197,D96",
    "B1,H2,S1000,D128,causal,window300x0",
    "B2,H4,S453,D64,softcap",
    "B2,H4,S453,D64,alibi",
    "B2,H4,S453,D32,maskbqk",
    "B4,H16,S2048,D128",
    "B2,H8,S4096,D128,causal",
]


def _verify(problem, config, repeats):
    """Whether it ran: what no SM has room for is no fault here."""
    try:
        verify(JOINT, config, [Case.make(attention_bwd, problem, "cuda", 0)], repeats=repeats)
    except Exception as broken:
        if type(broken).__name__ != "OutOfResources":
            raise AssertionError(f"{problem.label} {config}: {broken}") from broken
        return False
    return True


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("text", TEXTS)
def test_default_and_random_configs_err_at_most_twice_as_much_as_pytorch(text, dtype):
    gpu, problem = devices.current(), PROBLEM.parse(text, dtype)
    default, feasible = JOINT.space.default(problem, gpu), JOINT.space.feasible(problem, gpu)
    assert _verify(problem, default, 1)
    for config in random.Random(text).sample(feasible, min(4, len(feasible))):
        _verify(problem, config, 1)


@pytest.mark.parametrize("text", ["B8,H6,S196,D64", "B2,H8,S1000,D128,causal", "B2,H16,Hkv2,S1000,D64"])
def test_every_one_of_many_runs_is_right_and_the_same(text):
    """Programs of both kinds run at once: one that read what another has yet to write would show."""
    gpu, problem = devices.current(), PROBLEM.parse(text, "bf16")
    configs = [JOINT.space.default(problem, gpu)]
    configs += [config for config in JOINT.space.feasible(problem, gpu) if config["MAXNREG"]][:1]
    for config in configs:
        _verify(problem, config, FINAL_REPEATS)


def test_a_recorded_call_computes_what_the_launcher_does():
    gpu, problem = devices.current(), PROBLEM.parse("B8,H6,S196,D64", "bf16")
    config = JOINT.space.default(problem, gpu).replace(DESCRIPTORS=2 if gpu.capability >= 90 else 0)
    inputs, other = problem.inputs("cuda", 0), problem.inputs("cuda", 1)
    JOINT(*inputs, config=config)
    _, plan = record(lambda *args: JOINT(*args, config=config), inputs)
    assert plan is not None
    assert all(one.equal(two) for one, two in zip(plan(other), JOINT(*other, config=config), strict=True))
