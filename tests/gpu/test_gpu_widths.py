"""The defaults of gated and linear attention at many widths: no verdict is on most, and each is another kernel."""

import random

import pytest

from tilebook import device as devices
from tilebook import op as ops
from tilebook.assembler import unverified
from tilebook.tuner.judge.verify import Case, verify

pytestmark = pytest.mark.gpu

FORMS = {
    "linear_attention": ("", ",decay", ",normalized", ",normalized,softmax", ",decay,initial"),
    "channel_decay": ("", ",initial"),
    "gated_delta_rule": (",decay", ",decay,initial", ",normalized", ",initial,normalized"),
    "mlstm": (",decay,normalized", ",decay,initial,normalized"),
    "bidirectional_linear_attention": ("", ",relu"),
}


def posed():
    """Of each family and direction every width, with one of v, a length, a form and a dtype by chance."""
    chance = random.Random(0)
    for family, forms in FORMS.items():
        for direction in ("fwd", "bwd"):
            for width in (16, 24, 32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256):
                of_v = chance.choice((width, width, 16, 40, 64, 72, 128))
                tokens, dtype, form = chance.choice((70, 200)), chance.choice(("bf16", "fp16")), chance.choice(forms)
                columns = "" if of_v == width else f",V{of_v}"
                yield f"{family}_{direction}", f"B1,H2,S{tokens},D{width}{columns}{form}", dtype
    # What ptxas 12.8 makes wrong code of.
    yield "gated_delta_rule_fwd", "B1,H2,S200,D72,decay", "bf16"
    yield "gated_delta_rule_fwd", "B1,H2,S70,D72,V16,initial,normalized", "fp16"
    yield "gated_delta_rule_bwd", "B1,H2,S70,D40,decay,initial", "bf16"
    yield "gated_delta_rule_bwd", "B1,H2,S70,D40,V72,initial,normalized", "fp16"


@pytest.mark.parametrize(("name", "label", "dtype"), list(dict.fromkeys(posed())))
def test_the_default_is_right(name, label, dtype):
    op = ops.get(name)
    problem = op.problem.parse(label, dtype)
    config = op.tunable.space.default(problem, devices.current())
    with unverified():
        verify(op.tunable, config, [Case.make(op, problem, "cuda", 0)])
