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
    "loss": (tilebook.cross_entropy, lambda **how: [numbers(3, 8, **how), LABELS], {}),
    "loss, smooth": (
        tilebook.cross_entropy,
        lambda **how: [numbers(3, 8, **how), LABELS.abs() % 8],
        {"label_smoothing": 0.1, "reduction": "sum", "ignore_index": 1},
    ),
}
"""Name → function, its tensors, its options."""

FUNCTIONS = [each for each in dict.fromkeys(call[0] for call in CALLS.values()) if each not in (biased, masked)]

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
    "loss": F.cross_entropy,
    "loss, smooth": lambda x, labels: F.cross_entropy(x, labels, label_smoothing=0.1, reduction="sum", ignore_index=1),
}
"""The same in PyTorch's functions."""
