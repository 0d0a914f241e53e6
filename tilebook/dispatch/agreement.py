"""Processes of one distributed program choose alike: what the first of them has chosen for a problem is every one's.

Processes may read their registries at different times, while somebody tunes, or have different ones. They agree through
the key-value store by which `torch.distributed` has brought them together: whoever asks first, decides. So nobody waits
for another, whichever of them ever makes the call.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

from tilebook.device import Device
from tilebook.op import Op, Problem

Told = tuple[str, dict[str, Any] | None, str, str]
"""An implementation, its config, why it was chosen, and the digest of its source."""


class Agreement:
    """What this process has to keep to, in the process group that is there now, if any is."""

    def __init__(self) -> None:
        self._store: Any = None
        self._failed = False

    def begun(self) -> bool:
        """Has a process group of several been made since this was last asked, so that what was chosen may differ?"""
        store = _store()
        if store is self._store:
            return False
        self._store, self._failed = store, False
        return store is not None

    def settle(self, op: Op[Any], problem: Problem, gpu: Device, mine: Told) -> Told:
        """What is decided for a problem on GPUs of this model: mine, if nobody has yet, or nobody can be asked."""
        if self._store is None or self._failed:
            return mine
        key = json.dumps(["tilebook", op.name, op.digest, problem.key, gpu.identity])
        try:
            name, config, source, digest = json.loads(self._store.compare_set(key, "", json.dumps(mine)))
            return name, config, source, digest
        except Exception as broken:  # the process that keeps the store may be gone
            self._failed = True
            warnings.warn(
                f"tilebook: processes cannot agree on kernels ({type(broken).__name__}: {str(broken)[:200]}); each "
                "chooses by itself",
                RuntimeWarning,
                stacklevel=4,
            )
            return mine


def _store() -> Any:
    """The store of the process group that is there; None without one, or with one of a single process."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    if distributed.get_world_size() < 2:
        return None
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
