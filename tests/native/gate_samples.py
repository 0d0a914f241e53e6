"""Calls of the public functions that have gates, and what PyTorch calls them."""

import operator

import torch
import torch.nn.functional as F

import tilebook


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads(heads_kv=2, rows=4, keys=4, **how):
    return [numbers(2, 2, rows, 8, **how), *(numbers(2, heads_kv, keys, 8, seed=seed, **how) for seed in (1, 2))]


def layers(*shape, **how):
    shapes = (shape or (3, 8)), (12, 8), (12,), (8, 12), (8,)
    return [numbers(*each, seed=seed, **how) for seed, each in enumerate(shapes)]


def rows(vectors, addends=1, **how):
    shapes = [(3, 8)] * addends + [(8,)] * vectors
    return [numbers(*each, seed=seed, **how) for seed, each in enumerate(shapes)]


def gates(**how):
    return [numbers(3, 8, seed=seed, **how) for seed in (0, 1)]


def gated_layers(*shape, packed=False, biases=True, **how):
    """x, the weights of gate, up and down, and their biases or not; gate and up in one tensor if packed."""
    inner = (24,) if packed else (12, 12)
    shapes = [shape or (3, 8), *((n, 8) for n in inner), (8, 12), *([(n,) for n in (*inner, 8)] if biases else [])]
    return [numbers(*each, seed=seed, **how) for seed, each in enumerate(shapes)]


def turning(angles=8, **how):
    """q, k, cos and sin."""
    return [*heads(1, **how)[:2], *(numbers(4, angles, seed=seed, **how) for seed in (5, 6))]


def packed_swiglu(x, gate_and_up, down, *biases):
    first, last = biases or (None, None)
    return operator.call(tilebook.swiglu, x, gate_and_up, None, down, first, None, last)


def head(x, weight, labels, bias=None, **options):
    return operator.call(tilebook.linear_cross_entropy, x, weight, labels, linear_bias=bias, **options)


def turned(x, cos, sin):
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = part.chunk(2, -1)
    made = part * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((made.to(x.dtype), rest), -1) if rest.shape[-1] else made.to(x.dtype)


def turned_in_pairs(x, cos, sin):
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


LABELS = torch.tensor([1, 7, -100])
SEEN = torch.arange(8) < torch.tensor([3, 0])[:, None, None, None]
MASK = torch.zeros(4, 8).masked_fill(torch.ones(4, 8).triu(1).bool(), -torch.inf)


def biased(q, k, v, bias, **options):
    return operator.call(tilebook.attention, q, k, v, bias=bias, **options)  # as Python calls it from 3.12 on


def masked(q, k, v, mask):
    return operator.call(tilebook.attention, q, k, v, attn_mask=mask)


CALLS = {
    "attention": (tilebook.attention, heads, {}),
    "attention, causal, grouped": (tilebook.attention, lambda **how: heads(1, **how), {"causal": True, "scale": 0.3}),
    "attention, bias": (biased, lambda **how: [*heads(keys=8, **how), numbers(1, 2, 4, 8, seed=3, **how)], {}),
    "attention, one bias for all": (
        biased,
        lambda **how: [*heads(keys=8, **how), numbers(1, 1, 1, 8, seed=3, **how).expand(2, 2, 4, 8)],
        {},
    ),
    "attention, mask": (masked, lambda **how: [*heads(1, keys=8, **how), SEEN], {}),
    "attention, one mask for all": (masked, lambda **how: [*heads(keys=8, **how), SEEN.expand(2, 2, 4, 8)], {}),
    "drop-in": (tilebook.scaled_dot_product_attention, heads, {"is_causal": True}),
    "drop-in, mask": (tilebook.scaled_dot_product_attention, lambda **how: [*heads(keys=8, **how), MASK.to(**how)], {}),
    "decode": (tilebook.attention_decode, lambda **how: heads(1, 1, 6, **how), {}),
    "rms norm": (tilebook.rms_norm, lambda **how: rows(1, **how), {}),
    "rms norm, no weight": (tilebook.rms_norm, lambda **how: rows(0, **how), {"eps": 1e-3}),
    "layer norm": (tilebook.layer_norm, lambda **how: rows(2, **how), {}),
    "layer norm, no bias": (tilebook.layer_norm, lambda **how: rows(1, **how), {"eps": 1e-3}),
    "added rms norm": (tilebook.add_rms_norm, lambda **how: rows(1, 2, **how), {}),
    "added layer norm": (tilebook.add_layer_norm, lambda **how: rows(2, 2, **how), {}),
    "mlp": (tilebook.mlp, layers, {}),
    "mlp, relu": (tilebook.mlp, lambda **how: layers(2, 3, 8, **how), {"activation": "relu"}),
    "mlp, tanh": (tilebook.mlp, layers, {"activation": "gelu_tanh"}),
    "glu": (tilebook.glu, gates, {}),
    "glu, packed": (tilebook.glu, lambda **how: gates(**how)[:1], {"activation": "gelu"}),
    "swiglu": (tilebook.swiglu, lambda **how: gated_layers(biases=False, **how), {}),
    "swiglu, packed": (packed_swiglu, lambda **how: gated_layers(2, 3, 8, packed=True, **how), {}),
    "geglu": (tilebook.geglu, gated_layers, {}),
    "geglu, exact": (tilebook.geglu, lambda **how: gated_layers(2, 3, 8, **how), {"approximate": "none"}),
    "rotation": (tilebook.apply_rope, turning, {}),
    "rotation, half": (tilebook.apply_rope, lambda **how: turning(4, **how), {}),
    "rotation, pairs": (tilebook.apply_rope, turning, {"interleaved": True}),
    "head": (head, lambda **how: [numbers(3, 8, **how), numbers(9, 8, seed=1, **how), LABELS], {}),
    "head, bias": (
        head,
        lambda **how: [
            *(numbers(*shape, seed=seed, **how) for seed, shape in enumerate(((1, 3, 8), (9, 8)))),
            LABELS[None].abs() % 8,
            numbers(9, seed=2, **how),
        ],
        {"label_smoothing": 0.1, "reduction": "sum", "ignore_index": 1},
    ),
    "loss": (tilebook.cross_entropy, lambda **how: [numbers(3, 8, **how), LABELS], {}),
    "loss, smooth": (
        tilebook.cross_entropy,
        lambda **how: [numbers(3, 8, **how), LABELS.abs() % 8],
        {"label_smoothing": 0.1, "reduction": "sum", "ignore_index": 1},
    ),
}
"""Name → function, its tensors, its options."""

