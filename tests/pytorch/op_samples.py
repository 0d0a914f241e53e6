"""Arguments of every op of `torch.ops.tilebook`, by what is special about them."""

import torch

import tilebook

for name in tilebook.__all__:  # a family's ops are registered when it is imported
    getattr(tilebook, name)

OPS = torch.ops.tilebook


def normal(*shape, dtype=torch.float32, grad=True, order=None):
    """Random numbers whose axes lie in memory in this order."""
    order = order or range(len(shape))
    x = torch.randn([shape[axis] for axis in order]).to(dtype)
    return x.permute([list(order).index(axis) for axis in range(len(shape))]).requires_grad_(grad)


def data(*shape, **how):
    return normal(*shape, grad=False, **how)


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def ends(*numbers):
    return ints(0, *numbers)


def attention(q, k, v, bias=None, slopes=None, seed=None, *, left=-1, right=-1, corner=False, softcap=0.0, dropout=0.0):
    return q, k, v, bias, slopes, seed, 0.3, left, right, corner, softcap, dropout, False, False


def varlen(q, k, v, ends_q, ends_k, most_q, most_k, *, left=-1, right=-1, corner=False, softcap=0.0):
    return q, k, v, ends_q, ends_k, most_q, most_k, 0.3, left, right, corner, softcap, False, False


def decode(q, k, v, lengths=None, table=None, *, causal=True, softcap=0.0, window=None):
    return q, k, v, lengths, table, causal, 0.3, softcap, window


def mlp(x, w1, b1, w2, b2, activation="gelu", save=True):
    return x, w1, b1, w2, b2, activation, save


def losses(make=normal, rows=5, *, smoothing=0.0, softcap=0.0, z_loss=0.0, **how):
    target = torch.randint(8, (rows,))
    target[1:2] = -100
    return make(rows, 8, **how), target, smoothing, -100, softcap, z_loss


def heads(rows=5, *, wants=(True, True, True), smoothing=0.0, softcap=0.0, z_loss=0.0, mean=True, bias=True, **how):
    target = torch.randint(12, (rows,))
    target[1:2] = -100
    x, w, b = (normal(*shape, grad=want, **how) for shape, want in zip(((rows, 8), (12, 8), (12,)), wants, strict=True))
    dtype = how.get("dtype", torch.float32)
    return x, w, target, b if bias else None, smoothing, -100, softcap, z_loss, mean, dtype, *wants


def gated(make=normal, rows=5, activation="silu", recompute=False, packed=False, biased=True, **how):
    weights = [make(24, 8, **how), None] if packed else [make(12, 8, **how), make(12, 8, **how)]
    biases = [None if each is None else make(len(each)) for each in (*weights, None)] if biased else [None] * 3
    return make(rows, 8, **how), *weights, make(6, 12, **how), *biases, activation, recompute


