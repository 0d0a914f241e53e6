"""Attention in PyTorch's own functions, differentiable by its autograd: what runs where no kernel serves."""

from __future__ import annotations

from typing import Any

import torch

from tilebook.casting import autocast
from tilebook.kernels.attention import eager, learned
from tilebook.kernels.attention.form import Form
from tilebook.layout import PIECE, VECTOR
from tilebook.left import ORDINARY

COLUMNS = 16
"""To which the rows of a mask are filled up that has to be copied, and which a bias that learns must have."""

BOUNDS = float(1 << 32), float(1 << 31)
"""Elements of q times keys up to which an eager call takes as long as the host takes: without gradients, with them.

An H200 is done with so much in about 45 µs forward, and in about 100 µs forward and backward; starting kernels of ours
from Python costs the host as much, and more with gradients (benchmarks/host_cost.py).
"""

TRACED = float(1 << 32), float(1 << 34)
"""Likewise of compiled calls, whose op in Python costs the host 100 µs forward and more backward."""

# Bound here once: a program may put our drop-in in the place of PyTorch's function.
scaled_dot_product_attention: Any = torch._C._nn.scaled_dot_product_attention


def positive(q: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, float | None]:
    """q and a scale above 0 that give the same scores: of others cuDNN makes NaN, and so does, under a causal mask,
    PyTorch's kernel for the CPU, which masks before it scales."""
    if scale is None or not scale <= 0:  # NaN stays what it is
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """PyTorch's function, grouped where head counts differ; a bias only without a causal mask.

    Rows that see nothing are 0, and so are their gradients, also where PyTorch's kernel makes a mean of them.
    """
    q, scale = positive(q, scale)
    grouped: Any = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    if bias is None:
        o: torch.Tensor = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, **grouped)
        return o
    if not q.is_cuda:
        mask = bias if bias.dtype == torch.bool else bias.to(q.dtype)
        o = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, **grouped)
        return o
    q, k, v = autocast(q, k, v)  # which would cast the mask too, and leave no gap in it
    learns = bias.requires_grad and torch.is_grad_enabled()
    if bias.dtype == q.dtype and not learns and lies_whole(bias, k.shape[2]):
        o = scaled_dot_product_attention(q, k, v, _started(bias), is_causal=causal, scale=scale, **grouped)
        return o
    if learns:
        return _learnt(q, k, v, causal, scale, bias)
    # Of booleans cuDNN makes a mean where a row sees nothing; of scores of -inf all of PyTorch's kernels make 0.
    mask = in_vectors(scores(_differing(bias), q.dtype), k.shape[2], q.dtype).expand(*bias.shape[:-1], k.shape[2])
    o = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, **grouped)
    return o


def _differing(bias: torch.Tensor) -> torch.Tensor:
    """As much of a mask or bias as differs: where all see the same, one is looked at."""
    return bias[tuple(slice(None if step else 1) for step in bias.stride())]


def scores(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a mask or bias adds to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    if placed(mask):  # by one kernel
        return torch.log(mask, out=torch.empty(mask.shape, dtype=dtype, device=mask.device))
    return mask.to(dtype).log()


def _learnt(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None, bias: torch.Tensor
) -> torch.Tensor:
    """The same under a bias that has a gradient, on a GPU."""
    seen = _differing(bias) if placed(bias) else bias
    n_k = k.shape[2]

    def added(shape: tuple[int, ...], hidden: torch.Tensor | None = None) -> torch.Tensor:
        def make() -> torch.Tensor:
            scores = seen.to(q.dtype) if hidden is None else seen.to(q.dtype).masked_fill(hidden, 0.0)
            return in_vectors(scores, n_k, q.dtype, COLUMNS).expand(shape)

        return make() if seen is bias else learned.loaded(bias, make)

    if not causal:
        whole = added((*q.shape[:3], n_k))
        if learned.efficient(q, k, v, whole, scale):
            return learned.attention(q, k, v, whole, scale)
    # Its gradient would be NaN there: such rows see everything, and then count for nothing.
    hidden = seen.detach().amax(-1, True) == -torch.inf
    grouped: Any = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    mask = added((*bias.shape[:-1], n_k), hidden)
    o: torch.Tensor = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, **grouped)
    return o.masked_fill(hidden, 0.0)


def lies_whole(mask: torch.Tensor, n_k: int) -> bool:
    """Does it lie as PyTorch's kernels load it, with a column for each key?"""
    return mask.ndim > 0 and mask.shape[-1] == n_k and in_pieces(n_k, mask.dtype) and mask.is_contiguous()


