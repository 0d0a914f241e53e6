"""The gated delta rule as PyTorch's ops: schema, shapes, gradients. Loads no kernel before one runs."""

from __future__ import annotations

import functools
from typing import Any

from tilebook.call import Tensors
from tilebook.kernels.delta_rule.check import check
from tilebook.kernels.delta_rule.pytorch import plain
from tilebook.kernels.linear_attention.entries import Recurrence, entry, fake, flops
from tilebook.layout import rows

Options = tuple[float, bool]


@functools.cache
def registered() -> tuple[Any, Any]:
    """(forward, backward), as the tuner and the registry know them."""
    from tilebook.kernels.delta_rule.ops import gated_delta_rule_bwd, gated_delta_rule_fwd

    return gated_delta_rule_fwd, gated_delta_rule_bwd


def arguments(tensors: Tensors, options: Options) -> tuple[Any, ...]:
    """The forward op's, of an entry's tensors and options."""
    q, k, v, *more = tensors
    return *(rows(x) for x in (q, k, v) if x is not None), *more, *options


def _check(tensors: Tensors, options: Options) -> None:
    check(*tensors)  # type: ignore[arg-type]


_RECURRENCE = Recurrence(registered, arguments, plain)

DELTA = entry(
    "gated_delta_rule",
    ("q", "k", "v", "log_decay?", "beta", "initial_state?"),
    ("o", "state"),
    options=("float scale", "bool normalize"),
    kept=(),
    forward=_RECURRENCE.forward,
    backward=_RECURRENCE.backward,
    check=_check,
    plain=_RECURRENCE.composed,
    fake=fake,
    flops=flops(6, 16),  # what each token finds in a state, adds to it and reads there
)
