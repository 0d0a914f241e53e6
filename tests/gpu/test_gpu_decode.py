"""Decoding on the GPU that is here: ragged lengths, descriptors, huge caches, and what dispatch repeats."""

import random

import pytest
import torch

import tilebook
from tilebook import device as devices
from tilebook.kernels.decode.ops import decode
from tilebook.kernels.decode.problem import DecodeProblem
from tilebook.op import Config
from tilebook.tuner.judge.verify import Case, verify

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("problem", DecodeProblem.examples(), ids=lambda p: p.label)
def test_ragged_lengths_are_right_with_random_configs(problem):
    gpu, space = devices.current(), decode.tunable.space
    chosen = random.Random(problem.label).sample(space.feasible(problem, gpu), 3)
    for each in (problem, *problem.neighbours()):
        case = Case.make(decode, each, "cuda", 1)
        for config in (space.default(problem, gpu), *chosen):
            verify(decode.tunable, config, [case])


@pytest.mark.parametrize("text", ["B16,H32,Hkv8,S1,Sk4096,D128,ragged", "B4,H32,Hkv4,S8,Sk8192,D64,paged128,causal"])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_descriptors_are_right(text, stages):
    if devices.current().capability < 90:
        pytest.skip("tensor descriptors need sm_90 or later")
    problem = DecodeProblem.parse(text, "bf16")
    case = Case.make(decode, problem, "cuda", 1)
    for block_n, warps in ((32, 2), (64, 4), (128, 8)):
        config = Config(BLOCK_N=block_n, PER_SM=2, num_warps=warps, num_stages=stages, DESCRIPTORS=1)
        verify(decode.tunable, config, [case])


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_caches_of_more_than_2_to_31_elements(paged):
    """The last sequence, or block, lies beyond what 32 bits address."""
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GB of GPU memory")
    keys, width = 1 << 12, 128
    shape = ((1 << 31) // (16 * 8 * width) + keys // 16, 16, 8, width) if paged else (520, 8, keys, width)
    k = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
    v = torch.empty_like(k)
    q, few_k, few_v = (
        torch.randn(1, heads, n, width, device="cuda", dtype=k.dtype) for heads, n in ((16, 1), (8, keys), (8, keys))
    )
    expected = tilebook.attention_decode(q, few_k, few_v)
    if paged:
        blocks = keys // 16
        for whole, few in ((k, few_k), (v, few_v)):
            whole[-blocks:] = few[0].transpose(0, 1).reshape(blocks, 16, 8, width)
        table = torch.arange(len(k) - blocks, len(k), device="cuda", dtype=torch.int32)[None]
        lens = torch.full((1,), keys, device="cuda", dtype=torch.int32)
        o = tilebook.attention_decode(q, k, v, seq_lens=lens, block_table=table)
    else:
        k[-1], v[-1] = few_k[0], few_v[0]
        lens = torch.zeros(len(k), device="cuda", dtype=torch.int32)
        lens[-1] = keys
        o = tilebook.attention_decode(q.expand(len(k), -1, -1, -1), k, v, seq_lens=lens)[-1:]
    torch.testing.assert_close(o, expected, rtol=2e-2, atol=2e-3)


def test_repeated_calls_follow_lengths_and_tables_on_the_gpu():
    """From the third call on a recorded plan runs; the numbers in seq_lens and the table are read anew each time."""
    problem = DecodeProblem.parse("B4,H16,Hkv4,S1,Sk1024,D128,paged16", "bf16")
    for seed in range(1, 7):
        q, k, v, lens, table, causal, scale, *_ = problem.inputs("cuda", seed)
        o, lse = tilebook.attention_decode(
            q, k, v, seq_lens=lens, block_table=table, causal=causal, scale=scale, return_lse=True
        )
        case = Case.make(decode, problem, "cuda", seed)
        case.judge((o, lse))


def test_a_captured_graph_follows_lengths_on_the_gpu():
    problem = DecodeProblem.parse("B4,H16,Hkv4,S1,Sk1024,D128,ragged", "bf16")
    q, k, v, lens, *_ = problem.inputs("cuda", 1)

    def call():
        return tilebook.attention_decode(q, k, v, seq_lens=lens)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call()
    lens.fill_(77)
    graph.replay()
    assert torch.equal(o, call())
