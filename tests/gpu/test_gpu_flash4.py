"""FlashAttention-4 takes the tiles that its space has, and is right with them."""

import random

import pytest

from tilebook import device as devices
from tilebook.kernels.attention.ops import attention_fwd
from tilebook.tuner.judge.verify import Case, verify

pytestmark = pytest.mark.gpu
FLASH = attention_fwd.implementations["flash_attention_4"]


@pytest.mark.parametrize("text", ["B2,H16,S4096,D64", "B2,H16,S4096,D128,causal", "B2,H16,Hkv4,S2048,D256"])
def test_its_own_choice_is_right_and_so_are_most_configs(text):
    problem, gpu = attention_fwd.problem.parse(text, "bf16"), devices.current()
    if not FLASH.can_run(problem, gpu):
        pytest.skip("flash-attn-4 is not installed, or not for this GPU")
    case, default = Case.make(attention_fwd, problem, "cuda", 0), FLASH.space.default(problem, gpu)
    verify(FLASH, default, [case])
    others = [config for config in FLASH.space.feasible(problem, gpu) if config != default]
    refused, chosen = [], random.Random(0).sample(others, min(6, len(others)))
    for config in chosen:
        try:
            verify(FLASH, config, [case])
        except Exception as broken:  # the tuner would drop it
            refused.append(f"{config}: {type(broken).__name__}: {str(broken)[:200]}")
    print(*refused, sep="\n")
    assert len(refused) <= len(chosen) // 3