def angles(batch, rows, width, **how):
    """cos and sin of angles that stand twice."""
    drawn = torch.rand(batch, rows, width // 2).repeat(1, 1, 2)
    return drawn.cos().to(**how), drawn.sin().to(**how)


def rope(make=normal, rows=5, width=16, batch=1, interleaved=False, **how):
    q, k = (make(2, heads, rows, 16, **how) for heads in (4, 2))
    return q, k, *angles(batch, rows, width, dtype=q.dtype), interleaved


def qkv(make=normal, rows=5, columns=7, heads_kv=4, **how):
    return make(2, 4, rows, 16, **how), *(make(2, heads_kv, columns, 16, **how) for _ in range(2))


def linear(make=normal, rows=5, columns=6, decay=True, state=True, norm=False, feature_map="none", **how):
    """Keys and queries are positive where outputs are normalized."""
    q, k = (make(2, 3, rows, 8, **how) for _ in range(2))
    if norm:
        q, k = (x.detach().abs().requires_grad_(x.requires_grad) for x in (q, k))
    v, h = make(2, 3, rows, columns, **how), make(2, 3, 8, columns + norm)
    g = (-make(2, 3, rows).detach().abs()).requires_grad_(q.requires_grad)
    h = h.detach().abs().requires_grad_(q.requires_grad) if norm else h
    return q, k, v, g if decay else None, h if state else None, feature_map, 0.3, *((1e-3,) if norm else ())


def delta(make=normal, rows=5, columns=6, decay=True, state=True, normalize=True, **how):
    """Keys that are not divided by their lengths are short."""
    q, k, v = (make(2, 2, rows, width, **how) for width in (8, 8, columns))
    if not normalize:
        k = (0.2 * k.detach()).requires_grad_(k.requires_grad)
    g, beta = (make(2, 2, rows).detach().sigmoid() for _ in range(2))
    g, beta = ((sign * x).requires_grad_(q.requires_grad) for sign, x in ((-1, g), (1, beta)))
    return q, k, v, g if decay else None, beta, make(2, 2, 8, columns) if state else None, 0.3, normalize


def channels(make=normal, rows=5, columns=6, state=True, **how):
    """Gated linear attention with decays by channel."""
    q, k, v = (make(2, 2, rows, width, **how) for width in (8, 8, columns))
    g = (-make(2, 2, rows, 8).detach().sigmoid()).requires_grad_(q.requires_grad)
    return q, k, v, g, make(2, 2, 8, columns) if state else None, 0.3


def memory(make=normal, rows=5, columns=6, state=True, **how):
    """mLSTM: of long keys, so that no sum of weights is nearly the least divisor."""
    q, k, v = (make(2, 2, rows, width, **how) for width in (8, 8, columns))
    g, written = (-make(2, 2, rows).detach().sigmoid() for _ in range(2))
    floor = make(2, 2, rows).detach().sigmoid() + 0.5
    g, written = (x.requires_grad_(q.requires_grad) for x in (g, written))
    return q, k, v, g, written, floor, make(2, 2, 8, columns + 1) if state else None, 0.3, 1e-3


def everything(feature_map="elu+1", mask=None, omega=None, **how):
    """Linear attention of 5 queries and 6 keys."""
    q, k, v = normal(2, 3, 5, 8, **how), normal(2, 3, 6, 8, **how), normal(2, 3, 6, 6, **how)
    return q, k, v, mask, omega, feature_map, 0.3, 1e-3


def layers(make=normal, rows=5, **how):
    return make(rows, 8, **how), make(12, 8, **how), make(12), make(8, 12, **how), make(8)


BSHD, TURNED = (0, 2, 1, 3), (0, 1, 3, 2)
BF16 = torch.bfloat16

SAMPLES = {
    "attention_fwd": {
        "full": lambda: attention(*qkv()),
        "causal, grouped": lambda: attention(*qkv(heads_kv=2), right=0),
        "heads after rows": lambda: attention(*qkv(order=BSHD)),
        "last axis first": lambda: attention(*qkv(order=TURNED)),
        "bias": lambda: attention(*qkv(), normal(1, 4, 5, 7)),
        "bias without gradient": lambda: attention(*qkv(), data(1, 4, 1, 7), right=0),
        "mask": lambda: attention(*qkv(), torch.rand(2, 1, 5, 7) > 0.4),
        "slopes": lambda: attention(*qkv(), None, data(4).abs()),
        "dropout": lambda: attention(*qkv(), None, None, torch.tensor([7]), dropout=0.3),
        "window": lambda: attention(*qkv(), left=2, right=1, corner=True),
        "soft-cap": lambda: attention(*qkv(), softcap=2.0, right=0),
        "no rows": lambda: attention(*qkv(rows=0)),
        "no columns": lambda: attention(*qkv(columns=0)),
        "bf16": lambda: attention(*qkv(dtype=BF16)),
        "expanded": lambda: attention(normal(2, 4, 5, 16), *(normal(1, 1, 7, 16).expand(2, 4, 7, 16),) * 2),
    },
    "attention_varlen_fwd": {
        "full, grouped": lambda: varlen(
            normal(9, 4, 16), normal(11, 2, 16), normal(11, 2, 16), ends(4, 9), ends(5, 11), 5, 6
        ),
        "causal, an empty one": lambda: varlen(
            *(normal(9, 4, 16) for _ in range(3)), *(ends(4, 4, 9),) * 2, 5, 5, right=0, corner=True
        ),
        "heads first": lambda: varlen(
            *(normal(9, 4, 16, order=(1, 0, 2)) for _ in range(3)), *(ends(4, 9),) * 2, 5, 5, left=2
        ),
        "rows behind the last": lambda: varlen(*(normal(12, 4, 16) for _ in range(3)), *(ends(4, 9),) * 2, 5, 5),
        "no rows": lambda: varlen(*(normal(0, 4, 16) for _ in range(3)), *(ends(0),) * 2, 0, 0),
        "no sequences": lambda: varlen(*(normal(3, 4, 16) for _ in range(3)), *(ends(),) * 2, 0, 0),
    },
    "attention_decode": {
        "one row": lambda: decode(*qkv(data, rows=1, heads_kv=2)),
        "rows": lambda: decode(*qkv(data, rows=3)),
        "lengths": lambda: decode(*qkv(data, rows=3), ints(0, 5)),
        "pages": lambda: decode(
            data(2, 4, 1, 16), data(6, 4, 2, 16), data(6, 4, 2, 16), ints(3, 7), torch.stack([ints(1, 2), ints(3, 5)])
        ),
        "window, heads after rows": lambda: decode(*qkv(data, rows=3, order=BSHD), softcap=2.0, window=3),
        "no rows": lambda: decode(*qkv(data, rows=0)),
    },
    "mlp_fwd": {
        "gelu": lambda: mlp(*layers()),
        "relu": lambda: mlp(*layers(), "relu"),
        "turned": lambda: mlp(
            *(normal(*shape, order=(1, 0)) for shape in ((5, 8), (12, 8))), normal(24)[::2],
            normal(8, 12, order=(1, 0)), normal(16)[::2], "gelu_tanh",
        ),
        "no rows": lambda: mlp(*layers(rows=0)),
        "first layer frozen": lambda: mlp(data(5, 8), data(12, 8), data(12), normal(8, 12), normal(8)),
        "second layer frozen": lambda: mlp(normal(5, 8), normal(12, 8), data(12), data(8, 12), data(8)),
        "not kept": lambda: mlp(*layers(data), "gelu", False),
        "not kept, and yet differentiated": lambda: mlp(*layers(), "gelu", False),
        "bf16": lambda: mlp(*(x.detach().to(BF16).requires_grad_() for x in layers())),
    },
    "glu_fwd": {
        "silu": lambda: (normal(5, 8), normal(5, 8), "silu"),
        "gelu, packed": lambda: (normal(5, 8), None, "gelu"),
        "turned": lambda: (normal(5, 8, order=(1, 0)), normal(5, 8, order=(1, 0)), "gelu_tanh"),
        "halves": lambda: (*data(5, 16).requires_grad_().chunk(2, -1), "silu"),
        "no rows": lambda: (normal(0, 8), normal(0, 8), "silu"),
        "frozen": lambda: (normal(5, 8), data(5, 8), "silu"),
        "bf16": lambda: (normal(5, 8, dtype=BF16), normal(5, 8, dtype=BF16), "silu"),
    },
    "gated_mlp_fwd": {
        "silu": lambda: gated(),
        "gelu, no biases": lambda: gated(activation="gelu", biased=False),
        "packed": lambda: gated(packed=True, activation="gelu_tanh"),
        "turned": lambda: gated(order=(1, 0), biased=False),
        "recomputed": lambda: gated(recompute=True),
        "recomputed, packed": lambda: gated(recompute=True, packed=True),
        "no rows": lambda: gated(rows=0),
        "first layer frozen": lambda: (*gated(data)[:3], normal(6, 12), *gated(data)[4:6], normal(6), "silu", False),
        "second layer frozen": lambda: (*gated()[:3], data(6, 12), *gated()[4:6], data(6), "silu", False),
        "only a bias trained": lambda: (*gated(data)[:4], normal(12), data(12), None, "silu", False),
        "bf16": lambda: gated(dtype=BF16, biased=False),
    },
    "rope_fwd": {
        "grouped": lambda: rope(),
        "interleaved": lambda: rope(interleaved=True),
        "a part of each head": lambda: rope(width=8),
        "angles of each sequence": lambda: rope(batch=2),
        "heads after rows": lambda: rope(order=BSHD),
        "last axis first": lambda: rope(order=TURNED),
        "expanded": lambda: (normal(1, 1, 5, 16).expand(2, 4, 5, 16), normal(2, 2, 5, 16), *rope()[2:]),
        "k alone": lambda: (data(2, 4, 5, 16), *rope()[1:]),
        "no rows": lambda: rope(rows=0),
        "bf16": lambda: rope(dtype=BF16),
        "bf16, angles in fp32": lambda: (*rope(dtype=BF16)[:2], *rope()[2:]),
    },
    "rms_norm_fwd": {
        "plain": lambda: (normal(5, 8), normal(8), 1e-6),
        "another weight": lambda: (normal(5, 8, dtype=BF16), normal(8), 1e-6),
        "turned": lambda: (normal(5, 8, order=(1, 0)), normal(16)[::2], 1e-6),
        "batches": lambda: (normal(2, 5, 8), normal(8), 1e-6),
        "batches of columns": lambda: (normal(2, 5, 8, order=(0, 2, 1)), normal(8), 1e-6),
        "no rows": lambda: (normal(0, 8), normal(8), 1e-6),
        "frozen": lambda: (normal(5, 8), data(8), 1e-6),
        "no weight": lambda: (normal(5, 8), None, 1e-6),
    },
    "add_rms_norm_fwd": {
        "plain": lambda: (normal(5, 8), normal(5, 8), normal(8), 1e-6),
        "another weight": lambda: (normal(5, 8, dtype=BF16), normal(5, 8, dtype=BF16), normal(8), 1e-6),
        "turned": lambda: (normal(5, 8, order=(1, 0)), normal(5, 8, order=(1, 0)), normal(16)[::2], 1e-6),
        "no rows": lambda: (normal(0, 8), normal(0, 8), normal(8), 1e-6),
        "one frozen": lambda: (data(5, 8), normal(5, 8), data(8), 1e-6),
        "no weight": lambda: (normal(5, 8), data(5, 8), None, 1e-6),
    },
    "add_layer_norm_fwd": {
        "plain": lambda: (normal(5, 8), normal(5, 8), normal(8), normal(8), 1e-6),
        "no bias": lambda: (normal(5, 8), normal(5, 8), normal(8), None, 1e-6),
        "no rows": lambda: (normal(0, 8), normal(0, 8), normal(8), normal(8), 1e-6),
    },
    "cross_entropy_fwd": {
        "plain": lambda: losses(),
        "smoothed, capped, with a z-loss": lambda: losses(smoothing=0.1, softcap=2.0, z_loss=0.1),
        "turned": lambda: losses(order=(1, 0)),
        "no rows": lambda: losses(rows=0),
        "bf16": lambda: losses(dtype=BF16),
        "expanded": lambda: (normal(1, 8).expand(5, 8), *losses()[1:]),
    },
    "linear_cross_entropy_fwd": {
        "plain": lambda: heads(),
        "sum, no bias": lambda: heads(mean=False, bias=False, wants=(True, True, False)),
        "smoothed, capped, with a z-loss": lambda: heads(smoothing=0.1, softcap=2.0, z_loss=0.1),
        "head frozen": lambda: heads(wants=(True, False, False)),
        "body frozen": lambda: heads(wants=(False, True, True)),
        "no rows": lambda: heads(rows=0, mean=False),
        "bf16": lambda: heads(dtype=BF16),
        "fp16": lambda: heads(dtype=torch.float16),
    },
    "gated_linear_attention_fwd": {
        "plain": lambda: linear(decay=False, state=False),
        "decays and a state": lambda: linear(),
        "decays of heads": lambda: (
            *linear()[:3], data(3).neg().abs().neg()[None, :, None].expand(2, 3, 5).requires_grad_(), None, "none", 0.3,
        ),
        "features": lambda: linear(feature_map="relu"),
        "heads after rows": lambda: linear(order=BSHD, state=False),
        "no rows": lambda: linear(rows=0),
        "decays alone": lambda: (*linear(data)[:3], linear()[3], linear(data)[4], "none", 0.3),
        "bf16": lambda: linear(dtype=BF16),
    },
    "linear_attention_fwd": {
        "plain": lambda: linear(norm=True, decay=False, state=False),
        "a state": lambda: linear(norm=True, decay=False),
        "features": lambda: linear(norm=True, decay=False, feature_map="elu+1"),
        "features of softmax": lambda: linear(norm=True, feature_map="softmax", dtype=BF16),
        "decays and a state": lambda: linear(norm=True),
        "last axis first": lambda: linear(norm=True, order=TURNED),
        "no rows": lambda: linear(norm=True, rows=0),
        "fp16": lambda: linear(norm=True, dtype=torch.float16),
    },
    "gated_delta_rule_fwd": {
        "plain": lambda: delta(decay=False, state=False, normalize=False),
        "decays and a state": lambda: delta(),
        "heads after rows": lambda: delta(order=BSHD, state=False),
        "no rows": lambda: delta(rows=0),
        "rates alone": lambda: (*delta(data)[:4], delta()[4], *delta(data)[5:]),
        "bf16": lambda: delta(dtype=BF16),
    },
    "channel_decay_fwd": {
        "plain": lambda: channels(state=False),
        "a state": lambda: channels(),
        "heads after rows": lambda: channels(order=BSHD, state=False),
        "no rows": lambda: channels(rows=0),
        "decays alone": lambda: (*channels(data)[:3], channels()[3], *channels(data)[4:]),
        "bf16": lambda: channels(dtype=BF16),
    },
    "mlstm_fwd": {
        "plain": lambda: memory(state=False),
        "a state": lambda: memory(),
        "heads after rows": lambda: memory(order=BSHD, state=False),
        "no rows": lambda: memory(rows=0),
        "bf16": lambda: memory(dtype=BF16),
    },
    "bidirectional_linear_attention_fwd": {
        "plain": lambda: everything(),
        "masked": lambda: everything("softmax", mask=data(2, 6).gt(1)),
        "numbers for a mask": lambda: everything("relu", mask=data(2, 6)),
        "performer": lambda: everything("performer", omega=data(1, 4, 8)),
        "heads after rows": lambda: everything(order=BSHD),
        "bf16": lambda: everything(dtype=BF16),
    },
    "layer_norm_fwd": {
        "plain": lambda: (normal(5, 8), normal(8), normal(8), 1e-6),
        "no bias": lambda: (normal(5, 8), normal(8), None, 1e-6),
        "no weight": lambda: (normal(5, 8), None, None, 1e-6),
        "another weight": lambda: (normal(5, 8, dtype=BF16), normal(8), normal(8), 1e-6),
        "turned": lambda: (normal(5, 8, order=(1, 0)), normal(16)[::2], normal(16)[::2], 1e-6),
        "batches of columns": lambda: (normal(2, 5, 8, order=(0, 2, 1)), normal(8), normal(8), 1e-6),
        "no rows": lambda: (normal(0, 8), normal(8), normal(8), 1e-6),
        "frozen": lambda: (normal(5, 8), data(8), normal(8), 1e-6),
    },
}  # fmt: skip

EACH = [(op, name) for op, named in SAMPLES.items() for name in named]
DIFFERENTIABLE = [(op, name) for op, name in EACH if op != "attention_decode"]


def sample(op, name, seed=0):
    torch.manual_seed(seed)
    return SAMPLES[op][name]()


def forward(op):
    return getattr(OPS, op).default


def called(op):
    """The op as a function of several outputs."""

    def call(*args):
        made = forward(op)(*args)
        return (made,) if isinstance(made, torch.Tensor) else made

    return call


def tensors_of(args):
    return [x for x in args if isinstance(x, torch.Tensor)]


def wanted(args):
    return [x for x in tensors_of(args) if x.requires_grad]


def results(op):
    """How many outputs of the op have gradients."""
    two = (
        "rope_fwd",
        "gated_linear_attention_fwd",
        "linear_attention_fwd",
        "gated_delta_rule_fwd",
        "channel_decay_fwd",
        "mlstm_fwd",
    )
    return 2 if op in two or op.startswith("add_") else 1


def gradients(function, args, dy):
    """Of the first outputs, as many as there are gradients."""
    return torch.autograd.grad(function(*args)[: len(dy)], wanted(args), dy)
