"""The models of `train_steps.py`: plain PyTorch, with the functions that tilebook has an own one for put in by hand."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import tilebook

EPS = 1e-6


@dataclass(frozen=True)
class Functions:
    """What a layer is made of. `mlp` takes a layer's two linear modules, between which is GELU, `gated` three, with
    SiLU; `rope` takes q, k, cos and sin; `head_loss` a language model's rows, its head's weight and the tokens wanted,
    where the head is not a layer like others."""

    attention: Callable[..., torch.Tensor]
    rms_norm: Callable[..., torch.Tensor]
    mlp: Callable[[torch.Tensor, nn.Linear, nn.Linear], torch.Tensor]
    gated: Callable[[torch.Tensor, nn.Linear, nn.Linear, nn.Linear], torch.Tensor]
    rope: Callable[..., tuple[torch.Tensor, ...]]
    head_loss: Callable[..., torch.Tensor] | None = None


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021)."""
    one, other = x.chunk(2, -1)
    return (x * cos + torch.cat([-other, one], -1) * sin).to(x.dtype)


PYTORCH = Functions(
    F.scaled_dot_product_attention,
    lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
    lambda x, up, down: down(F.gelu(up(x))),
    lambda x, gate, up, down: down(F.silu(gate(x)) * up(x)),
    lambda q, k, cos, sin: (turned(q, cos, sin), turned(k, cos, sin)),
)
TILEBOOK = Functions(
    tilebook.scaled_dot_product_attention,
    lambda x, weight: tilebook.rms_norm(x, weight, EPS),
    lambda x, up, down: tilebook.mlp(x, up.weight, up.bias, down.weight, down.bias),
    lambda x, gate, up, down: tilebook.swiglu(x, gate.weight, up.weight, down.weight),
    tilebook.apply_rope,
    tilebook.linear_cross_entropy,
)


@dataclass(frozen=True)
class Sizes:
    layers: int
    width: int
    heads: int
    inner: int
    tokens: int
    batch: int
    heads_kv: int = 0
    vocabulary: int = 0
    classes: int = 1000
    image: int = 224

    def tiny(self) -> Sizes:
        """The same model small enough for a CPU; images of 32 pixels, of which a patch has 16 and CCT 2 tokens."""
        heads_kv = self.heads_kv and 1
        few = {"layers": 2, "width": 32, "heads": 2, "inner": 64, "batch": 2, "heads_kv": heads_kv, "image": 32}
        return replace(self, **few, tokens=min(self.tokens, 16), vocabulary=min(self.vocabulary, 99), classes=10)


