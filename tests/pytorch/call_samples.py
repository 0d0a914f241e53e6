"""Calls of every public function, each with the shapes of its tensors."""

import pytest
import torch
from op_samples import angles, ends, normal

import tilebook
from tilebook import dispatch

MASK = torch.tensor([[True, False, True, True, True, False], *[[True] * 6] * 5])


def packed(q, k, v):
    o = tilebook.attention_varlen(
        *(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), ends(6, 12), ends(6, 12),
        max_seqlen_q=6, max_seqlen_k=6, causal=True,
    )  # fmt: skip
    return o


def layers(x, w1, w2):
    return tilebook.mlp(x, w1, w1[:, 0], w2, w2[:, 0])


def gated(x, gate, up, down):
    return tilebook.swiglu(x, gate, up, down, gate[:, 0], None, down[:, 0])


ANGLES = angles(1, 6, 8, dtype=torch.float32)


def rotated(q, k):
    return torch.cat(tilebook.apply_rope(q, k, *ANGLES), 1)


LABELS = torch.tensor([[1, 7, -100], [0, 3, 2]])


def losses(x):
    return tilebook.cross_entropy(x.movedim(-1, 1), LABELS, label_smoothing=0.1, reduction="none")


def heads(x, w, b):
    return tilebook.linear_cross_entropy(x, w, LABELS, linear_bias=b, label_smoothing=0.1)


def recurrent(q, k, v, g, h):
    o, state = tilebook.gated_linear_attention(q, k, v, -(g * g), initial_state=h, return_state=True)
    return torch.cat((o, state), 2)


def delta(q, k, v, g, beta, h):
    rates = {"beta": beta.sigmoid(), "initial_state": h, "return_state": True, "normalize_qk": True}
    return torch.cat(tilebook.gated_delta_rule(q, k, v, -(g * g), **rates), 2)


def by_channel(q, k, v, g, h):
    return torch.cat(tilebook.gated_linear_attention(q, k, v, -(g * g), initial_state=h, return_state=True), 2)


def memorized(q, k, v, i, f, h, n):
    o, (h, n, _) = tilebook.mlstm(q, k, v, i, f, initial_state=(h, n, n[..., 0].detach()), return_state=True)
    return torch.cat((o, h, n[..., None, :]), 2)


QKV = [(2, 4, 6, 16)] * 3
CALLS = {
    "attention": (tilebook.attention, QKV),
    "attention, grouped": (lambda q, k, v: tilebook.attention(q, k, v, causal=True), [QKV[0], *[(2, 2, 6, 16)] * 2]),
    "attention, window": (lambda q, k, v: tilebook.attention(q, k, v, causal=True, window=(2, 0)), QKV),
    "attention, soft-cap": (lambda q, k, v: tilebook.attention(q, k, v, softcap=3.0), QKV),
    "attention, bias": (lambda q, k, v, b: tilebook.attention(q, k, v, bias=b), [*QKV, (4, 6, 6)]),
    "attention, mask": (lambda q, k, v: tilebook.attention(q, k, v, attn_mask=MASK), QKV),
    "drop-in": (tilebook.scaled_dot_product_attention, QKV),
    "packed": (packed, QKV),
    "linear attention": (lambda q, k, v: tilebook.linear_attention(q, k, v, causal=True), QKV),
    "linear attention, causal features": (
        lambda q, k, v: tilebook.linear_attention(q, k, v, feature_map="performer", causal=True),
        QKV,
    ),
    "linear attention, all tokens": (lambda q, k, v: tilebook.linear_attention(q, k, v, feature_map="performer"), QKV),
    "linear attention, gated": (recurrent, [*QKV, (2, 4, 6), (2, 4, 16, 16)]),
    "linear attention, gated by channel": (by_channel, [*[(2, 2, 6, 8)] * 4, (2, 2, 8, 8)]),
    "mlstm": (memorized, [*[(2, 2, 6, 8)] * 3, *[(2, 2, 6)] * 2, (2, 2, 8, 8), (2, 2, 8)]),
    "delta rule": (delta, [*[(2, 2, 6, 8)] * 3, (2, 2, 6), (2, 2, 6), (2, 2, 8, 8)]),
    "layers": (layers, [(2, 3, 8), (12, 8), (8, 12)]),
    "gated layers": (gated, [(2, 3, 8), (12, 8), (12, 8), (8, 12)]),
    "gated layers, one weight": (
        lambda x, both, down: tilebook.geglu(x, both, None, down, recompute=True),
        [(2, 3, 8), (24, 8), (6, 12)],
    ),
    "gate": (tilebook.glu, [(2, 3, 8), (2, 3, 8)]),
    "gate, packed": (lambda x: tilebook.glu(x, activation="gelu"), [(2, 3, 8)]),
    "rotation": (rotated, [(2, 4, 6, 16), (2, 2, 6, 16)]),
    "norm": (tilebook.rms_norm, [(2, 3, 8), (8,)]),
    "norm without a weight": (tilebook.rms_norm, [(2, 3, 8)]),
    "layer norm": (tilebook.layer_norm, [(2, 3, 8), (8,), (8,)]),
    "norm of a sum": (lambda *given: torch.cat(tilebook.add_rms_norm(*given)), [(2, 3, 8), (2, 3, 8), (8,)]),
    "layer norm of a sum": (lambda *given: torch.cat(tilebook.add_layer_norm(*given)), [(2, 3, 8)] * 2 + [(8,)] * 2),
    "loss": (lambda x: tilebook.cross_entropy(x, LABELS[0]), [(3, 8)]),
    "loss of each": (losses, [(2, 3, 8)]),
    "loss of a head": (heads, [(2, 3, 8), (12, 8), (12,)]),
}
every_call = pytest.mark.parametrize("name", CALLS)


def inputs(name, make=normal, **how):
    torch.manual_seed(0)
    return tuple(make(*shape, **how) for shape in CALLS[name][1])


def on_the_cpu(function):
    """What a function gives where nothing is forced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch.here, "forced", None)
        return function()


def same(found, function, atol=2e-5, rtol=2e-5):
    torch.testing.assert_close(found, on_the_cpu(function), atol=atol, rtol=rtol)
