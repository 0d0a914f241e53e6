"""CCT, the compact convolutional transformer of "Escaping the Big Data Paradigm with Compact Transformers".

Hassani et al. 2021, https://arxiv.org/abs/2104.05704. Layers, their order, how they begin and their names are those of
the authors' program, so that its weights load: the second norm of a layer stands on the residual, not beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from small_models import Functions, Sizes
from torch import nn


@dataclass(frozen=True)
class Shape:
    """kernel, stride, padding and number of the tokenizer's convolutions, and what `Sizes` says of the rest."""

    sizes: Sizes
    kernel: int
    stride: int
    convolutions: int

    def tiny(self) -> Shape:
        return Shape(self.sizes.tiny(), self.kernel, 2, self.convolutions)


def _sizes(layers: int, width: int, heads: int, ratio: int, image: int, batch: int, classes: int, side: int) -> Sizes:
    return Sizes(layers, width, heads, ratio * width, side * side, batch, classes=classes, image=image)


CCT_14 = Shape(_sizes(14, 384, 6, 3, 384, 8, 102, 24), 7, 2, 2)
"""CCT-14/7x2_384, for Flowers-102 in batches of 8."""
CCT_7 = Shape(_sizes(7, 256, 4, 2, 32, 128, 10, 16), 3, 1, 1)
"""CCT-7/3x1_32, for CIFAR-10 in batches of 128."""


class Attention(nn.Module):
    def __init__(self, s: Sizes, use: Functions, dropout: float) -> None:
        super().__init__()
        self.heads, self.use, self.dropout = s.heads, use, dropout
        self.qkv, self.proj = nn.Linear(s.width, 3 * s.width, bias=False), nn.Linear(s.width, s.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        o = self.use.attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(o.transpose(1, 2).reshape(batch, tokens, width))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): of some images a branch is left out, of the others it counts for more."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.p:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.p
        return x * (kept / (1 - self.p)).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, s: Sizes, use: Functions, dropout: float, depth: float) -> None:
        super().__init__()
        self.pre_norm, self.self_attn = nn.LayerNorm(s.width), Attention(s, use, dropout)
        self.linear1, self.norm1 = nn.Linear(s.width, s.inner), nn.LayerNorm(s.width)
        self.linear2, self.drop_path, self.use = nn.Linear(s.inner, s.width), DropPath(depth), use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x + self.drop_path(self.self_attn(self.pre_norm(x))))
        return x + self.drop_path(self.use.mlp(x, self.linear1, self.linear2))


class Tokenizer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        widths = [3, *[64] * (shape.convolutions - 1), shape.sizes.width]
        self.conv_layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, shape.kernel, shape.stride, shape.kernel // 2, bias=False),
                    nn.ReLU(),
                    nn.MaxPool2d(3, 2, 1),
                )
                for before, after in pairwise(widths)
            )
        )
        for convolution, *_ in self.conv_layers:
            nn.init.kaiming_normal_(convolution.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv_layers(images).flatten(2).mT


class Classifier(nn.Module):
    def __init__(self, shape: Shape, use: Functions, dropout: float, depth: float) -> None:
        super().__init__()
        s, side = shape.sizes, shape.sizes.image // (2 * shape.stride) ** shape.convolutions
        self.positional_emb = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, side * side, s.width), std=0.2))
        self.attention_pool = nn.Linear(s.width, 1)
        last = max(1, s.layers - 1)
        self.blocks = nn.Sequential(*(Layer(s, use, dropout, depth * n / last) for n in range(s.layers)))
        self.norm, self.fc = nn.LayerNorm(s.width), nn.Linear(s.width, s.classes)
        for each in self.modules():
            if isinstance(each, nn.Linear):
                nn.init.trunc_normal_(each.weight, std=0.02)
                if each.bias is not None:
                    nn.init.zeros_(each.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.blocks(x + self.positional_emb))
        return self.fc((self.attention_pool(x).softmax(1).mT @ x)[:, 0])


class CCT(nn.Module):
    """Images (B, 3, H, W) → logits. dropout: of attention's weights. depth: of the last layer's branches."""

    def __init__(self, shape: Shape, use: Functions, dropout: float = 0.1, depth: float = 0.1) -> None:
        super().__init__()
        self.tokenizer, self.classifier = Tokenizer(shape), Classifier(shape, use, dropout, depth)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.tokenizer(images))
