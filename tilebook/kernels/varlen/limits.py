"""The forms of packed sequences: lengths by bucket, and limits without those that hide nothing."""

from __future__ import annotations

WIDTHS = 32, 64, 128
"""Head dimensions at which our kernels were seen right on an H200 in any form: they serve without a verdict."""


def bucket(longest: int) -> int:
    """Rounded up to a power of two, so that packs whose longest sequences differ a little are one call to dispatch."""
    return 1 << max(0, longest - 1).bit_length()


def simplest(max_q: int, max_k: int, left: int, right: int, bottom_right: bool) -> tuple[int, int, bool]:
    """The same band in every sequence up to these lengths, without limits that hide nothing; -1 is no limit.

    No limits have no diagonal: it is called bottom-right then.
    """
    longest_left, longest_right = (max_k, max_q) if bottom_right else (max_q, max_k)
    left = -1 if left >= longest_left - 1 else max(left, -1)
    right = -1 if right >= longest_right - 1 else max(right, -1)
    return left, right, bottom_right or (left < 0 and right < 0)
