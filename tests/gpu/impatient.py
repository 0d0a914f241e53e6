"""The command line for kernels that take microseconds: what does not answer for so long hangs. Run as a script."""

from functools import partial

from tilebook.cli import main
from tilebook.tuner import run
from tilebook.tuner.process.runner import GpuRunner, Limits

ATTEMPT_S = 15.0  # of 90, of which 60 are for compilers: these kernels are compiled ahead

if __name__ == "__main__":
    run.GpuRunner = partial(GpuRunner, limits=Limits(attempt_s=ATTEMPT_S))
    main()
