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


def watched(monkeypatch, module, name, met=None):
    """Notes by name, in order, when a function of the module is called."""
    function, met = getattr(module, name), [] if met is None else met
    monkeypatch.setattr(module, name, lambda *args, **options: met.append(name) or function(*args, **options))
    return met


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoders_layer_runs_its_attention_its_mlp_and_norms_of_sums_by_our_functions(monkeypatch, norm_first):
    met = watched(monkeypatch, attention, "scaled_dot_product_attention")
    watched(monkeypatch, mlp, "mlp", met)
    watched(monkeypatch, norms, "add_layer_norm", met)
    made = {"activation": "gelu", "norm_first": norm_first, "batch_first": True, "dtype": torch.bfloat16}
    mine, theirs = beside("TransformerEncoderLayer", WIDTH, HEADS, INNER, 0.0, **made)
    assert_no_worse(called(mine), called(theirs), leaves(mine, BATCH, ROWS, WIDTH), blur=4)
    added = ["add_layer_norm"]
    assert met == ["scaled_dot_product_attention", *added, "mlp", *([] if norm_first else added)]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", ["layer", "attention"])
def test_in_evaluation_small_calls_are_pytorchs_one_op_and_large_ones_run_our_functions(monkeypatch, name):
    ops = {"layer": "_transformer_encoder_layer_fwd", "attention": "_native_multi_head_attention"}
    met = watched(monkeypatch, torch, ops[name])
    watched(monkeypatch, attention, "scaled_dot_product_attention", met)
    if name == "layer":
        mine, theirs = beside("TransformerEncoderLayer", WIDTH, HEADS, INNER, batch_first=True)
    else:
        mine, theirs = beside("MultiheadAttention", WIDTH, HEADS, batch_first=True)
    x = torch.randn(BATCH, ROWS, WIDTH)
    given = (x,) if name == "layer" else (x, x, x, None, False)
    with torch.no_grad():
        found = [mine.eval()(*given)]
        monkeypatch.setattr(attention, "BOUNDS", (0.0, 0.0))
        found.append(mine(*given))
        assert met == [ops[name], "scaled_dot_product_attention"]
        for each in found:
            torch.testing.assert_close(each, theirs.eval()(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("device")
def test_a_forward_of_a_norms_own_is_called():
    layer, _ = beside("TransformerEncoderLayer", WIDTH, HEADS, INNER, 0.0, batch_first=True)
    layer.norm2.forward = torch.zeros_like
    assert not layer(torch.randn(BATCH, ROWS, WIDTH)).any()
