"""Forms of attention compile with their default config, all of them for Hopper and some for others, really."""

import pytest

from tilebook import device as devices
from tilebook import op as ops
from tilebook.tuner.process.compile import CompilePool

pytestmark = pytest.mark.usefixtures("forked")

TARGETS = {"NVIDIA A100": 4, "NVIDIA H200": 1, "NVIDIA B200": 4, "AMD Instinct MI300X": 8}  # every n-th form
FORMS = [
    ("B4,H16,S4096,D72,causal", "bf16"),
    ("B4,H16,S1024,Sk4096,D128,causal,bottom_right", "bf16"),
    ("B4,H16,S4096,D128,causal,window512x0", "bf16"),
    ("B4,H16,S4096,D64,softcap,alibi", "fp16"),
    ("B4,H16,S4096,D128,dbiashqk", "bf16"),
    ("B4,H16,S4096,D64,maskbk,dropout", "bf16"),
    ("B4,H16,S4096,D128,causal,window512x0,softcap,dbiasbhqk,alibi,dropout", "bf16"),
    ("B4,H16,S1024,D64,causal", "fp32"),
    ("B4,H16,S1024,D128,tf32", "fp32"),
    ("B4,H16,S1024,D256,biasbhqk", "fp16"),
    ("B4,H16,S1024,D160,maskqk", "fp16"),
]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", TARGETS)
def test_default_configs_of_every_form_compile(name):
    gpu = devices.find(name)
    with CompilePool(gpu, workers=1) as pool:
        pending = []
        for op in (ops.get("attention_fwd"), ops.get("attention_bwd")):
            for text, dtype in FORMS[:: TARGETS[name]]:
                problem = op.problem.parse(text, dtype)
                config = op.tunable.space.default(problem, gpu)
                pending.append((problem, pool.submit(op.name, "triton", problem.key, config)))
        failed = [(p.label, c.failure, c.reason) for p, f in pending if (c := f.result()).failure is not None]
    assert not failed
