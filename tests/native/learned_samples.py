"""Biases that learn, and what stands for PyTorch's memory-efficient kernels where there is no GPU."""

import torch
from gate_samples import numbers

from tilebook.kernels.attention import learned

EFFICIENT = learned._EFFICIENT


def scores(q, k, bias, scale):
    return q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias


class Kernels:
    """PyTorch's memory-efficient kernels, as they are on a GPU: what they refuse, and rows that see nothing.

    A row that sees nothing is 0, and NaN in its gradients, of the log-sum-exp of -inf that it leaves.
    """

    def __init__(self):
        self.chosen = EFFICIENT
        self.asked, self.loads, self.given, self.wanted = [], [], [], []

    def choice(self, q, k, v, bias=None, dropout=0.0, causal=False, *, scale=None, enable_gqa=False):
        if isinstance(self.chosen, Exception):
            raise self.chosen
        assert bias.requires_grad
        assert not enable_gqa
        assert bias.dtype == q.dtype
        assert bias.stride(-1) == 1
        assert bias.shape == (*q.shape[:3], k.shape[2])
        self.asked.append(bias.stride())
        return self.chosen

    def forward(self, q, k, v, bias, keep, dropout=0.0, causal=False, *, scale=None):
        assert (keep, dropout, causal) == (True, 0.0, False)
        assert bias.dtype == q.dtype
        assert bias.shape == (*q.shape[:3], k.shape[2])
        assert not bias.data_ptr() % 16
        self.loads.append(bias.stride())
        s = scores(*(x.double() for x in (q, k, bias)), scale)
        o = (s.softmax(-1) @ v.double()).nan_to_num().to(q.dtype)
        return o, s.logsumexp(-1).to(torch.float32), torch.zeros(()), torch.ones(())

    def backward(self, do, q, k, v, bias, o, lse, seed, offset, dropout, wanted, causal=False, *, scale=None):
        assert (seed, offset, dropout, causal) == (0, 1, 0.0, False)
        assert not do.data_ptr() % 16
        self.wanted.append(list(wanted))
        self.given.append(do.stride())
        of = q.dtype
        do, q, k, v, o = (x.double() for x in (do, q, k, v, o))
        p = (scores(q, k, bias.double(), scale) - lse[..., None].double()).exp()
        ds = p * (do @ v.mT - (do * o).sum(-1, True))
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        found = [ds @ k * factor, ds.mT @ q * factor, p.mT @ do, ds]
        return (*(x.to(of) for x in found[:3]), found[3].to(of) if wanted[3] else None)


def heads(columns=16, batch=3, **how):
    return [
        numbers(batch, 2, rows, 8, seed=seed, **how) / (seed + 1) for seed, rows in enumerate((4, columns, columns))
    ]


def hidden(bias):
    """A bias under which some columns, and the last rows altogether, are hidden."""
    bias = bias.clone()
    bias[0, 0, 0, 3:] = -torch.inf
    bias[-1, :, -1] = -torch.inf
    return bias


BIASES = {
    "for each": lambda **how: hidden(numbers(3, 2, 4, 16, seed=3, **how)),
    "for all of a batch": lambda **how: hidden(numbers(1, 2, 4, 16, seed=3, **how)),
    "for all heads": lambda **how: hidden(numbers(3, 1, 4, 16, seed=3, **how)),
    "for all rows": lambda **how: hidden(numbers(3, 1, 1, 16, seed=3, **how)),
    "one for all": lambda **how: numbers(1, 1, 1, 16, seed=3, **how),
    "expanded": lambda **how: hidden(numbers(1, 1, 4, 16, seed=3, **how)).expand(3, 2, 4, 16),
    "expanded along rows": lambda **how: numbers(3, 2, 1, 16, seed=3, **how).expand(3, 2, 4, 16),
    "by heads": lambda **how: hidden(numbers(1, 4, 16, 2, seed=3, **how).permute(0, 3, 1, 2)),
    "by columns": lambda **how: hidden(numbers(1, 2, 16, 4, seed=3, **how)).mT,
    "every second head": lambda **how: hidden(numbers(1, 4, 4, 16, seed=3, **how))[:, ::2],
    "of another dtype": lambda **how: hidden(numbers(1, 2, 4, 16, seed=3, **how)).double(),
    "of another dtype, expanded": lambda **how: (
        hidden(numbers(1, 2, 4, 16, seed=3, **how)).double().expand(3, 2, 4, 16)
    ),
}
"""Name → a bias of this dtype, unless it says of another."""
