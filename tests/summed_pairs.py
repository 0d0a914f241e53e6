"""Linear attention written out, for tests of what computes it in another way."""

import torch

from tilebook.kernels.bidirectional import features


def performed(q, k, v, seen, eps):
    """Causal Performer: each row's exponents are those of its own pairs, whose largest is taken off. k, v: as seen."""
    omega = features.projection(q.shape[-1], 64, 0) * q.shape[-1] ** -0.25
    # Exponents of this size are numbers of fp32, in all that computes them.
    rows, columns = (features.logarithms(x.float(), omega.float(), q.shape[-1] ** -0.5).to(q.dtype) for x in (q, k))
    later = torch.arange(q.shape[2])[:, None] < torch.arange(len(seen))[seen]
    pairs = (rows[:, :, :, None] + columns[:, :, None]).masked_fill(later[..., None], -torch.inf)
    most = pairs.detach().amax((-2, -1), keepdim=True)
    a = (pairs - most.masked_fill(most == -torch.inf, 0)).exp().sum(-1)
    return a @ v / (eps + a.sum(-1, keepdim=True))


def over_pairs(q, k, v, hidden=None, feature_map="elu+1", causal=False, eps=1e-6):
    """The sum over all pairs, of each sequence without the keys that are hidden."""
    found = []
    for n in range(len(q)):
        seen = torch.ones(k.shape[2], dtype=torch.bool) if hidden is None else ~hidden[n]
        if causal and feature_map == "performer":
            found.append(performed(q[n : n + 1], k[n : n + 1, :, seen], v[n : n + 1, :, seen], seen, eps))
            continue
        phi_q, phi_k = features.mapped(q[n : n + 1], k[n : n + 1, :, seen], feature_map)
        a = phi_q @ phi_k.mT
        if causal:
            a = a * (torch.arange(q.shape[2])[:, None] >= torch.arange(k.shape[2])[seen])
        found.append(a @ v[n : n + 1, :, seen] / (eps + a.sum(-1, keepdim=True)))
    return torch.cat(found)
