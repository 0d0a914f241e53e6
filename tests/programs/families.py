"""What a program may call, each beside what it would have called in PyTorch, with small inputs for both."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tilebook

SDPA = F.scaled_dot_product_attention
"""PyTorch's own, whatever a program puts in its place later."""

CROSS_ENTROPY = F.cross_entropy
"""Likewise."""


def plain_masked(q, k, v, mask, **options):
    """PyTorch's function under a mask; on a GPU its plainest path.

    cuDNN loads whole vectors of a mask's rows without looking, and where they are short the process loses its GPU.
    """
    if not q.is_cuda:
        return SDPA(q, k, v, mask, **options)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return SDPA(q, k, v, mask, **options)


def small(n, device):
    """A size on this device: a quarter on the CPU, where Triton's interpreter may run the kernels."""
    return n if torch.device(device).type == "cuda" else max(1, n // 4)


def lengths(total):
    """Of the sequences of a pack of so many rows."""
    return total // 3, 1, 0, total - total // 3 - 1


@dataclass(frozen=True)
class Family:
    """`ours` and `plain` take the tensors that `inputs(device, dtype)` makes; the first `trained` have gradients."""

    name: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: Callable[..., tuple[torch.Tensor, ...]]
    trained: int
    drop_in: bool = False

    def leaves(self, device, dtype=None, seed=0):
        """Inputs on the device, those with a gradient asking for it."""
        dtype = dtype or usual(device)
        made = self.inputs(device, dtype, torch.Generator().manual_seed(seed))
        return tuple(x.requires_grad_() if i < self.trained else x for i, x in enumerate(made))


def usual(device):
    """The dtype that programs train in, on this device."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def rand(generator, shape, device, dtype):
    """The same numbers on every device: made on the CPU."""
    return torch.randn(shape, generator=generator).to(device, dtype)


def _qkv(heads=4, heads_kv=4, seq_q=96, seq_k=96, width=64):
    def inputs(device, dtype, generator):
        d = small(width, device)
        rows, columns = (small(n, device) for n in (seq_q, seq_k))
        shapes = (2, heads, rows, d), (2, heads_kv, columns, d), (2, heads_kv, columns, d)
        return tuple(rand(generator, shape, device, dtype) for shape in shapes)

    return inputs


def _and(inputs, more):
    return lambda device, dtype, generator: (*inputs(device, dtype, generator), more(device, dtype, generator))


def composed(q, k, v, *, scale=None, causal=False, window=None, softcap=0.0, slopes=None, bias=None):
    """What a program writes where PyTorch's function has no such option; its diagonal is at the bottom right."""
    group = q.shape[-3] // k.shape[-3]
    if group > 1:
        k, v = (x.repeat_interleave(group, -3) for x in (k, v))
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    n_q, n_k = scores.shape[-2:]
    rows = torch.arange(n_k - n_q, n_k, device=q.device)[:, None]
    columns = torch.arange(n_k, device=q.device)
    if slopes is not None:
        scores = scores - slopes[:, None, None] * (rows - columns).abs()
    if bias is not None:
        scores = scores + bias
    left, right = window or (n_k, n_k)
    seen = (columns >= rows - left) & (columns <= rows + (0 if causal else right))
    scores = scores.masked_fill(~seen, -math.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0).to(v.dtype) @ v


def _packed(plain):
    """A function of one sequence (H, S, D), for each of a pack (T, H, D)."""

    def run(q, k, v, cu_q, cu_k):
        parts = zip(*(x.split(lengths(len(q))) for x in (q, k, v)), strict=True)
        return torch.cat([plain(*(x.transpose(0, 1) for x in part)).transpose(0, 1) for part in parts])

    return run


def _pack(device, dtype, generator):
    total = small(96, device)
    ends = torch.tensor([0, *lengths(total)]).cumsum(0).to(device, torch.int32)
    shape = total, 4, small(64, device)
    return *(rand(generator, shape, device, dtype) for _ in range(3)), ends, ends.clone()


def _varlen(q, k, v, cu_q, cu_k):
    most = len(q)
    return tilebook.attention_varlen(q, k, v, cu_q, cu_k, max_seqlen_q=most, max_seqlen_k=most, causal=True)


def _linear_weights(device, dtype, generator):
    h, i = small(64, device), small(256, device)
    shapes = ((2, 40, h), 1.0), ((i, h), h**-0.5), ((i,), 0.1), ((h, i), i**-0.5), ((h,), 0.1)
    return tuple(rand(generator, shape, device, dtype) * size for shape, size in shapes)


def _rows(device, dtype, generator):
    n = small(256, device)
    return rand(generator, (2, 40, n), device, dtype), 1 + 0.1 * rand(generator, (n,), device, dtype)


def _rows_and_bias(device, dtype, generator):
    x, weight = _rows(device, dtype, generator)
    return x, weight, 0.1 * rand(generator, tuple(weight.shape), device, dtype)


def _gated_weights(device, dtype, generator):
    h, i = small(64, device), small(256, device)
    shapes = ((2, 40, h), 1.0), ((i, h), h**-0.5), ((i, h), h**-0.5), ((h, i), i**-0.5)
    return tuple(rand(generator, shape, device, dtype) * size for shape, size in shapes)


def _two(device, dtype, generator):
    return tuple(rand(generator, (2, 40, small(256, device)), device, dtype) for _ in range(2))


def _angles(device, dtype, generator):
    angles = torch.rand(1, small(96, device), small(64, device) // 2, generator=generator).repeat(1, 1, 2) * 6
    return torch.stack((angles.cos(), angles.sin())).to(device, dtype)


def _qk_and_angles(device, dtype, generator):
    return *_qkv()(device, dtype, generator)[:2], _angles(device, dtype, generator)


def _rope(function):
    """Of q and of as many heads of k, side by side."""
    return lambda q, k, angles: torch.cat(function(q, k, angles[0], angles[1]), -1)


def plain_rope(q, k, cos, sin):
    half = q.shape[-1] // 2
    return tuple(x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin for x in (q, k))


def _classified(device, dtype, generator):
    """Logits, and a class for each row but one."""
    classes = small(1000, device)
    logits = rand(generator, (80, classes), device, dtype)
    target = torch.randint(classes, (80,), generator=generator)
    target[3] = -100
    return logits, target.to(device)


def _headed(device, dtype, generator):
    """Hidden states, the weight of a head, and a class for each of them but one."""
    h, classes = small(64, device), small(1000, device)
    target = torch.randint(classes, (2, 40), generator=generator)
    target[0, 3] = -100
    weight = rand(generator, (classes, h), device, dtype) * h**-0.5
    return rand(generator, (2, 40, h), device, dtype), weight, target.to(device)


# Rows of masks and biases are whole vectors here, which any kernel of PyTorch's loads; see `plain_masked`.
def _lower_half(device, dtype, generator):
    return torch.ones(small(96, device), small(96, device), dtype=torch.bool).tril(3).to(device)


def _table(device, dtype, generator):
    return rand(generator, (4, small(96, device), small(96, device)), device, dtype)


def plain_mlp(x, w1, b1, w2, b2):
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def plain_swiglu(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def plain_layer_norm(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias)


def plain_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-6)


FAMILIES = {
    family.name: family
    for family in (
        Family("attention", lambda q, k, v: tilebook.attention(q, k, v), SDPA, _qkv(), 3),
        Family(
            "causal",
            lambda q, k, v: tilebook.attention(q, k, v, causal=True),
            lambda q, k, v: SDPA(q, k, v, is_causal=True),
            _qkv(),
            3,
        ),
        Family(
            "gqa",
            lambda q, k, v: tilebook.attention(q, k, v),
            lambda q, k, v: SDPA(q, k, v, enable_gqa=True),
            _qkv(heads=4, heads_kv=2, seq_q=70),
            3,
        ),
        Family(
            "softcap",
            lambda q, k, v: tilebook.attention(q, k, v, causal=True, softcap=5.0),
            lambda q, k, v: composed(q, k, v, causal=True, softcap=5.0),
            _qkv(),
            3,
        ),
        Family(
            "alibi",
            lambda q, k, v, slopes: tilebook.attention(q, k, v, window=(20, 8), alibi_slopes=slopes),
            lambda q, k, v, slopes: composed(q, k, v, window=(20, 8), slopes=slopes.to(q.dtype)),
            _and(_qkv(), lambda device, dtype, generator: torch.tensor([0.5, 0.25, 0.125, 0.0625]).to(device)),
            3,
        ),
        Family(
            "bias",
            lambda q, k, v, bias: tilebook.attention(q, k, v, bias=bias),
            lambda q, k, v, bias: SDPA(q, k, v, attn_mask=bias),
            _and(_qkv(), _table),
            4,
        ),
        Family(
            "drop_in",
            lambda q, k, v: tilebook.scaled_dot_product_attention(q, k, v, is_causal=True),
            lambda q, k, v: SDPA(q, k, v, is_causal=True),
            _qkv(),
            3,
            drop_in=True,
        ),
        Family(
            "drop_in_mask",
            lambda q, k, v, mask: tilebook.scaled_dot_product_attention(q, k, v, mask),
            lambda q, k, v, mask: SDPA(q, k, v, mask),
            _and(_qkv(), _lower_half),
            3,
            drop_in=True,
        ),
        Family("varlen", _varlen, _packed(lambda q, k, v: SDPA(q, k, v, is_causal=True)), _pack, 3),
        Family(
            "decode",
            lambda q, k, v: tilebook.attention_decode(q, k, v),
            lambda q, k, v: SDPA(q, k, v, enable_gqa=True),
            _qkv(heads=4, heads_kv=2, seq_q=1, seq_k=200),
            0,
        ),
        Family("mlp", lambda *args: tilebook.mlp(*args), plain_mlp, _linear_weights, 5),
        Family("swiglu", lambda *args: tilebook.swiglu(*args), plain_swiglu, _gated_weights, 4),
        Family("glu", lambda gate, up: tilebook.glu(gate, up), lambda gate, up: F.silu(gate) * up, _two, 2),
        Family("rope", _rope(lambda *args: tilebook.apply_rope(*args)), _rope(plain_rope), _qk_and_angles, 2),
        Family("layer_norm", lambda *args: tilebook.layer_norm(*args), plain_layer_norm, _rows_and_bias, 3),
        Family(
            "cross_entropy",
            lambda x, target: tilebook.cross_entropy(x, target, label_smoothing=0.1, reduction="none"),
            lambda x, target: CROSS_ENTROPY(x, target, label_smoothing=0.1, reduction="none"),
            _classified,
            1,
        ),
        Family(
            "linear_cross_entropy",
            lambda x, w, target: tilebook.linear_cross_entropy(x, w, target, label_smoothing=0.1),
            lambda x, w, target: CROSS_ENTROPY(F.linear(x, w).flatten(0, -2), target.flatten(), label_smoothing=0.1),
            _headed,
            2,
        ),
        Family("rms_norm", lambda x, weight: tilebook.rms_norm(x, weight), plain_norm, _rows, 2),
    )
}

if hasattr(tilebook, "layer_norm"):
    FAMILIES["layer_norm"] = Family(
        "layer_norm",
        lambda x, weight, bias: tilebook.layer_norm(x, weight, bias),
        lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
        _and(_rows, lambda device, dtype, generator: 0.1 * rand(generator, (small(256, device),), device, dtype)),
        3,
    )

WHOLE = ["attention", "causal", "gqa", "drop_in"]
"""Families whose calls may be left whole, with their gradients, to PyTorch's own function on a GPU."""

BLOCKS = [name for name in ("mlp", "rms_norm", "layer_norm") if name in FAMILIES]
"""Families of rows (…, N) with weights."""

TRAINED = [name for name, family in FAMILIES.items() if family.trained]
FEW_NODES = [name for name in TRAINED if torch.cuda.is_available() or name not in ("softcap", "alibi", "varlen")]
"""On the CPU without three that are hundreds of PyTorch's operations there; `bias` is of their kind."""

FEW = ["drop_in", "softcap", "varlen", "mlp", "rms_norm"]
"""One of each kind that is trained, where a program costs seconds."""


def families(*names):
    """A test once for each of these families, all if none is named."""
    return pytest.mark.parametrize("family", names or list(FAMILIES))
