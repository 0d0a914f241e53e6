"""Decays by channel as PyTorch's ops: schema, shapes, gradients. Loads no kernel before one runs."""

from __future__ import annotations

import functools
from typing import Any

from tilebook.call import Tensors
from tilebook.kernels.channel_decay.check import check
from tilebook.kernels.channel_decay.pytorch import plain
from tilebook.kernels.linear_attention.entries import Recurrence, entry, fake, flops
from tilebook.layout import rows

Options = tuple[float]


@functools.cache
def registered() -> tuple[Any, Any]:
    """(forward, backward), as the tuner and the registry know them."""
    from tilebook.kernels.channel_decay.ops import channel_decay_bwd, channel_decay_fwd

    return channel_decay_fwd, channel_decay_bwd


def arguments(tensors: Tensors, options: Options) -> tuple[Any, ...]:
    """The forward op's, of an entry's tensors and options."""
    *given, state = tensors
    return *(rows(x) for x in given if x is not None), state, *options


def _check(tensors: Tensors, options: Options) -> None:
    check(*tensors)  # type: ignore[arg-type]


_RECURRENCE = Recurrence(registered, arguments, plain, told=lambda needs: (bool(needs[3]),))

CHANNELS = entry(
    "channel_decay",
    ("q", "k", "v", "log_decay", "initial_state?"),
    ("o", "state"),
    options=("float scale",),
    kept=(),
    forward=_RECURRENCE.forward,
    backward=_RECURRENCE.backward,
    check=_check,
    plain=_RECURRENCE.composed,
    fake=fake,
    flops=flops(4, 10),  # what each token adds to a state and reads there
)
