"""The real worker on other people's kernels, in Triton's interpreter: only its clock is made up. Run as a module."""

import os
from typing import Any

import torch
from interpreter import mended

from tilebook.tuner.process import worker
from tilebook.tuner.process.child import serve


class Clock:
    """Bad configs are the fastest, so that nothing but verification keeps them from winning; then large blocks."""

    time_ms = 1.0

    def estimate(self, call: Any) -> float:
        return self.time_ms

    def capture(self, call: Any, estimate_ms: float) -> "Clock":
        made = Clock()
        made.time_ms = estimate_ms
        return made

    def sample(self) -> float:
        return self.time_ms

    def samples(self, n: int) -> list[float]:
        return [self.time_ms] * n


class Interpreted(worker.Server):
    clock = Clock()

    def _claim(self, index: int) -> torch.device:
        return torch.device("cpu")

    def _make_bench(self, inputs: tuple[Any, ...], mode: str) -> Any:
        return self.clock

    def _call(self, message: Any) -> Any:
        config = message["config"]
        self.clock.time_ms = 1e-4 if config.get("FAULT") else 1.0 / config.get("BLOCK", config.get("TILE_M", 1))
        return super()._call(message)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    worker.FINAL_REPEATS = 8
    with mended():
        serve(Interpreted().handle)
