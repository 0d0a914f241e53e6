"""Direct calls of our ops with what does not go together: kernels believe the sizes that they are told."""

import pytest
import torch
from op_samples import OPS, attention, data, decode, ends, layers, mlp, qkv, varlen

Q, K, V = qkv(data)
PACKED = data(9, 4, 16), data(11, 4, 16), data(11, 4, 16)
ENDS = ends(4, 9), ends(5, 11)
X, W1, B1, W2, B2 = layers(data)
LSE = PACKED[0][..., 0].t()
SEED = torch.tensor([7])

LABELS, LOSS = torch.tensor([1, 7, -100, 0, 3]), (0.0, -100, 0.0, 0.0)
HEAD = None, *LOSS, True, torch.float32, True, True, False

WRONG = {
    "fewer values than keys": lambda: OPS.attention_fwd(*attention(Q, K, V[:, :, :3])),
    "fewer keys than values": lambda: OPS.attention_fwd(*attention(Q, K[:, :, :3], V)),
    "another batch size": lambda: OPS.attention_fwd(*attention(Q, K[:1], V[:1])),
    "another head dimension": lambda: OPS.attention_fwd(*attention(Q, K[..., :8], V[..., :8])),
    "three key heads for four": lambda: OPS.attention_fwd(*attention(Q, K[:, :3], V[:, :3])),
    "three axes": lambda: OPS.attention_fwd(*attention(Q[0], K[0], V[0])),
    "another dtype": lambda: OPS.attention_fwd(*attention(Q, K, V.half())),
    "a bias of too few rows": lambda: OPS.attention_fwd(*attention(Q, K, V, data(1, 1, 4, 7))),
    "a bias of two axes": lambda: OPS.attention_fwd(*attention(Q, K, V, data(5, 7))),
    "too few slopes": lambda: OPS.attention_fwd(*attention(Q, K, V, None, data(2))),
    "dropout without a seed": lambda: OPS.attention_fwd(*attention(Q, K, V, dropout=0.5)),
    "a seed without dropout": lambda: OPS.attention_fwd(*attention(Q, K, V, None, None, SEED)),
    "a seed of numbers": lambda: OPS.attention_fwd(*attention(Q, K, V, None, None, data(1), dropout=0.5)),
    "dropout of all": lambda: OPS.attention_fwd(*attention(Q, K, V, None, None, SEED, dropout=1.0)),
    "a negative soft-cap": lambda: OPS.attention_fwd(*attention(Q, K, V, softcap=-1.0)),
    "packed: fewer values": lambda: OPS.attention_varlen_fwd(*varlen(*PACKED[:2], PACKED[2][:3], *ENDS, 5, 6)),
    "packed: three key heads": lambda: OPS.attention_varlen_fwd(
        *varlen(PACKED[0], PACKED[1][:, :3], PACKED[2][:, :3], *ENDS, 5, 6)
    ),
    "packed: fewer ends": lambda: OPS.attention_varlen_fwd(*varlen(*PACKED, ENDS[0][:2], ENDS[1], 5, 6)),
    "packed: long ends": lambda: OPS.attention_varlen_fwd(*varlen(*PACKED, ENDS[0].long(), ENDS[1].long(), 5, 6)),
    "packed: no length": lambda: OPS.attention_varlen_fwd(*varlen(*PACKED, *ENDS, -1, 6)),
    "decoding: fewer values": lambda: OPS.attention_decode(*decode(Q, K, V[:, :, :3])),
    "linear: fewer keys": lambda: OPS.gated_linear_attention_fwd(Q, K, Q, None, None, "none", 0.3),
    "linear: decays in bf16": lambda: OPS.gated_linear_attention_fwd(Q, Q, Q, Q[..., 0].bfloat16(), None, "none", 0.3),
    "linear: features that no kernel makes": lambda: OPS.gated_linear_attention_fwd(
        Q, Q, Q, None, None, "performer", 0.3
    ),
    "linear: a state without its last column": lambda: OPS.linear_attention_fwd(
        Q, Q, Q, None, data(2, 4, 16, 16), "none", 1.0, 1e-6
    ),
    "delta rule: fewer keys": lambda: OPS.gated_delta_rule_fwd(Q, K, Q, None, Q[..., 0], None, 0.3, False),
    "delta rule: rates of fewer tokens": lambda: OPS.gated_delta_rule_fwd(
        Q, Q, Q, None, Q[:, :, :3, 0], None, 0.3, False
    ),
    "decays by channel: of fewer channels": lambda: OPS.channel_decay_fwd(Q, Q, Q, Q[..., :8].float(), None, 0.3),
    "mlstm: fewer inputs": lambda: OPS.mlstm_fwd(Q, Q, Q, Q[..., 0], Q[:, :, :3, 0], Q[..., 0], None, 0.3, 0.0),
    "mlp: a narrow layer": lambda: OPS.mlp_fwd(*mlp(X, W1, B1, W2[:, :4], B2)),
    "mlp: an activation that is none": lambda: OPS.mlp_fwd(*mlp(X, W1, B1, W2, B2, "silu")),
    "gate: a narrow up": lambda: OPS.glu_fwd(X, X[:, :4], "silu"),
    "gate: up of another dtype": lambda: OPS.glu_fwd(X, X.half(), "silu"),
    "gate: an odd one for both": lambda: OPS.glu_fwd(X[:, :5], None, "silu"),
    "gate: an activation that is none": lambda: OPS.glu_fwd(X, X, "relu"),
    "gated layers: a narrow one": lambda: OPS.gated_mlp_fwd(X, W1, W1[:8], W2, *[None] * 3, "silu", False),
    "gated layers: one for both, too narrow": lambda: OPS.gated_mlp_fwd(X, W1, None, W2, *[None] * 3, "silu", False),
    "gated layers: a long bias": lambda: OPS.gated_mlp_fwd(X, W1, W1, W2, B1, None, B1, "silu", False),
    "gated layers: three axes": lambda: OPS.gated_mlp_fwd(X[None], W1, W1, W2, *[None] * 3, "silu", False),
    "rotation: fewer angles": lambda: OPS.rope_fwd(Q, Q, *[Q[:1, 0, :3]] * 2, False),
    "rotation: wide angles": lambda: OPS.rope_fwd(Q[..., :8], Q[..., :8], Q[:1, 0], Q[:1, 0], False),
    "rotation: odd angles": lambda: OPS.rope_fwd(Q, Q, *[Q[:1, 0, :, :5]] * 2, False),
    "rotation: angles of two axes": lambda: OPS.rope_fwd(Q, Q, Q[0, 0], Q[0, 0], False),
    "rotation: keys of another length": lambda: OPS.rope_fwd(Q, K, Q[:1, 0], Q[:1, 0], False),
    "rotation: keys of another dtype": lambda: OPS.rope_fwd(Q, Q.half(), Q[:1, 0], Q[:1, 0], False),
    "norm: a narrow weight": lambda: OPS.rms_norm_fwd(X, data(4), 1e-6),
    "norm: a narrow bias": lambda: OPS.layer_norm_fwd(X, data(8), data(4), 1e-6),
    "loss: fewer targets": lambda: OPS.cross_entropy_fwd(X, LABELS[:3], *LOSS),
    "loss: targets of another dtype": lambda: OPS.cross_entropy_fwd(X, LABELS.int(), *LOSS),
    "loss: no rows": lambda: OPS.cross_entropy_fwd(X[0], LABELS, *LOSS),
    "head: fewer targets": lambda: OPS.linear_cross_entropy_fwd(X, W1, LABELS[:3], *HEAD),
    "head: fewer features": lambda: OPS.linear_cross_entropy_fwd(X[:, :4], W1, LABELS, *HEAD),
    "head: a short bias": lambda: OPS.linear_cross_entropy_fwd(X, W1, LABELS, B2, *HEAD[1:]),
    "head: more axes": lambda: OPS.linear_cross_entropy_fwd(X[None], W1, LABELS[None], *HEAD),
    "loss: no classes": lambda: OPS.cross_entropy_fwd(X[:, :0], LABELS, *LOSS),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_call_of_an_op_raises_before_anything_runs(wrong, forced):
    with pytest.raises(ValueError, match=r"must|expected|asks for|takes|are not of"):
        wrong()


def _attention_bwd(dy=Q, q=Q, k=K, v=V, o=Q, lse=Q[..., 0], bias=None):
    return OPS.attention_bwd(dy, q, k, v, bias, *attention(q, k, v)[4:6], o, lse, *attention(q, k, v)[6:], [True] * 6)


def _varlen_bwd(dy=PACKED[0], o=PACKED[0], lse=LSE):
    call = varlen(*PACKED, *ENDS, 5, 6)
    return OPS.attention_varlen_bwd(dy, *call[:5], o, lse, *call[5:], [True] * 5)


def _loss_bwd(dloss, lse, labels=LABELS):
    return OPS.cross_entropy_bwd(dloss, X, labels, lse, *LOSS, [True, False])


WRONG_BACKWARD = {
    "a short gradient": lambda: _attention_bwd(dy=Q[:, :, :3]),
    "a short output": lambda: _attention_bwd(o=Q[:, :, :3]),
    "a short log-sum-exp": lambda: _attention_bwd(lse=Q[:, :, :3, 0]),
    "fewer queries": lambda: _attention_bwd(q=Q[:, :, :3]),
    "fewer keys": lambda: _attention_bwd(k=K[:, :, :3]),
    "a bias of too few rows": lambda: _attention_bwd(bias=data(1, 1, 4, 7)),
    "packed: a short gradient": lambda: _varlen_bwd(dy=PACKED[0][:3]),
    "packed: a short output": lambda: _varlen_bwd(o=PACKED[0][:3]),
    "packed: a short log-sum-exp": lambda: _varlen_bwd(lse=PACKED[0][:3, :, 0].t()),
    "linear: a short gradient": lambda: OPS.gated_linear_attention_bwd(
        Q[:, :, :3], None, Q, Q, Q, None, None, "none", 0.3, [True] * 5
    ),
    "linear: short divisors": lambda: OPS.linear_attention_bwd(
        Q, None, Q, Q, Q, None, None, Q, Q[:, :, :3, 0], "none", 1.0, 1e-6, [True] * 5
    ),
    "delta rule: a short gradient": lambda: OPS.gated_delta_rule_bwd(
        Q[:, :, :3], None, Q, Q, Q, None, Q[..., 0], None, 0.3, False, [True] * 6
    ),
    "mlp: z of a narrower layer": lambda: OPS.mlp_bwd(X, X, W1, B1, W2, B2, data(5, 4), "gelu", True, [True] * 5),
    "gate: a short gradient": lambda: OPS.glu_bwd(X[:3], X, X, "silu", [True] * 2),
    "gated layers: a narrow gate": lambda: OPS.gated_mlp_bwd(
        X, X, W1, W1, W2, None, None, None, data(5, 4), data(5, 4), "silu", False, [True] * 7
    ),
    "rotation: gradients of angles": lambda: OPS.rope_bwd(Q, Q, Q, Q, Q[:1, 0], Q[:1, 0], False, [True] * 4),
    "rotation: a short gradient": lambda: OPS.rope_bwd(Q[:, :3], Q, Q, Q, Q[:1, 0], Q[:1, 0], False, [True] * 2),
    "norm: a narrow weight": lambda: OPS.rms_norm_bwd(X, X, data(4), data(5), 1e-6, [True, True]),
    "loss: a short gradient": lambda: _loss_bwd(data(3), data(5)),
    "loss: a short log-sum-exp": lambda: _loss_bwd(data(5), data(3)),
    "loss: fewer targets": lambda: _loss_bwd(data(5), data(5), LABELS[:3]),
    "norm: a short statistic": lambda: OPS.rms_norm_bwd(X, X, data(8), data(3), 1e-6, [True, True]),
}


@pytest.mark.parametrize("wrong", WRONG_BACKWARD.values(), ids=WRONG_BACKWARD.keys())
def test_a_wrong_call_of_an_op_of_gradients_raises_before_anything_runs(wrong, forced):
    with pytest.raises(ValueError, match=r"must|expected|asks for|takes|are not of"):
        wrong()
