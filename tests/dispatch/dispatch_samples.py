"""Problems, verdicts and revocations for the tests of dispatch, and an op whose calls they can watch."""

from dataclasses import dataclass
from typing import Any

import torch
from flat_verdict import flat_verdict

from tilebook import device as devices
from tilebook import op as ops
from tilebook.op import Config, Cost, Op, Problem, Space
from tilebook.registry import Device, Environment, Revocation, VerdictStatus

GPU = devices.find("H200")
OP = ops.get("attention_fwd")

FUSED = OP.problem.parse("B4,H16,S2048,D64", "bf16")
"""PyTorch has a kernel for this one, so that only a verdict of its own serves it."""

COMPOSED = OP.problem.parse("B4,H16,S2048,D64,causal,window128x0", "bf16")
"""PyTorch composes this one, so that nearest verdicts and default configs serve it too."""


def config_after(problem, *taken):
    """A config that runs this problem and is none of those taken."""
    return next(c for c in OP.tunable.space.feasible(problem, GPU) if c not in taken)


DEFAULT = OP.tunable.space.default(FUSED, GPU)
OTHER = config_after(FUSED, DEFAULT)
RUNNER_UP = config_after(FUSED, DEFAULT, OTHER)

COMPOSED_DEFAULT = OP.tunable.space.default(COMPOSED, GPU)
COMPOSED_OTHER = config_after(COMPOSED, COMPOSED_DEFAULT)

RANKED = {
    "candidates": [
        {"implementation": "triton", "config": dict(OTHER), "time_ms": 1.0},
        {"implementation": "triton", "config": dict(RUNNER_UP), "time_ms": 1.1},
        {"implementation": "torch", "config": {}, "time_ms": 1.2},
    ]
}


def verdict(problem=FUSED, config=OTHER, implementation="triton", **changes):
    fields = {
        "op": OP.name,
        "problem": problem.key,
        "device": Device(GPU.name, GPU.arch, GPU.sm_count),
        "environment": Environment({"triton": "3.6.0"}),
        "kernel": OP.digest,
        "status": VerdictStatus.MEASURED,
        "implementation": implementation,
        "config": dict(config),
        "time_ms": 1.0,
        "default_time_ms": 2.0,
        "speedup": 2.0,
        "speedup_low": 1.9,
        "speedup_high": 2.1,
    }
    return flat_verdict(**{**fields, **changes})


def composed(**changes):
    """A verdict for what PyTorch composes."""
    return verdict(**{"problem": COMPOSED, "config": COMPOSED_OTHER, **changes})


def revocation(config=OTHER, implementation="triton", **changes):
    return Revocation(**{"op": OP.name, "reason": "wrong", **changes}, implementation=implementation, config=config)


SECOND = Config(TILE=2)


def second(q, k, v, form, scale, *extras, config):
    """Another implementation of attention."""
    return q, q


def second_as_it_was(q, k, v, form, scale, *extras, config):
    return q, k


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    gpu = 0

    @property
    def is_cuda(self):
        return True

    @property
    def device(self):
        return torch.device("cuda", self.gpu)

    def get_device(self):
        return self.gpu


class OnSecondGpu(OnGpu):
    gpu = 1


def on_gpu(x, kind=OnGpu):
    return x.as_subclass(kind)


@dataclass(frozen=True)
class Doubling(Problem):
    """y = 2 x for a matrix x."""

    dtype: str
    n: int = ops.size("N")

    @classmethod
    def of(cls, x: torch.Tensor, *_: Any) -> "Doubling":
        return cls(ops.dtype_name(x.dtype), x.numel())

    def cost(self) -> Cost:
        return Cost(self.n, 8.0 * self.n)


def _double(x, *rest):
    return (2 * x.as_subclass(torch.Tensor),)


def doubling(ours, theirs=_double, *, fused=False):
    """An op that doubles, by `ours(x, config=…)` and by PyTorch's `theirs(x)`; `ran` lists what ran."""
    made = Op("doubling", Doubling, _double, "fwd", lambda problem: fused)
    made.ran = []

    def triton(x, *rest, config):
        made.ran.append("triton")
        return ours(x, *rest, config=config)

    def plain(x, *rest):
        made.ran.append("torch")
        return theirs(x, *rest)

    made.implementation("triton", space=Space({"TILE": (1, 2)}, lambda *_: None, lambda *_: Config(TILE=1)))(triton)
    made.implementation("torch")(plain)
    return made
