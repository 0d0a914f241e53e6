"""`tilebook.nn` with our kernels in Triton's interpreter."""

import pytest
import torch
from programs.compare import assert_no_worse
from programs.on_cpu import interpreted as device  # noqa: F401
from programs.own_modules import (  # noqa: F401
    BATCH,
    HEADS,
    INNER,
    ROWS,
    WIDTH,
    beside,
    called,
    leaves,
    test_a_gated_mlp_is_what_its_formula_says,
    test_attention_to_any_keys_is_pytorchs,
    test_hooks_on_inner_modules_are_called,
    test_norms_and_linear_layers_are_pytorchs,
)

from tilebook.nn import attention, mlp, norms

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoders_layer_runs_its_attention_its_mlp_and_norms_of_sums_by_our_functions(monkeypatch, norm_first):
    met = []

    def watched(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **options: met.append(name) or function(*args, **options))

    watched(attention, "scaled_dot_product_attention")
    watched(mlp, "mlp")
    watched(norms, "add_layer_norm")
    made = {"activation": "gelu", "norm_first": norm_first, "batch_first": True, "dtype": torch.bfloat16}
    mine, theirs = beside("TransformerEncoderLayer", WIDTH, HEADS, INNER, 0.0, **made)
    assert_no_worse(called(mine), called(theirs), leaves(mine, BATCH, ROWS, WIDTH), blur=4)
    added = ["add_layer_norm"]
    assert met == ["scaled_dot_product_attention", *added, "mlp", *([] if norm_first else added)]
