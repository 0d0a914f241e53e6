"""The real worker, verification and all, on the CPU: only its clock is made up. Run as a module by tests."""

import importlib
import sys
from typing import Any

import torch

from tilebook.tuner.process.child import serve
from tilebook.tuner.process.worker import Server


class Clock:
    """Bad candidates are the fastest, so that nothing but verification keeps them from winning."""

    def __init__(self, server: "CpuServer") -> None:
        self._server = server

    def estimate(self, call: Any) -> float:
        return self._server.time_ms

    def capture(self, call: Any, estimate_ms: float) -> "Clock":
        clock = Clock(self._server)
        clock.sample = lambda: estimate_ms  # type: ignore[method-assign]
        return clock

    def sample(self) -> float:
        raise NotImplementedError

    def samples(self, n: int) -> list[float]:
        return [self.sample() for _ in range(n)]


class CpuServer(Server):
    time_ms = 1.0

    def _claim(self, index: int) -> torch.device:
        return torch.device("cpu")

    def _make_bench(self, inputs: tuple[Any, ...], mode: str) -> Any:
        return Clock(self)

    def _call(self, message: Any) -> Any:
        kind, n = message["config"].get("kind", "good"), message["config"].get("n", 0)
        self.time_ms = 1.0 + n / 100 if kind == "good" else 0.5
        return super()._call(message)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    serve(CpuServer().handle)
