"""The random bits of dropout in PyTorch, the same as the kernels' (Philox 4x32 with 7 rounds, Salmon et al. 2011)."""

from __future__ import annotations

import torch

_ROUNDS = 7
_WORD = 0xFFFFFFFF
_FACTORS = 0xD2511F53, 0xCD9E8D57
_KEYS = 0x9E3779B9, 0xBB67AE85


def _multiplied(factor: int, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of factor · words; int64 wraps, and that leaves the bits right."""
    product = words * factor
    return (product >> 32) & _WORD, product & _WORD


def survives(
    seed: torch.Tensor, pairs: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, probability: float
) -> torch.Tensor:
    """Which weights dropout keeps, True with 1 - `probability`: a function of seed, (batch · head), row and column.

    pairs, rows and columns are integers that broadcast against each other; seed is one int64.
    """
    zero = torch.zeros_like(pairs)
    c0, c1, c2, c3 = columns, rows, pairs, zero
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        (high_a, low_a), (high_b, low_b) = _multiplied(_FACTORS[0], c0), _multiplied(_FACTORS[1], c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEYS[0]) & _WORD, (k1 + _KEYS[1]) & _WORD
    return (c0 >> 8).float() * 2.0**-24 >= probability
