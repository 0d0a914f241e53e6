"""The backward pass that adds dq up in memory: right wherever it says it can run, and never where bits must repeat."""

import pytest
import torch

from tilebook import device as devices
from tilebook.kernels.attention.backward import attention_bwd
from tilebook.tuner.verify import Case, verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = devices.find("H200")
PROBLEM = attention_bwd.problem
REDUCE = attention_bwd.implementations["triton_reduce"]

CONFIGS = {
    "pointers": {"BLOCK_M": 32, "BLOCK_N": 64, "DESCRIPTORS": 0},
    "descriptors": {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "DESCRIPTORS": 1},
    "rows in turns": {"BLOCK_M": 32, "BLOCK_N": 64, "TURNED": 1, "DESCRIPTORS": 1},
    "heads in turns": {"BLOCK_M": 64, "BLOCK_N": 64, "HEADS": 4, "DESCRIPTORS": 0},
}
RAGGED = [
    ("B1,H2,S1,D64", "bf16"),
    ("B1,H2,S197,D64", "bf16"),
    ("B2,H2,S100,D16", "fp16"),
    ("B1,H2,S197,D64,causal", "fp16"),
    ("B1,H1,S100,Sk197,D64,causal", "bf16"),
    ("B1,H1,S197,Sk100,D32,causal", "bf16"),
    ("B1,H6,Hkv2,S70,D32", "bf16"),
    ("B1,H4,Hkv1,S40,Sk150,D128,causal", "fp16"),
    ("B1,H2,S100,D72,causal", "bf16"),
    ("B1,H2,Hkv1,S40,Sk70,D96", "fp16"),
    ("B1,H2,S70,Sk197,D32,causal,bottom_right", "bf16"),
    ("B1,H1,S197,Sk100,D64,causal,bottom_right", "bf16"),
    ("B1,H2,S197,D32,causal,window40x0", "bf16"),
    ("B1,H4,Hkv2,S100,Sk150,D32,bottom_right,window70x9", "fp16"),
]


def _config(problem, **axes):
    return REDUCE.space.default(problem, H200).replace(**axes)


@pytest.mark.parametrize(("text", "dtype"), RAGGED)
@pytest.mark.parametrize("axes", CONFIGS.values(), ids=CONFIGS)
def test_it_is_right(axes, text, dtype):
    problem = PROBLEM.parse(text, dtype)
    assert REDUCE.supports(problem)
    verify(REDUCE, _config(problem, **axes), [Case.make(attention_bwd, problem, DEVICE, 1)], repeats=0)
