"""`tilebook tune` with an interpreter in the place of the GPU: everything but clock and compilers is real."""

from contextlib import contextmanager

from fakes import GPU, FakePool
from recorded import OneProcess

from tilebook import device as devices
from tilebook.cli import main
from tilebook.tuner import run


@contextmanager
def pool(device, workers):
    made = FakePool()
    made.start = lambda: None
    yield made


def pretend():
    devices.present, devices.current = lambda: True, lambda index=0: GPU
    run.torch.cuda.device_count = lambda: 1
    run.GpuRunner = lambda index, mode: OneProcess(index, mode, worker="interpreted_worker")
    run.CompilePool = pool


if __name__ == "__main__":
    pretend()
    main()
