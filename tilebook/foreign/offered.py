"""What a record offers to a tune: the problems of its kernels, heaviest first, also to the processes that measure."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tilebook.errors import UsageError
from tilebook.foreign import ops, record
from tilebook.foreign.kernel import op_name
from tilebook.foreign.record import Entry
from tilebook.op import Op, Problem

_MOST_TOLD = 5  # kernels in a warning
_BYTES_S = 1e12  # by which bytes moved become seconds: problems are compared with each other alone


@dataclass
class Offer:
    """weights: what the problems are worth, in seconds. left_out: kernels that cannot be had, with the reason.
    zeros: by kernel, the integer tensors that no rule speaks of."""

    problems: list[tuple[Op[Any], Problem]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    zeros: dict[str, list[str]] = field(default_factory=dict)

    def warning(self) -> str:
        """What a tune of these kernels would not see; "" for nothing."""
        told = [f"{op} ({', '.join(names)})" for op, names in sorted(self.zeros.items())]
        if not told:
            return ""
        more = f" and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else ""
        which = "; ".join(told[:_MOST_TOLD]) + more
        return f"no fault in where a kernel reads shows on integers that are all zeros: {which}; --rules says more"


@contextmanager
def offered(place: Path, rules: Path | None = None, wanted: Collection[str] | None = None) -> Iterator[Offer]:
    """The problems of a record, a file or a folder of files; while the block lasts other processes know them by name.

    rules: a file that says how integer tensors are made, kernel → argument → rule. wanted: only the kernels of these
    names are imported. Raises UsageError.
    """
    ruled, offer = record.rules(rules), Offer()
    known, found = [], []
    for entry in record.read(place):
        if wanted is not None and op_name(entry.module, entry.name) not in wanted:
            continue
        try:
            op = ops.add(entry, ruled)
        except UsageError as wrong:
            offer.left_out.append(str(wrong))
            continue
        known.append(entry)
        if names := _zeros(entry, op.problem.OF.rules):
            offer.zeros[op.name] = names
        found += [(problem.weight / _BYTES_S, op, problem.key) for problem in entry.problems.values()]
    for weight, op, key in sorted(found, key=lambda each: -each[0]):
        offer.problems.append((op, op.problem.from_key(key)))
        offer.weights.append(weight)
    before = os.environ.get(ops.RECORDED)
    with tempfile.TemporaryDirectory(prefix="tilebook-") as folder:
        record.write(Path(folder) / ops.RECORD, known)
        (Path(folder) / ops.RULES).write_text(json.dumps(ruled), encoding="utf-8")
        os.environ[ops.RECORDED] = folder
        try:
            yield offer
        finally:
            os.environ.pop(ops.RECORDED)
            if before is not None:
                os.environ[ops.RECORDED] = before


def _zeros(entry: Entry, ruled: Collection[str]) -> list[str]:
    """The tensors of a kernel that begin with zeros for want of a rule."""
    calls = [call for problem in entry.problems.values() for call in problem.calls]
    whole = {
        name: not (each.torch_dtype.is_floating_point or each.torch_dtype is torch.bool) and not each.same
        for call in calls
        for name, each in call.tensors.items()
    }
    return [name for name, integers in whole.items() if integers and name not in ruled]
