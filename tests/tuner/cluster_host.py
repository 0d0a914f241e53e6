"""Hosts of a Ray cluster whose GPUs answer from a formula. Imported by the cluster's workers by name.

A node's environment says what its GPUs are: TOY_GPU, the model; TOY_KERNELS, that kernels there are another version's;
TOY_DEADLY, a file: where there is none, the problem `DEADLY` makes it and kills its host.
"""

import os
import signal
import time
from pathlib import Path

from fakes import FakePool, FakeRunner
from test_session import valley
from toy import make_op

from tilebook import device as devices
from tilebook import op as ops
from tilebook.tuner.cluster.host import Host

DEADLY = "M128,H64"


def _another(x, *, config):
    return 3 * x


class ToyRunner(FakeRunner):
    """Without noise, and slow enough for a run to be met in the middle."""

    def __init__(self) -> None:
        super().__init__(valley, noise=0.0)
        self._deadly, self._begun = False, 0

    def prepare(self, op, problem):
        self._begun = len(self.attempted)
        self._deadly = problem.label == DEADLY

    def attempt(self, candidate, most_ms):
        time.sleep(0.01)
        mark = Path(os.environ.get("TOY_DEADLY", "/"))
        if self._deadly and len(self.attempted) - self._begun >= 6 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().attempt(candidate, most_ms)


class ToyHost(Host):
    def __init__(self, gpu, mode, workers):
        ops._OPS["scaling_fwd"] = make_op(_another if "TOY_KERNELS" in os.environ else None)
        super().__init__(gpu, mode, workers)

    def here(self):
        return devices.find(os.environ["TOY_GPU"])

    def compilers(self, workers):
        return FakePool()

    def measurer(self, mode):
        return ToyRunner()