class Block(nn.Module):
    """A layer of an encoder: norms before what they belong to (ViT, CCT) or after (BERT)."""

    def __init__(self, s: Sizes, use: Functions, norm_first: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(s.width), nn.LayerNorm(s.width)
        self.qkv, self.out = nn.Linear(s.width, 3 * s.width), nn.Linear(s.width, s.width)
        self.up, self.down = nn.Linear(s.width, s.inner), nn.Linear(s.inner, s.width)
        self.heads, self.use, self.norm_first = s.heads, use, norm_first

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(self.use.attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.norm_first:
            x = x + self.attend(self.norm1(x))
            return x + self.use.mlp(self.norm2(x), self.up, self.down)
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.use.mlp(x, self.up, self.down))


class ViT(nn.Module):
    """Dosovitskiy et al. 2020: patches of 16 × 16 pixels and a token for the class."""

    def __init__(self, s: Sizes, use: Functions) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, s.width, 16, 16)
        self.first = nn.Parameter(torch.zeros(1, 1, s.width))
        self.position = nn.Parameter(torch.randn(1, (s.image // 16) ** 2 + 1, s.width) * 0.02)
        self.blocks = nn.Sequential(*(Block(s, use, True) for _ in range(s.layers)))
        self.norm, self.head = nn.LayerNorm(s.width), nn.Linear(s.width, s.classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).flatten(2).mT
        x = torch.cat([self.first.expand(len(x), -1, -1).to(x.dtype), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class CCT(nn.Module):
    """Hassani et al. 2021, CCT-14/7x2: two convolutions make the tokens, attention over the tokens pools them."""

    def __init__(self, s: Sizes, use: Functions) -> None:
        super().__init__()
        self.tokens = nn.Sequential(
            *(
                layer
                for before, after in ((3, 64), (64, s.width))
                for layer in (nn.Conv2d(before, after, 7, 2, 3, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
            )
        )
        self.position = nn.Parameter(torch.randn(1, (s.image // 16) ** 2, s.width) * 0.02)
        self.blocks = nn.Sequential(*(Block(s, use, True) for _ in range(s.layers)))
        self.norm, self.pool, self.head = nn.LayerNorm(s.width), nn.Linear(s.width, 1), nn.Linear(s.width, s.classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.blocks(self.tokens(images).flatten(2).mT + self.position))
        return self.head((self.pool(x).softmax(1).mT @ x)[:, 0])


class BERT(nn.Module):
    """Devlin et al. 2018 with a classifier over the first token, which is DistilBERT where it has 6 layers."""

    def __init__(self, s: Sizes, use: Functions) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(s.vocabulary, s.width), nn.Embedding(s.tokens, s.width)
        self.norm = nn.LayerNorm(s.width)
        self.blocks = nn.Sequential(*(Block(s, use, False) for _ in range(s.layers)))
        self.dense, self.head = nn.Linear(s.width, s.width), nn.Linear(s.width, s.classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.norm(self.embed(ids) + self.position.weight))
        return self.head(F.relu(self.dense(x[:, 0])))


class LlamaBlock(nn.Module):
    def __init__(self, s: Sizes, use: Functions) -> None:
        super().__init__()
        self.head_dim, self.heads, self.heads_kv, self.use = s.width // s.heads, s.heads, s.heads_kv, use
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(s.width)) for _ in range(2))
        linear: Any = lambda a, b: nn.Linear(a, b, bias=False)  # noqa: E731
        self.qkv = linear(s.width, (s.heads + 2 * s.heads_kv) * self.head_dim)
        self.out = linear(s.width, s.width)
        self.gate, self.up, self.down = linear(s.width, s.inner), linear(s.width, s.inner), linear(s.inner, s.width)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.use.rms_norm(x, self.norm1)).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.heads_kv, self.heads_kv], 1)
        q, k = self.use.rope(q, k, cos, sin)
        o = self.use.attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.heads_kv)
        x = x + self.out(o.transpose(1, 2).reshape(batch, tokens, width))
        y = self.use.rms_norm(x, self.norm2)
        return x + self.use.gated(y, self.gate, self.up, self.down)


class Llama(nn.Module):
    def __init__(self, s: Sizes, use: Functions) -> None:
        super().__init__()
        self.embed = nn.Embedding(s.vocabulary, s.width)
        self.blocks = nn.ModuleList(LlamaBlock(s, use) for _ in range(s.layers))
        self.norm, self.head = nn.Parameter(torch.ones(s.width)), nn.Linear(s.width, s.vocabulary, bias=False)
        self.use = use
        head_dim = s.width // s.heads
        steps = 500_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = (torch.arange(s.tokens)[:, None] * steps).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: torch.Tensor, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, or the loss where tokens are wanted."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        x = self.use.rms_norm(x, self.norm)
        if wanted is None:
            return self.head(x)
        assert self.use.head_loss is not None
        return self.use.head_loss(x.flatten(0, 1), self.head.weight, wanted.flatten())


# Models of others, in which a function is put in by hand where they call PyTorch's


class Foreign(nn.Module):
    """A model of another package, whose attention and MLPs call `use` while it runs."""

    def __init__(self, model: nn.Module, use: Functions, logits: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.use, self.logits = model, use, logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(self.model(x))


@contextmanager
def attention_by(use: Functions) -> Iterator[None]:
    """`torch.nn.functional.scaled_dot_product_attention` is that of `use` meanwhile, also for other packages."""
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = use.attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def _with_mlps(model: nn.Module, use: Functions, owner: str, up: str, down: str) -> nn.Module:
    """Every module whose class is named `owner` computes its two linear layers by the function of `use`."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return use.mlp(x, getattr(self, up), getattr(self, down))

    if use is not PYTORCH:
        for each in model.modules():
            if type(each).__name__ == owner:
                each.forward = types.MethodType(forward, each)
    return model


def timm_vit(s: Sizes, use: Functions) -> nn.Module:
    import timm

    model = timm.create_model("vit_base_patch16_224", num_classes=s.classes)
    return Foreign(_with_mlps(model, use, "Mlp", "fc1", "fc2"), use, lambda x: x)


def transformers_distilbert(s: Sizes, use: Functions) -> nn.Module:
    import transformers

    config = transformers.DistilBertConfig(
        vocab_size=s.vocabulary, max_position_embeddings=512, num_labels=s.classes, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.DistilBertForSequenceClassification(config)
    return Foreign(_with_mlps(model, use, "FFN", "lin1", "lin2"), use, lambda found: found.logits)
