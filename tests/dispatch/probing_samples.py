"""A host and a GPU that only keep time, and a program on them whose calls may be probed."""

import contextlib
import functools
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from dispatch_samples import GPU, Doubling, OnGpu, doubling, on_gpu, verdict

from tilebook import op as ops
from tilebook.dispatch import Dispatch
from tilebook.dispatch.probing import Prober
from tilebook.op import Cost
from tilebook.registry import Registry


@dataclass(frozen=True)
class Large(Doubling):
    """One that a GPU takes 40 µs for at least."""

    def cost(self):
        return Cost(1.0, 40e-6 * GPU.bandwidth)

    def inputs(self, device, seed):
        return (torch.randn(self.n, generator=ops.generator(device, seed), device=device),)


def noise():
    """Random numbers between 0 and 1, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.rand(4096, generator=generator).tolist()


class Machine:
    """A host and a GPU that works behind it, and their clock."""

    def __init__(self):
        self.host_s, self.gpu_s, self.noise = 0.0, 0.0, noise()

    def now(self):
        self.host_s += 1e-7
        return self.host_s

    def work(self, gpu_s, host_s=20e-6):
        self.host_s += host_s
        self.gpu_s = max(self.gpu_s, self.host_s) + gpu_s * (1 + 0.03 * next(self.noise))

    def event(self, like):
        assert isinstance(like, OnGpu)
        at, machine = max(self.gpu_s, self.host_s), self
        return SimpleNamespace(query=lambda: machine.host_s >= at, at=at, elapsed_time=lambda end: 1e3 * (end.at - at))

    def room(self, like, size):
        return True

    @contextlib.contextmanager
    def aside(self, like):
        yield torch.device("cpu")


@functools.cache
def given(n):
    """What a call has, and twice that."""
    return on_gpu(torch.arange(float(n))), 2 * torch.arange(float(n))


class Program:
    """Calls an op of the size 64; PyTorch's own takes 100 µs, ours `ours_s`, by a verdict on the size 96."""

    def __init__(self, path, ours_s, wrong=lambda: False, own_s=100e-6, broken=None, known=(96,)):
        self.machine, self.capturing, self.broken, self.waits_s = Machine(), False, broken, 0.0
        self.op = op = doubling(lambda x, config: self.ours(x, config), lambda x: self.own(x), fused=True)
        op.problem = Large
        op.implementations["triton"].__dict__["digest"] = "a" * 64
        self.ours_s, self.own_s, self.wrong, self.verifying = ours_s, own_s, wrong, False
        self.problem = Large("fp32", 64)
        with Registry.open(path, write=True) as registry:
            registry.merge((), [self.verdict(n) for n in known])
        self.here, self.path, self.compiled = Dispatch(), path, []
        self.prober = self.fresh()

    def fresh(self):
        made = Prober(self.here, self.machine, self.compile)
        self.here.begin_probing(made)
        return made

    def verdict(self, n, **changes):
        given = {"op": self.op.name, "problem": Large("fp32", n), "kernel": self.op.digest, "config": {"TILE": 2}}
        return verdict(**{**given, **changes})

    def compile(self, *candidate):
        self.compiled.append(candidate)
        done = Future()
        done.set_result(SimpleNamespace(failure=None, reason=""))
        return done

    def ours(self, x, config):
        if self.broken is not None and not self.broken():
            raise RuntimeError("no such instruction")
        self.machine.work(self.ours_s[config["TILE"]] if isinstance(self.ours_s, dict) else self.ours_s)
        x = x.as_subclass(torch.Tensor)
        return (x * 3 if self.wrong() else x * 2,)

    def own(self, x):
        self.machine.work(self.own_s)
        return (2 * x.as_subclass(torch.Tensor),)

    def call(self, n=64):
        x, doubled = given(n)
        (y,) = self.here.run(self.op, x)
        assert torch.equal(y.as_subclass(torch.Tensor), doubled)

    def run(self, calls, gap_s=1e-3, n=64):
        """So many calls with other work between."""
        for _ in range(calls):
            self.machine.work(gap_s / 2, gap_s / 2)
            self.machine.host_s += self.waits_s
            self.machine.host_s = max(self.machine.host_s, self.machine.gpu_s - 5e-3)  # what a queue holds
            if int(self.machine.host_s / 0.25) != int((self.machine.host_s - gap_s) / 0.25):
                self.prober.tick()
            self.call(n)

    @property
    def serves(self):
        choice = self.here.choose(self.op, self.problem, torch.device("cuda", 0))
        return choice.implementation.name, choice.source

    def kept(self):
        self.prober.close()
        with Registry.open(self.path) as registry:
            return [each for each in registry.verdicts() if each.problem == self.problem.key]