FUNCTIONS = [
    each for each in dict.fromkeys(call[0] for call in CALLS.values()) if each.__module__.startswith("tilebook")
]

PLAIN = {
    "attention": F.scaled_dot_product_attention,
    "attention, causal, grouped": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.3, enable_gqa=True
    ),
    "attention, bias": F.scaled_dot_product_attention,
    "attention, one bias for all": F.scaled_dot_product_attention,
    "attention, mask": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
    "attention, one mask for all": F.scaled_dot_product_attention,
    "drop-in": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "drop-in, mask": F.scaled_dot_product_attention,
    "decode": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=8**-0.5, enable_gqa=True),
    "rms norm": lambda x, w: F.rms_norm(x, (8,), w, 1e-6),
    "rms norm, no weight": lambda x: F.rms_norm(x, (8,), None, 1e-3),
    "layer norm": lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-5),
    "layer norm, no bias": lambda x, w: F.layer_norm(x, (8,), w, None, 1e-3),
    "added rms norm": lambda x, r, w: (F.rms_norm(h := x + r, (8,), w, 1e-6), h),
    "added layer norm": lambda x, r, w, b: (F.layer_norm(h := x + r, (8,), w, b, 1e-5), h),
    "mlp": lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
    "mlp, relu": lambda x, w1, b1, w2, b2: F.linear(F.relu(F.linear(x, w1, b1)), w2, b2),
    "mlp, tanh": lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2),
    "glu": lambda gate, up: F.silu(gate) * up,
    "glu, packed": lambda both: F.gelu(both[:, :4]) * both[:, 4:],
    "swiglu": lambda x, g, u, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d),
    "swiglu, packed": lambda x, gu, d, b, bd: F.linear(
        operator.call(lambda g, u: F.silu(g) * u, *F.linear(x, gu, b).chunk(2, -1)), d, bd
    ),
    "geglu": lambda x, g, u, d, bg, bu, bd: F.linear(
        F.gelu(F.linear(x, g, bg), approximate="tanh") * F.linear(x, u, bu), d, bd
    ),
    "geglu, exact": lambda x, g, u, d, bg, bu, bd: F.linear(F.gelu(F.linear(x, g, bg)) * F.linear(x, u, bu), d, bd),
    "rotation": lambda q, k, cos, sin: (turned(q, cos, sin), turned(k, cos, sin)),
    "rotation, half": lambda q, k, cos, sin: (turned(q, cos, sin), turned(k, cos, sin)),
    "rotation, pairs": lambda q, k, cos, sin: (turned_in_pairs(q, cos, sin), turned_in_pairs(k, cos, sin)),
    "head": lambda x, w, labels: F.cross_entropy(F.linear(x, w), labels),
    "head, bias": lambda x, w, labels, bias: F.cross_entropy(
        F.linear(x, w, bias).flatten(0, -2), labels.flatten(), label_smoothing=0.1, reduction="sum", ignore_index=1
    ),
    "loss": F.cross_entropy,
    "loss, smooth": lambda x, labels: F.cross_entropy(x, labels, label_smoothing=0.1, reduction="sum", ignore_index=1),
}
"""The same in PyTorch's functions."""
