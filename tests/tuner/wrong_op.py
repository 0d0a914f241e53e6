"""The wrong candidates in PyTorch, for the CPU. Imported by name in workers."""

import random

import torch
from injected import make_injected
from wrong import RACE, candidates


def _flat(tensor, first, last):
    return torch.as_strided(tensor, (last - first,), (1,), tensor.storage_offset() + first)


class Eager:
    def write(self, out, x, factor, n, first=0, last=None):
        last = x.numel() if last is None else last
        step = 1 << (4 + n % 8)
        for start in range(first, last, max(step, (last - first) // 4)):
            end = min(last, start + max(step, (last - first) // 4))
            _flat(out, start, end).copy_(_flat(x, start, end).float() * factor)

    def add(self, out, x, factor, n):
        out.add_(x, alpha=factor)

    def race(self, out, at):
        if random.random() < RACE:
            out.view(-1)[at] += 1

    def spoil_if(self, out, x, first):
        if x.view(-1)[0].item() == first:
            out.view(-1)[0] += 1

    def overflow(self, out, x, n):
        e = torch.exp(2 * x.float())
        out += (e - e).to(out.dtype)


WRONG = make_injected("wrong", *candidates(Eager()))
