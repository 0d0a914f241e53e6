"""What a verdict's notes say of the search behind it: did it come to its end?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

DOUBT = 1.2
"""A prediction replaces the default where the model promises more than this. Over 78 problems measured on an H200 that
took 1.18–1.20 times as long as the best for attention; the model's first choice 1.19–1.37, the default 1.20–1.43."""

if TYPE_CHECKING:
    from tilebook.registry.overview import Shown


def observed(verdict: Shown) -> bool:
    """Did a running program come to it by timing its own calls? A tune knows better."""
    return "observed" in verdict.notes


def cut_short(verdict: Shown) -> bool:
    """Did the budget keep something out that another run would look at?"""
    searches: Any = verdict.notes.get("searches")
    names = list(searches) if isinstance(searches, dict) else []
    left_out = verdict.notes.get("unmeasured"), verdict.notes.get("unconfirmed")
    return any(left_out) or any(unfinished(verdict, name, 0) for name in names)


def unfinished(verdict: Shown, implementation: str, limit: int) -> bool:
    """Did the search behind a verdict end before its time, and would a run with this limit of candidates go on?"""
    searches: Any = verdict.notes.get("searches")
    its = searches.get(implementation) if isinstance(searches, dict) else None
    if not isinstance(its, dict):
        return False
    asked = its.get("asked")
    more = isinstance(asked, int) and asked < limit
    return its.get("ended") == "budget" or (its.get("ended") == "trials" and more)
