"""Linear attention written out, for tests of what computes it in another way."""

import torch

from tilebook.kernels.bidirectional import features


def over_pairs(q, k, v, hidden=None, feature_map="elu+1", causal=False, eps=1e-6):
    """The sum over all pairs, of each sequence without the keys that are hidden."""
    found = []
    for n in range(len(q)):
        seen = torch.ones(k.shape[2], dtype=torch.bool) if hidden is None else ~hidden[n]
        phi_q, phi_k = features.mapped(q[n : n + 1], k[n : n + 1, :, seen], feature_map)
        a = phi_q @ phi_k.mT
        if causal:
            a = a * (torch.arange(q.shape[2])[:, None] >= torch.arange(k.shape[2])[seen])
        found.append(a @ v[n : n + 1, :, seen] / (eps + a.sum(-1, keepdim=True)))
    return torch.cat(found)
