"""Which verdicts speak of the kernels as they are now: asked by dispatch, and by all that says what dispatch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Sourced(Protocol):
    """What of a verdict, whole or as served, names the sources that it was made with."""

    @property
    def kernel(self) -> str: ...

    def source_of(self, implementation: str) -> str: ...


def stands(verdict: Sourced, kernel: str) -> bool:
    """Is the op's own kernel, whose digest is `kernel`, the one that the verdict compared everything with?"""
    return verdict.kernel == kernel


def may_run(verdict: Sourced, implementation: str, digest: str | None) -> bool:
    """Is this finalist what was measured? digest: of the implementation's source now; "" where it is not ours, whose
    version is no reason against it; None where there is no such implementation any more."""
    return digest is not None and digest in ("", verdict.source_of(implementation))


def retired(verdict: Sourced, winner: str, kernel: str | None, digest_of: Callable[[str], str | None]) -> bool:
    """Is the verdict, or its winner, of other source than there is now, so that the winner is not served?

    kernel: the digest of the op's own kernel, None where there is no such op. digest_of: as `may_run` takes it.
    """
    return kernel is None or not (stands(verdict, kernel) and may_run(verdict, winner, digest_of(winner)))
