"""Which verdicts and trials are of kernels as they were."""

from __future__ import annotations

from typing import Protocol

from tilebook import inventory
from tilebook.registry.current import Sourced, retired


class _Verdict(Sourced, Protocol):
    """What of a verdict, whole or not, says whether its winner is served."""

    @property
    def op(self) -> str: ...

    @property
    def implementation(self) -> str: ...


def is_retired(verdict: _Verdict) -> bool:
    """Is the winner not served, because its source or that of the op's own kernel is another now?"""
    op = inventory.find(verdict.op)
    if op is not None and not op.digest:
        return False  # whoever serves it looks at the source
    return op is None or retired(verdict, verdict.implementation, op.digest, op.digest_of)


def is_retired_trial(trial: _Verdict) -> bool:
    """Is it of source that is another now? Of what is not ours nobody knows; its version counts when it is tuned."""
    op = inventory.find(trial.op)
    digest = None if op is None else op.digest_of(trial.implementation)
    return digest is None or digest not in ("", trial.kernel)
