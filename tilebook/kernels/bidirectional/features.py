"""Feature maps φ: linear attention counts φ(q) · φ(k) where attention has exp(q · k)."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from tilebook.call import untraced
from tilebook.casting import autocast_on
from tilebook.kernels.bidirectional.form import FEATURES, SEED

FeatureMap = Callable[[torch.Tensor], torch.Tensor]

NAMED: dict[str, FeatureMap] = {
    "elu+1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "softmax": lambda x: x.softmax(-1),
}


def mapped(q: torch.Tensor, k: torch.Tensor, feature_map: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """φ(q) and φ(k). Raises ValueError for a name that is none."""
    check_rows(q, k)
    check_map(feature_map)
    if feature_map is None:
        return q, k
    if feature_map == "performer":
        return performer(q, k)
    found = NAMED[feature_map] if isinstance(feature_map, str) else feature_map
    made = found(q), found(k)
    if not all(isinstance(x, torch.Tensor) for x in made):
        raise ValueError(f"feature_map must return tensors, not {', '.join(type(x).__name__ for x in made)}")
    return made


def check_map(feature_map: Any) -> None:
    """Raises ValueError for what is no feature map."""
    if isinstance(feature_map, str):
        known = feature_map in NAMED or feature_map == "performer"
    else:
        known = feature_map is None or callable(feature_map)
    if not known:
        names = ", ".join(map(repr, (*NAMED, "performer")))
        raise ValueError(f"feature_map must be {names}, None or a function, not {feature_map!r}")


def check_rows(q: torch.Tensor, k: torch.Tensor) -> None:
    """Raises ValueError for what has no rows."""
    if any(x.ndim != 4 or not x.shape[3] or not x.is_floating_point() for x in (q, k)):
        raise ValueError(
            "linear attention takes floating point tensors of shape (batch, heads, sequence, head dimension), "
            f"head dimensions at least 1; got q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}"
        )


def projection(width: int, features: int, seed: int) -> torch.Tensor:
    """(features, D) in fp64: rows of length √χ²(D), orthogonal in groups of D (Choromanski et al., 2021, §2.4)."""
    watched = torch._C._len_torch_dispatch_stack()
    with untraced(), _disable_current_modes() if watched else nullcontext():
        found = _projection(int(width), features, seed)
    # To a mode it is what `torch.tensor` makes of numbers: a graph that is traced has them, and draws none itself.
    return torch.ops.aten.lift_fresh_copy(found) if watched else found


@functools.lru_cache(maxsize=64)
def _projection(width: int, features: int, seed: int) -> torch.Tensor:
    """Kept for all calls: no transform that the first is under may show in it."""
    made: dict[str, Any] = {
        "generator": torch.Generator("cpu").manual_seed(seed),
        "dtype": torch.float64,
        "device": "cpu",
    }
    with torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        squares = [torch.randn(width, width, **made) for _ in range(math.ceil(features / width))]
        lengths = torch.randn(features, width, **made).norm(dim=1)
        found: torch.Tensor = torch.cat([torch.linalg.qr(x)[0].T for x in squares])[:features] * lengths[:, None]
    return found


def directions_for(q: torch.Tensor, features: int, seed: int, scale: float | None, dtype: torch.dtype) -> Any:
    """`directions` for rows of q, on all its GPUs where it is cut over several, and the scale: D^-0.5 for None."""
    width = operator.index(q.shape[-1])  # a number, where a trace has a symbol
    scale = float(width**-0.5 if scale is None else scale)
    found = directions(width, features, seed, scale, dtype, q.device)
    if not torch.compiler.is_compiling() and hasattr(q, "device_mesh"):
        from torch.distributed.tensor import DTensor

        found = DTensor.from_local(found, q.device_mesh, run_check=False)
    return found, scale


_kept: dict[tuple[Any, ...], torch.Tensor] = {}
"""All that were made: a graph that was captured reads them, and cannot make them, as nothing is copied meanwhile."""


def directions(
    width: int, features: int, seed: int, scale: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Performer's ω, times √scale: (2, features, width) of a 16-bit dtype, whose sum they are; else (1, …)."""
    if device.type == "meta" or torch._C._len_torch_dispatch_stack():
        return _directions(width, features, seed, scale, dtype, device)
    key = int(width), features, seed, scale, dtype, device
    if (kept := _kept.get(key)) is None:
        with untraced(), torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.no_grad():
            kept = _kept[key] = _directions(*key)
        kept._dynamo_static_indices = {0, 1, 2}  # type: ignore[attr-defined]  # as `torch._dynamo.mark_static` has it
    return kept


