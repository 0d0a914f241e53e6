"""Dispatch as on an H200, whose only registry holds what a test gives it."""

import dataclasses

import dispatch_samples
import pytest
import torch
from dispatch_samples import FUSED, GPU, OP, RANKED, SECOND, verdict
from probing_samples import Program

from tilebook import device as devices
from tilebook.dispatch import Dispatch
from tilebook.op import Config, Space
from tilebook.registry import Registry


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """An H200 without a registry; the path where one would lie."""
    path = tmp_path / "registry.db"
    monkeypatch.setenv("TILEBOOK_REGISTRY", str(path))
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", tmp_path / "none.db")
    monkeypatch.setattr(devices, "current", lambda index=0: GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return path


@pytest.fixture
def choose(gpu):
    """Chooses with a registry of these verdicts, and of those given before."""

    def chosen(*verdicts, problem=FUSED, revocations=(), op=OP):
        chosen.here = Dispatch()
        with Registry.open(gpu, write=True) as registry:
            registry.merge((), verdicts, revocations)
        return chosen.again(problem, op)

    def again(problem=FUSED, op=OP):
        """As another call of the same program."""
        return chosen.here.choose(op, problem, torch.device("cuda", 0))

    chosen.path, chosen.again, chosen.here = gpu, again, Dispatch()
    return chosen


@pytest.fixture
def here(gpu):
    """A program's dispatch, with an empty registry."""
    with Registry.open(gpu, write=True):
        return Dispatch()


@pytest.fixture
def second(monkeypatch):
    """Another implementation with a space, for the time of a test; returns a verdict that it won, ours next."""
    monkeypatch.setattr(OP, "implementations", dict(OP.implementations))
    space = Space({"TILE": (1, 2)}, lambda *_: None, lambda *_: Config(TILE=1))
    made = OP.implementation("second", space=space)(dispatch_samples.second)

    def won(problem=FUSED, **evidence):
        kernels = {"triton": OP.digest, "second": made.digest}
        evidence = {"kernels": kernels, **RANKED, **evidence}
        return verdict(problem=problem, implementation="second", config=SECOND, evidence=evidence)

    won.made, won.before = made, dataclasses.replace(made, function=dispatch_samples.second_as_it_was)
    return won


@pytest.fixture
def program(gpu, monkeypatch):
    monkeypatch.setattr("tilebook.dispatch.choice.record", lambda run, args: (run(*args), None))

    def make(*args, **options):
        make.count += 1
        path = gpu.with_name(f"{make.count}.db")
        monkeypatch.setenv("TILEBOOK_REGISTRY", str(path))
        made = Program(path, *args, **options)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
        return made

    make.count = 0
    return make