def _started(mask: torch.Tensor) -> torch.Tensor:
    """A mask that lies whole, and starts where kernels load it; a copy only where it does not."""
    return mask.clone() if placed(mask) and mask.data_ptr() % VECTOR else mask


def in_pieces(n_k: int, dtype: torch.dtype) -> bool:
    """Does each of a mask's rows without gaps start where PyTorch's kernels load it? dtype: of the scores."""
    return n_k * dtype.itemsize % PIECE == 0


def placed(x: Any) -> bool:
    """Is it an ordinary tensor on a GPU, with an address that can be asked for here?"""
    if type(x) not in ORDINARY or not x.is_cuda or x.is_nested or torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None and torch._C._has_storage(x)


def in_vectors(mask: torch.Tensor, n_k: int, dtype: torch.dtype, columns: int = 0) -> torch.Tensor:
    """A mask or bias with all its columns, which starts, as each row does, where PyTorch's kernels load it.

    dtype: of what is added to the scores, which PyTorch makes of booleans, row by row without a gap. columns: what a
    row's step is a multiple of, where that is more than its kernels for inference need.
    """
    if not mask.ndim or mask.shape[-1] != n_k:
        mask = mask.expand(*mask.shape[:-1], n_k)
    if not n_k % columns if columns else in_pieces(n_k, dtype):
        return _started(mask.contiguous())
    short = -n_k % COLUMNS
    if placed(mask) and not (mask.requires_grad and torch.is_grad_enabled()):
        added = dtype if mask.dtype == torch.bool else mask.dtype
        whole = torch.zeros((*mask.shape[:-1], n_k + short), dtype=added, device=mask.device)
        found = whole[..., :n_k]
        if mask.dtype == torch.bool:
            torch.log(mask, out=found)
        else:
            found.copy_(mask)
        return found
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    # Of what lies by channels padding would make what lies by channels.
    return torch.nn.functional.pad(mask.contiguous(), (0, short))[..., :n_k]


def causally(mask: torch.Tensor, n_q: int, n_k: int) -> torch.Tensor:
    """A mask or bias, (…, Sq, Sk), that hides also what a causal mask does, which is aligned top-left."""
    pairs = torch.ones(n_q, n_k, dtype=torch.bool, device=mask.device)
    return mask & pairs.tril() if mask.dtype == torch.bool else mask.masked_fill(pairs.triu(1), -torch.inf)


def nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The result where there is no row, or nothing to see: zeros, with zeros for gradients."""
    unseen = k.flatten()[:0].sum() + v.flatten()[:0].sum()
    return q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0) + unseen


def plain(tensors: tuple[Any, ...], options: tuple[Form, float | None]) -> torch.Tensor:
    """The result for an entry's tensors (q, k, v, bias, slopes, seed) and options (form, scale)."""
    (q, k, v, *extras), (form, scale) = tensors, options
    given = [x for x in extras if x is not None]
    # On a CPU there is time for what can be differentiated twice, and is right beside the most negative numbers.
    if form.folded and q.is_cuda and q.numel() and k.numel() and not _batched():
        return sdpa(q, k, v, False, scale, causally(given[0], q.shape[2], k.shape[2]))
    return twice(tensors, options)


def twice(tensors: tuple[Any, ...], options: tuple[Form, float | None]) -> torch.Tensor:
    """The same, of functions that autograd differentiates twice where PyTorch has to compose it."""
    (q, k, v, *extras), (form, scale) = tensors, options
    if not (q.numel() and k.numel()):
        return nothing(q, k, v)
    given = [x for x in extras if x is not None]
    # PyTorch's rule for a batch of calls does not know masks that all share.
    if not form.composed and not (given and _batched()):
        return sdpa(q, k, v, form.causal, scale, *given)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return eager.composed(q, k, v, form, factor, *given)[0]


def _batched() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def log_sum_exp(tensors: tuple[Any, ...], options: tuple[Form, float]) -> torch.Tensor:
    """The natural log-sum-exp of each row's scores, (B, H, Sq) in fp32, without gradient."""
    (q, k, _, *extras), (form, scale) = tensors, options
    if not (q.numel() and k.numel()):
        return torch.full(q.shape[:-1], -torch.inf, dtype=torch.float32, device=q.device)
    with torch.no_grad():
        given = [x for x in extras if x is not None]
        q, k = q.float(), k.float()
        # Pieces of a batch cannot be put together in place.
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return eager.composed(q, k, k, form, scale, *given)[1]
        return eager.log_sum_exp(q, k, form, scale, *given)
