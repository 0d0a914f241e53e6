"""A small vision transformer on scikit-learn's digits: tilebook's attention and MLP beside plain PyTorch.

    python examples/train_small.py [--epochs 15] [--seeds 3]

Both models start from the same weights and see the same batches. On a GPU they train in bf16 under autocast, on the CPU
in fp32 (where tilebook runs PyTorch's own implementations). The last line is the difference in test accuracy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import tilebook

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
MLP = Callable[[torch.Tensor, nn.Linear, nn.Linear], torch.Tensor]

FLAVOURS: dict[str, tuple[Attention, MLP]] = {
    "pytorch": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda x, up, down: down(F.gelu(up(x))),
    ),
    "tilebook": (
        lambda q, k, v: tilebook.attention(q, k, v),
        lambda x, up, down: tilebook.mlp(x, up.weight, up.bias, down.weight, down.bias),
    ),
}


class Block(nn.Module):
    """Pre-norm transformer block over (batch, tokens, width)."""

    def __init__(self, width: int, heads: int, attention: Attention, mlp: MLP) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.attention, self.mlp = heads, attention, mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x), self.up, self.down)


class Classifier(nn.Module):
    """8 × 8 images as 16 patches of 2 × 2, mean-pooled after the last block."""

    def __init__(self, flavour: str, width: int = 64, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, *FLAVOURS[flavour]) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        return self.head(self.norm(self.blocks(self.embed(patches) + self.position)).mean(1))


def train(flavour: str, seed: int, epochs: int, device: str) -> tuple[float, float]:
    """Returns test accuracy and seconds of training."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device) / 16
    labels = torch.tensor(digits.target, device=device)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(device)
    held_out, kept = order[:360], order[360:]
    torch.manual_seed(seed)
    model = Classifier(flavour).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(kept) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    shuffle = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in kept[torch.randperm(len(kept), generator=shuffle).to(device)].split(64):
            if len(batch) < 64:
                continue
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        accuracy = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    return accuracy, seconds


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--epochs", type=int, default=15)
    arguments.add_argument("--seeds", type=int, default=3)
    given = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    accuracies: dict[str, list[float]] = {flavour: [] for flavour in FLAVOURS}
    for seed in range(given.seeds):
        for flavour, found in accuracies.items():
            accuracy, seconds = train(flavour, seed, given.epochs, device)
            found.append(accuracy)
            print(f"seed {seed}  {flavour:9s} accuracy {accuracy:.4f}  {seconds:.1f} s", flush=True)
    means = {flavour: statistics.mean(found) for flavour, found in accuracies.items()}
    spread = max(max(found) - min(found) for found in accuracies.values())
    print(
        f"mean accuracy: pytorch {means['pytorch']:.4f}, tilebook {means['tilebook']:.4f}; "
        f"difference {means['tilebook'] - means['pytorch']:+.4f}, spread over seeds {spread:.4f} ({device})"
    )


if __name__ == "__main__":
    main()
