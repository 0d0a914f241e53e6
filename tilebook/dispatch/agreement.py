"""Processes of one distributed program choose alike: what the first of them has chosen for a problem is every one's.

Processes may read their registries at different times, while somebody tunes, or have different ones. They agree through
the key-value store by which `torch.distributed` has brought them together: whoever asks first, decides. So nobody waits
for another process's call, whichever of them ever makes it.
"""

from __future__ import annotations

import json
import sys
import warnings
import weakref
from typing import Any

from tilebook.device import Device
from tilebook.op import Op, Problem

Told = tuple[str, dict[str, Any] | None, str, str]
"""An implementation, its config, why it was chosen, and the digest of its source."""


_ANNOUNCED = "tilebook announced"
"""How many outcomes have been announced, and with a number behind it one of them."""


class Agreement:
    """What this process has to keep to, in the process group that is there now, if any is."""

    def __init__(self) -> None:
        self._group: Any = None  # a weak reference: the group's store must end with it, or the next one finds it there
        self._store: Any = None
        self._decided: dict[str, Told] = {}
        self._announced = 0
        self.leads = True
        """Is this the process that finds out for all? Without a group each does for itself."""

    def begun(self) -> bool:
        """Has a process group of several been made since this was last asked, so that what was chosen may differ?"""
        group = _group()
        if group is (None if self._group is None else self._group()):
            return False
        self._group, self._decided = None if group is None else weakref.ref(group), {}
        self._store, self._announced = None if group is None else _store(group), 0
        self.leads = self._store is None or group.rank() == 0
        return self._store is not None

    def settle(self, op: Op[Any], problem: Problem, gpu: Device, mine: Told) -> Told:
        """What is decided for a problem on GPUs of this model: mine, if nobody has yet, or nobody can be asked."""
        if self._store is None:
            return mine
        key = _key(op, problem, gpu)
        if key not in self._decided:
            try:
                name, config, source, digest = json.loads(self._store.compare_set(key, "", json.dumps(mine)))
            except Exception as broken:  # the process that keeps the store may be gone
                self._lost(broken)
                return mine
            self._decided[key] = name, config, source, digest
        return self._decided[key]

    def announce(self, op: Op[Any], problem: Problem, gpu: Device, told: Told) -> None:
        """The process that leads has found out what serves best: it does from now on, and elsewhere once it is heard.

        Nobody waits for that.
        """
        if self._store is None:
            return
        key = _key(op, problem, gpu)
        self._decided[key] = told
        try:
            self._announced += 1
            self._store.set(f"{_ANNOUNCED} {self._announced}", json.dumps([op.name, problem.key, key, told]))
            self._store.add(_ANNOUNCED, 1)
        except Exception as broken:
            self._lost(broken)

    def heard(self) -> list[tuple[str, str]]:
        """Op and problem of what was announced since this was last asked: it is decided so from now on."""
        found: list[tuple[str, str]] = []
        try:
            while self._store is not None and self._announced < self._store.add(_ANNOUNCED, 0):
                self._announced += 1
                op, problem, key, told = json.loads(self._store.get(f"{_ANNOUNCED} {self._announced}"))
                self._decided[key] = tuple(told)
                found.append((op, problem))
        except Exception as broken:
            self._lost(broken)
        return found

    def _lost(self, broken: Exception) -> None:
        self._store = None
        warnings.warn(
            f"tilebook: processes cannot agree on kernels ({type(broken).__name__}: {str(broken)[:200]}); "
            "each chooses by itself",
            RuntimeWarning,
            stacklevel=5,
        )


def _key(op: Op[Any], problem: Problem, gpu: Device) -> str:
    return json.dumps(["tilebook", op.name, op.digest, problem.key, gpu.identity])


def _group() -> Any:
    """The process group that is there now, if any is."""
    distributed = sys.modules.get("torch.distributed.distributed_c10d")
    return None if distributed is None else distributed.GroupMember.WORLD


def _store(group: Any) -> Any:
    """A connection of our own to the store of a group; None for a group of a single process, or a pretended one.

    The group's own would wait for whatever another thread waits for there.
    """
    from torch.distributed import distributed_c10d

    try:
        if group.size() < 2 or distributed_c10d.get_backend(group) == "fake":
            return None
        store: Any = distributed_c10d._get_default_store()
        return store.clone()
    except Exception:  # it is gone already, or its store cannot be shared
        return None
