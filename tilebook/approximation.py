"""`tilebook.attention(…, approx="auto")`: causal attention by random features, from the length on where that is faster.

That length is measured, on this GPU, by `tilebook bench crossover`, which keeps it here; nothing is guessed.
"""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tilebook import device as devices
from tilebook.errors import RegistryError
from tilebook.kernels.bidirectional.form import FEATURES, PERFORMER
from tilebook.kernels.linear_attention import linear_attention
from tilebook.registry.target import user_folder

FORWARD, TRAINING = "forward", "with gradients"

Row = dict[str, Any]


def place(gpu: str) -> Path:
    """The file that has what was measured on GPUs of this name. Raises RegistryError where the user has no home."""
    return user_folder() / "crossover" / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def keep(gpu: str, found: Sequence[Row]) -> Path:
    """Keeps crossovers as `report.crossover` has them, in the place of older ones of the same heads and directions."""
    path, kinds = place(gpu), {(row["head_dim"], row["direction"]) for row in found}
    rows = [row for row in _read(path) if (row["head_dim"], row["direction"]) not in kinds]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps({"device": gpu, "crossover": [*rows, *found]}, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)
    _kept.cache_clear()
    return path


def _read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no such file, or another's."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["crossover"]
        return [row for row in rows if isinstance(row["tokens"], dict) and {"head_dim", "direction"} <= row.keys()]
    except (OSError, ValueError, KeyError, TypeError):
        return []


@functools.cache
def _kept(gpu: str) -> tuple[tuple[int, str, float | None], ...]:
    """(head dimension, direction, tokens) of causal Performer."""
    try:
        rows = _read(place(gpu))
    except RegistryError:
        return ()
    known = [row for row in rows if PERFORMER in row["tokens"]]
    return tuple((row["head_dim"], row["direction"], row["tokens"][PERFORMER]) for row in known)


def crossover(gpu: str, head_dim: int, training: bool) -> float | None:
    """Tokens from which on features are faster: of the narrowest heads measured that are not narrower; None where
    nobody has measured that, infinity where they never were."""
    direction = TRAINING if training else FORWARD
    rows = sorted((width, tokens) for width, kind, tokens in _told(gpu) if kind == direction and width >= head_dim)
    return rows[0][1] if rows else None


crossover._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _told(gpu: str) -> list[tuple[int, str, float]]:
    return [(width, kind, math.inf if tokens is None else tokens) for width, kind, tokens in _kept(gpu)]


@functools.cache
def _say(text: str) -> None:
    """Once."""
    warnings.warn(text, stacklevel=4)


def _gpu(x: torch.Tensor) -> str:
    return devices.current(x.device.index or 0).name if x.is_cuda else x.device.type


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, training: bool
) -> torch.Tensor | None:
    """Causal attention of as many keys as queries by features, or None where it is to be exact."""
    usual = q.ndim == k.ndim == v.ndim == 4 and q.shape[2:] == k.shape[2:] and k.shape[:3] == v.shape[:3]
    if not usual or q.shape[0] != k.shape[0] or not k.shape[1] or q.shape[1] % k.shape[1]:
        return None  # exact attention names what is wrong
    gpu, (n, width) = _gpu(q), q.shape[2:]
    tokens = crossover(gpu, width, training)
    if tokens is None:
        if not torch.compiler.is_compiling():
            _say(
                f'attention(approx="auto") is exact: nobody has measured from which length on features are faster for '
                f"heads of {width} on {gpu}; `tilebook bench crossover` does"
            )
        return None
    if n < tokens:
        return None
    if not torch.compiler.is_compiling():
        _say(
            f'attention(approx="auto") approximates causal softmax attention by {FEATURES} random features '
            f"(Performer), heads of {width}, from {tokens:.0f} tokens on; their expectation is exact, their variance "
            "grows with the length of queries and keys"
        )
    each = q.shape[1] // k.shape[1]
    if each > 1:
        k, v = (x.repeat_interleave(each, 1) for x in (k, v))
    if scale is not None:
        q = q * (scale * math.sqrt(width))
    o: torch.Tensor = linear_attention(q, k, v, feature_map=PERFORMER, causal=True)
    return o
