"""Forms of attention compile with their default config, all of them for Hopper and some for others, really."""

import pytest
from programs.processes import python

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


SCALARS = """
import re, sys
import torch
from tilebook import device as devices
from tilebook import op as ops
from tilebook.launch import intercepted
from tilebook.tuner.process import compiler

gpu = devices.find("H200")
compiler._pose_as(gpu)
for name in ("attention_fwd", "attention_bwd"):
    for label in ("B2,H4,S128,D64,biashqk", "B2,H4,S128,D64,maskhqk", "B2,H4,S129,D64,biashqk"):
        op = ops.get(name)
        problem = op.problem.parse(label, "bf16")
        texts = []
        with devices.posing_as(gpu), torch.no_grad(), intercepted(
            lambda kernel, grid, args, meta: texts.append(kernel.warmup(*args, grid=grid, **meta).asm["ptx"])
        ):
            op.tunable(*problem.inputs("meta", 0), config=op.tunable.space.default(problem, gpu))
        print(sum(len(re.findall(r"ld\\.global\\.(?:b16|b8|u8)\\b", each)) for each in texts))
"""


def test_rows_of_whole_vectors_are_not_loaded_number_by_number(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = [int(line) for line in python(SCALARS).split()]
    assert found[:2] == found[3:5] == [0, 0]
    assert min(found[2], found[5]) > 0
