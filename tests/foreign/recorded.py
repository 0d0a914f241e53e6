"""Records a call of a kernel in this process, and tunes records through the real session on an interpreter."""

from contextlib import contextmanager

from fakes import ENVIRONMENT, GPU, FakePool

from tilebook.foreign.offered import offered
from tilebook.foreign.record import Recording
from tilebook.foreign.wrap import noting
from tilebook.registry import Layers
from tilebook.tuner.known import Known
from tilebook.tuner.process.runner import GpuRunner, Limits
from tilebook.tuner.progress import Run
from tilebook.tuner.session import Options, Session
from tilebook.tuner.shards import tune_all


@contextmanager
def recording(folder):
    """Inside the block all calls of autotuned kernels are recorded, into the folder when it ends."""
    made = Recording(folder)
    with noting(made):
        yield made
    made.write()


class OneProcess(GpuRunner):
    """Starts none that is not needed: what fresh ones and spares are for has tests of its own. Its process interprets
    from the start, so that it may begin as a copy of one that has loaded Triton so."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._child._env["TRITON_INTERPRET"] = "1"

    def confirm(self, candidates, rounds, seed, *, fresh=False):
        return super().confirm(candidates, rounds, seed)

    def _start_spare(self):
        pass


def tune(folder, registry, rules=None, **limits):
    """The states of the record's problems."""
    layers = Layers([("explicit", str(registry))])
    runner = OneProcess(0, limits=Limits(**{"attempt_s": 60.0, **limits}), worker="interpreted_worker")
    with offered(folder, rules) as offer, layers.writer() as writer:
        run = Run(len(offer.problems), True)
        known = Known(writer, layers, GPU, ENVIRONMENT, "graph")
        session = Session(GPU, known, FakePool(), runner, Options(method="grid", rounds=5), run)
        try:
            return tune_all([session], offer.problems, run)
        finally:
            runner.close()
