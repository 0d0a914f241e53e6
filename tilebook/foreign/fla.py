"""Verdicts as flash-linear-attention reads them: a JSON file for each kernel, in a folder for each GPU model."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tilebook.errors import UsageError
from tilebook.foreign import ops
from tilebook.foreign.kernel import split
from tilebook.foreign.names import is_foreign
from tilebook.registry.verdict import Verdict


def files(verdicts: Iterable[Verdict]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """File name → content, of the trusted and measured verdicts on kernels of others; and what was left out, and why.

    The default of a kernel is what won most of its keys. The format has no place for a GPU: Raises UsageError where
    the verdicts are of several models.
    """
    found: dict[str, dict[str, Any]] = {}
    left_out: list[str] = []
    chosen = [each for each in verdicts if is_foreign(each.op) and each.trusted and each.measured]
    if len(models := sorted({each.device.name for each in chosen})) > 1:
        raise UsageError(f"a folder is of one GPU model: choose with --gpu among {', '.join(models)}")
    for verdict in chosen:
        try:
            kernel = ops.get(verdict.op).problem.OF.kernel
        except UsageError as wrong:
            left_out.append(str(wrong))
            continue
        if kernel.digest != verdict.kernel:
            left_out.append(f"{verdict.op}: its source is another now")
            continue
        key = _key(json.loads(verdict.problem), kernel.tuner.keys)
        name = kernel.function.__name__
        triton = verdict.environment.versions.get("triton")
        file = found.setdefault(f"{name}.json", {"kernel_name": name, "triton_version": triton, "autotune_entries": {}})
        entry = {"autotune_key": key, "config": _config(verdict.config)}
        file["autotune_entries"][_hash(key)] = entry
    for file in found.values():
        configs = Counter(json.dumps(each["config"], sort_keys=True) for each in file["autotune_entries"].values())
        file["default_config"] = json.loads(configs.most_common(1)[0][0])
    return found, left_out


def _key(problem: Mapping[str, Any], names: Iterable[str]) -> list[Any]:
    """The autotuner's own key, in its order."""
    values = problem["key"]
    ordered = [name for name in names if name in values] or sorted(values, key=lambda name: int(name[1:]))
    return [*(values[name] for name in ordered), *split(problem["dtype"])]


def _hash(key: Any) -> str:
    text = json.dumps(key, separators=(",", ":"), sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "num_ctas": 1, "maxnreg": None}
    options |= {name: config[name] for name in options if name in config}
    return {"kwargs": {name: v for name, v in config.items() if name not in options}, **options, "ir_override": None}
