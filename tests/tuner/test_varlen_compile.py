"""Packed sequences' kernels compile for Hopper with their default config in every form.

What the interpreter runs may still be no program to a compiler: older Tritons return no None from a function.
"""

import pytest

from tilebook import device as devices
from tilebook import op as ops
from tilebook.tuner.process.compile import CompilePool

pytestmark = pytest.mark.usefixtures("forked")

FORMS = [
    ("B16,H16,T16384,S2048,D64,causal", "bf16"),  # with tensor descriptors
    ("B16,H8,T4096,S1024,D128", "bf16"),
    ("B8,H8,Hkv2,T2048,Tk4096,S512,Sk2048,D128,causal", "bf16"),
    ("B8,H4,T2048,Tk4096,S512,Sk1024,D64,causal,top_left", "bf16"),
    ("B8,H4,T4096,S1024,D128,causal,window200x0", "bf16"),
    ("B8,H4,T4096,S1024,D64,window100x30,softcap", "fp16"),
    ("B8,H4,T4096,S1024,D96,causal,softcap", "bf16"),
    ("B8,H4,T4096,S1024,D64,causal", "fp32"),
]
GPU = devices.find("NVIDIA H200")


@pytest.fixture(scope="module")
def pool():
    with CompilePool(GPU, workers=1) as made:
        yield made


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", ["attention_varlen_fwd", "attention_varlen_bwd"])
@pytest.mark.parametrize(("text", "dtype"), FORMS, ids=lambda value: value)
def test_default_config_compiles(pool, text, dtype, name):
    op = ops.get(name)
    problem = op.problem.parse(text, dtype)
    config = op.tunable.space.default(problem, GPU)
    compiled = pool.submit(name, "triton", problem.key, config).result()
    assert compiled.failure is None, compiled.reason
