"""What the numbers of a problem must keep among themselves, by kernel family. Each raises UsageError.

Apart from the families, so that a command that imports records asks without loading PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tilebook.errors import UsageError


def attention(problem: Any) -> None:
    _grouped(problem)
    if not 16 <= problem.head_dim <= 256:
        raise UsageError(f"head dimension {problem.head_dim} lies outside 16 … 256")


def decode(problem: Any) -> None:
    _grouped(problem)
    if problem.head_dim % 8 or not 16 <= problem.head_dim <= 256:
        raise UsageError(f"head dimension {problem.head_dim} is not a multiple of 8 from 16 to 256")
    if problem.seq_q > 16:
        raise UsageError(f"{problem.seq_q} query rows are more than 16: that is what attention is for")
    if problem.cache != "contiguous" and problem.ragged:
        raise UsageError("paged sequences have lengths of their own anyway: leave out ragged")


MOST_SEQUENCES = 1 << 16
"""Of a packed batch: what each costs is counted one by one."""


def varlen(problem: Any) -> None:
    attention(problem)
    if problem.batch > MOST_SEQUENCES:
        raise UsageError(f"{problem.batch} packed sequences are more than {MOST_SEQUENCES}")
    for total, longest in ((problem.total_q, problem.max_q), (problem.total_k, problem.max_k)):
        if not longest <= total <= problem.batch * longest:
            raise UsageError(f"{problem.batch} sequences of up to {longest} tokens cannot have {total} together")


def rope(problem: Any) -> None:
    if problem.rotated % 2 or problem.rotated > problem.head_dim:
        raise UsageError(f"{problem.rotated} rotated numbers are not an even part of {problem.head_dim}")


def linear_attention(problem: Any) -> None:
    if not (1 <= problem.head_dim <= 256 and 1 <= problem.value_dim <= 256):
        raise UsageError(f"head dimensions {problem.head_dim} and {problem.value_dim} do not lie in 1 … 256")


def bidirectional(problem: Any) -> None:
    linear_attention(problem)
    if not 1 <= problem.features <= 256:
        raise UsageError(f"{problem.features} features do not lie in 1 … 256")
    if problem.feature_map != "performer" and problem.features != problem.head_dim:
        raise UsageError(f"{problem.feature_map} makes {problem.head_dim} features of a row, not {problem.features}")


def _grouped(problem: Any) -> None:
    if problem.heads % problem.heads_kv:
        raise UsageError(f"{problem.heads} query heads are not a multiple of {problem.heads_kv} key/value heads")


OF: Mapping[str, Callable[[Any], None]] = {
    "attention": attention,
    "bidirectional": bidirectional,
    "channel_decay": linear_attention,
    "decode": decode,
    "delta_rule": linear_attention,
    "linear_attention": linear_attention,
    "mlstm": linear_attention,
    "rope": rope,
    "varlen": varlen,
}
"""Family → what its problems keep; any numbers will do for those that are not named."""
