"""Images that a classifier learns from: CIFAR-10 from a folder, scikit-learn's digits, or a set that is drawn."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

SIDE = 32


@dataclass(frozen=True)
class Images:
    """(N, 3, 32, 32) of about unit variance, and classes 0 … 9; to learn from, and to be asked about."""

    name: str
    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    mirrored: bool = False

    def to(self, device: str) -> Images:
        train, test = (tuple(each.to(device) for each in pair) for pair in (self.train, self.test))
        return Images(self.name, train, test, self.mirrored)


def cifar(folder: Path) -> Images:
    """The python version of CIFAR-10: data_batch_1 … 5 and test_batch."""

    def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        with (folder / name).open("rb") as file:
            found = pickle.load(file, encoding="bytes")
        images = torch.from_numpy(found[b"data"]).view(-1, 3, SIDE, SIDE).float() / 255
        mean, deviation = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
        return (images - mean[:, None, None]) / deviation[:, None, None], torch.tensor(found[b"labels"])

    parts = [read(f"data_batch_{n}") for n in range(1, 6)]
    images, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    return Images("CIFAR-10", (images, labels), read("test_batch"), mirrored=True)


def digits() -> Images:
    """1797 handwritten digits, half of them to learn from."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = F.interpolate(torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, SIDE, mode="bilinear")
    images, labels = ((images - 0.3) / 0.37).expand(-1, 3, -1, -1).contiguous(), torch.tensor(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    half = len(labels) // 2
    train, test = ((images[which], labels[which]) for which in (order[:half], order[half:]))
    return Images("digits", train, test)


def drawn(n_train: int, n_test: int, noise: float = 1.0) -> Images:
    """Gratings in noise, in a soft window at a random place: five directions by two frequencies are ten classes."""
    source = torch.Generator().manual_seed(0)
    n = n_train + n_test
    labels = torch.randint(10, (n,), generator=source)
    at = torch.rand(n, 4, generator=source)
    angle = (labels % 5 + 0.6 * (at[:, 0] - 0.5)) * math.pi / 5
    wave = torch.where(labels < 5, 4.0, 7.0)
    y, x = torch.meshgrid(torch.arange(SIDE) * 1.0, torch.arange(SIDE) * 1.0, indexing="ij")
    along = x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None]
    grating = (2 * math.pi * (along / wave[:, None, None] + at[:, 3, None, None])).sin()
    centre = 8 + 16 * at[:, 1:3]
    far = (x - centre[:, 0, None, None]) ** 2 + (y - centre[:, 1, None, None]) ** 2
    images = (grating * (-far / 72).exp())[:, None] + noise * torch.randn(n, 3, SIDE, SIDE, generator=source)
    return Images("drawn gratings", (images[:n_train], labels[:n_train]), (images[n_train:], labels[n_train:]))


def chosen(which: str, folder: Path | None, tiny: bool) -> Images:
    """which: "cifar", "digits", "drawn", or "" for the first that there is."""
    if tiny:
        return drawn(32, 16)
    if which == "cifar" or (folder is not None and not which):
        if folder is None:
            raise SystemExit("CIFAR-10 is read from a folder: --data")
        return cifar(folder)
    if which != "drawn":
        try:
            return digits()
        except ImportError:
            if which:
                raise
    return drawn(8192, 4096)