# It runs while a call is traced, and is a constant of the graph, as `torch.compiler.assume_constant_result` has it,
# which would load the compiler.
directions._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _directions(
    width: int, features: int, seed: int, scale: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    found = projection(width, features, seed) * scale**0.5
    high = found.to(dtype)
    # No view: a trace would have its base's sizes as symbols. The host waits for the copy, so that any stream may read.
    return torch.stack((high, (found - high.double()).to(dtype))[: parts(dtype)]).to(device)


def parts(dtype: torch.dtype) -> int:
    """Of how many numbers of this dtype one of ω is the sum."""
    return 2 if dtype in (torch.bfloat16, torch.float16) else 1


def logarithms(x: torch.Tensor, omega: torch.Tensor, scale: float) -> torch.Tensor:
    """ω · x − scale |x|² / 2 of rows x, with √scale in omega (features, width)."""
    return x @ omega.T - x.square().sum(-1, keepdim=True) * (scale / 2)


def divided(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """φ(q), φ(k) and the largest of each feature over all keys, of logarithms; −infinity is a key that is hidden.

    Each feature is divided by its largest, and multiplied by it in q; a row of q is divided by its own.
    """
    top = (
        columns.detach().amax(-2, keepdim=True)
        if columns.shape[-2]
        else torch.zeros_like(columns.sum(-2, keepdim=True))
    )
    rows = rows + top
    made = (rows - _finite(rows.detach().amax(-1, keepdim=True))).exp(), (columns - _finite(top)).exp()
    return *made, top


def _finite(x: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(x == -torch.inf, 0)


def performer(
    q: torch.Tensor, k: torch.Tensor, *, features: int = 64, seed: int = 0, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """FAVOR+: positive features with E[φ(q) · φ(k)] ∝ exp(scale · q · k) (Choromanski et al., 2021, lemma 1).

    See `divided`: what is left of that cancels where outputs are normalized.
    """
    phi_q, phi_k, _ = divided(*_both(q, k, features, seed, scale))
    return phi_q.to(q.dtype), phi_k.to(k.dtype)


def _both(
    q: torch.Tensor, k: torch.Tensor, features: int, seed: int, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms of the features of q and k, in fp32."""
    omega, factor = directions_for(q, features, seed, scale, torch.float32)
    omega = omega.squeeze(0)  # a trace cannot have [0]

    with torch.autocast(q.device.type, enabled=False) if autocast_on(q) else nullcontext():  # they are exponents
        rows, columns = (logarithms(x.float(), omega, factor) for x in (q, k))
    return rows, columns


_MOST = {torch.float16: 10.0}
"""Exponents of features of q: what is left of keys' features beside those is nothing anyway. 80 of other dtypes."""


class InOrder(NamedTuple):
    """Performer's features where a token sees those up to it alone.

    decay: log-decays (B, H, S) of a state that is divided by e^`first` before the first token, and by e^`last` behind
    the last, each (B, H).
    """

    phi_q: torch.Tensor
    phi_k: torch.Tensor
    decay: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor


def in_order(
    q: torch.Tensor, k: torch.Tensor, *, begins: torch.Tensor | None = None, weights: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
) -> InOrder:  # fmt: skip
    """`performer`, with nothing in a token's features or divisors of those that come after it.

    All that is known is divided by e^r, the largest feature so far, which grows from token to token: log-decays are
    r_{t−1} − r_t. A row of q is multiplied by it again and divided by the largest of its weights, whose sum so is at
    least 1.

    Args:
        begins: (B, H, S), where sequences begin, of which each has an r of its own.
        weights: logarithms of what keys count for, (B, 1, S); −infinity of hidden ones.
        known: of the sum z of features of earlier tokens the logarithm (B, H, F).
    """
    rows, columns = _both(q, k, FEATURES, SEED, None)
    if weights is not None:
        columns = columns + weights[..., None]
    top = _so_far(columns.detach(), begins)
    if known is not None:
        top = torch.maximum(top, known[:, :, None])
    r = _finite(top.amax(-1))
    most = _finite((rows.detach() + top).amax(-1))
    phi_q = (rows + (r - most)[..., None]).clamp(max=_MOST.get(q.dtype, 80.0)).exp()
    phi_k = (columns - r[..., None]).exp()
    first = r[..., 0] if known is None else _finite(known.amax(-1))
    decay = (torch.cat((first[..., None], r[..., :-1]), -1) - r).clamp(max=0)
    if begins is not None:
        decay = decay.masked_fill(begins, -torch.inf)
    return InOrder(phi_q.to(q.dtype), phi_k.to(k.dtype), decay, first, r[..., -1])


def _so_far(x: torch.Tensor, begins: torch.Tensor | None) -> torch.Tensor:
    """The largest of each feature of the tokens up to each, of its own sequence: x (B, H, S, F)."""
    if begins is None:
        return x.cummax(2).values
    # Later sequences are lifted above earlier ones, and fp64 has room for both.
    lifted = begins.cumsum(-1, dtype=torch.float64)[..., None] * 2.0**24
    return ((x.double() + lifted).cummax(2).values - lifted).to(x.dtype)
