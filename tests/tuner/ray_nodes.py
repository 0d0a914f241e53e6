"""A Ray cluster of several nodes on this machine, for tests and benchmarks."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tilebook
from tilebook.tuner.process.processes import marked

_STARTS_S = 120.0


class Nodes:
    """The head has neither cores nor GPUs; nodes are added by name, and killed. Each has its name as TOY_NODE in its
    environment, and so have all of its processes."""

    def __init__(self, folder: str) -> None:
        from ray.cluster_utils import Cluster

        # Where Ray writes the newest cluster's address, whatever folder it is given, and which only `ray start` makes.
        Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray").mkdir(exist_ok=True)
        self._options = {"include_dashboard": False, "object_store_memory": 80 << 20, "temp_dir": folder}
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, **self._options})
        self._nodes: dict[str, Any] = {}
        self.address: str = self._cluster.address

    def add(self, name: str, cpus: int = 1, gpus: int = 0, **environment: str) -> None:
        # Only the main thread may set handlers of signals; what another adds is left to `clear`.
        self._cluster._shutdown_at_exit = threading.current_thread() is threading.main_thread()
        self._nodes[name] = self._cluster.add_node(
            num_cpus=cpus, num_gpus=gpus, node_name=name, env_vars={"TOY_NODE": name, **environment}, **self._options
        )

    def kill(self, name: str) -> None:
        """As if its machine were gone."""
        for pid in marked(f"TOY_NODE={name}".encode()):
            os.kill(pid, signal.SIGKILL)

    def clear(self) -> None:
        """Ends all nodes but the head, and returns when the cluster knows."""
        while self._nodes:
            self._cluster.remove_node(self._nodes.popitem()[1])
        self._cluster.wait_for_nodes(_STARTS_S)

    def close(self) -> None:
        self.clear()
        self._cluster.shutdown()


@contextmanager
def ray_nodes() -> Iterator[Nodes]:
    """The cluster, while the block lasts; what its nodes import is what this process would."""
    paths = [str(Path(tilebook.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    wanted = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TILEBOOK_REGISTRY": "/nonexistent/only-the-driver-writes.db",
    }
    before = {name: os.environ.get(name) for name in wanted}
    # Short, as sockets are in it, and not the default, which another cluster may use.
    folder = tempfile.mkdtemp(prefix="tbray-", dir="/tmp")
    try:
        os.environ.update(wanted)
        nodes = Nodes(folder)
        try:
            yield nodes
        finally:
            nodes.close()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)
