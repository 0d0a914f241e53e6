"""Processes of one distributed program choose alike."""

import json
import textwrap
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from dispatch_samples import COMPOSED, COMPOSED_OTHER, FUSED, GPU, OP, OTHER, RANKED, RUNNER_UP, verdict
from processes import ranks

from tilebook.dispatch import Dispatch, agreement
from tilebook.registry import Registry, Revocation

GPU_0 = torch.device("cuda", 0)


class Group:
    """Stands for a process group."""

    def rank(self):
        return 0


@pytest.fixture
def store(monkeypatch):
    """The store of a process group, as long as there is one."""
    there, groups = [dist.HashStore()], {}
    monkeypatch.setattr(agreement, "_group", lambda: there[0] and groups.setdefault(id(there[0]), Group()))
    monkeypatch.setattr(agreement, "_store", lambda group: there[0])
    return there


@pytest.fixture
def process(gpu, tmp_path, monkeypatch):
    """Chooses as another process would, whose registry holds these verdicts."""
    count = 0

    def choose(*verdicts, problem=FUSED, here=None, revocations=()):
        nonlocal count
        if here is None:
            count += 1
            path = tmp_path / f"{count}.db"
            with Registry.open(path, write=True) as registry:
                registry.merge((), verdicts, revocations)
            monkeypatch.setenv("TILEBOOK_REGISTRY", str(path))
            here = Dispatch()
        choice = here.choose(OP, problem, GPU_0)
        return here, (choice.implementation.name, choice.config, choice.source)

    return choose


def test_who_asks_first_decides(process, store):
    first, decided = process(verdict(evidence=RANKED))
    assert decided == ("triton", OTHER, "exact")
    assert process()[1] == decided  # without a verdict it would be PyTorch's
    assert process(verdict(config=RUNNER_UP))[1] == decided
    assert process(here=first)[1] == decided


def test_each_problem_is_decided_by_itself(process, store):
    here, decided = process()
    assert decided[0] == "torch"
    _, composed = process(verdict(problem=COMPOSED, config=COMPOSED_OTHER), problem=COMPOSED)
    assert composed == ("triton", COMPOSED_OTHER, "exact")
    assert process(here=here, problem=COMPOSED)[1] == composed


def test_without_a_process_group_each_chooses_by_itself(process, store):
    store[0] = None
    assert process(verdict())[1][0] == "triton"
    assert process()[1][0] == "torch"


def test_what_was_chosen_before_is_chosen_again_once_there_is_a_group(process, store, monkeypatch):
    group, store[0] = store[0], None
    here, alone = process()
    assert alone[0] == "torch"
    told = []
    here.watchers.append(told.append)
    store[0] = group
    _, decided = process(verdict())
    assert process(here=here)[1] == decided
    assert told == ["changed"]
    process(here=here)
    assert told == ["changed"]
    store[0] = None  # the group is no longer
    assert process(here=here)[1][0] == "torch"


CANNOT = {
    "a config that is none": lambda name, config, *rest: [name, {"BLOCK_M": 5}, *rest],
    "no config": lambda name, config, *rest: [name, None, *rest],
    "an unknown implementation": lambda name, *rest: ["of_tomorrow", *rest],
    "kernels of another version": lambda *told: [*told[:3], "0" * 64],
    "an unknown reason": lambda name, config, source, digest: [name, config, "a whim", digest],
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_run_here_is_pytorchs_with_one_warning(process, store, name):
    process(verdict())

    class Altered:
        def compare_set(self, key, expected, mine):
            found = store_.compare_set(key, expected, mine)
            return json.dumps(CANNOT[name](*json.loads(found)))

    store_, store[0] = store[0], Altered()
    with pytest.warns(RuntimeWarning, match="another process of this program runs what cannot run here"):
        here, choice = process(verdict())
    assert choice[0] == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert process(here=here)[1][0] == "torch"


def test_what_is_revoked_here_does_not_run(process, store):
    process(verdict())
    revoked = Revocation(OP.name, "triton", "wrong")
    with pytest.warns(RuntimeWarning, match="cannot run here"):
        assert process(revocations=[revoked])[1][0] == "torch"


def test_a_call_like_one_made_before_there_was_a_group_is_chosen_again(process, store, monkeypatch):
    group, store[0] = store[0], None
    here, _ = process()
    q = SimpleNamespace(is_cuda=True, device=GPU_0)
    monkeypatch.setattr(here._memo, "_key", lambda op, args: "this call")
    monkeypatch.setattr(OP.problem, "of", classmethod(lambda cls, *args: FUSED))
    assert here.lookup(OP, (q,)).implementation.name == "torch"
    assert here.known(OP, (q,)) is not None
    store[0] = group
    process(verdict())
    assert here.known(OP, (q,)) is None
    assert here.lookup(OP, (q,)).implementation.name == "triton"


def test_a_problem_is_asked_about_once(process, store):
    asked = []

    class Counted:
        def compare_set(self, key, expected, mine):
            asked.append(key)
            return store_.compare_set(key, expected, mine)

    store_, store[0] = store[0], Counted()
    here, _ = process(verdict())
    for _ in range(3):
        process(here=here)
    assert len(asked) == 1


def test_a_group_ends_when_its_program_ends_it(monkeypatch):
    group = Group()
    monkeypatch.setattr(agreement, "_group", lambda: group)
    monkeypatch.setattr(agreement, "_store", lambda group: dist.HashStore())
    it = agreement.Agreement()
    assert it.begun()
    assert not it.begun()
    gone, group = weakref.ref(group), None
    assert gone() is None
    assert not it.begun()
    assert it.settle(OP, FUSED, GPU, ("triton", None, "exact", "")) == ("triton", None, "exact", "")


class Gone:
    def compare_set(self, key, expected, mine):
        raise ConnectionError("nobody listens")


def test_a_store_that_is_gone_is_told_once_and_each_chooses_by_itself(process, store):
    store[0] = Gone()
    with pytest.warns(RuntimeWarning, match="cannot agree.*nobody listens"):
        here, choice = process(verdict())
    assert choice == ("triton", OTHER, "exact")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert process(here=here, problem=COMPOSED)[1][0] == "triton"


PROGRAM = """
import os, sys, time, warnings
sys.path[:0] = {paths}
import pytest, torch, torch.distributed as dist
from dispatch_samples import FUSED, GPU, OP, OTHER, RUNNER_UP, verdict
from tilebook import device as devices
from tilebook.dispatch import Dispatch
from tilebook.registry import Registry

devices.current = lambda index=0: GPU
torch.cuda.is_current_stream_capturing = lambda: False
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", rank=rank, world_size=3, init_method="file://" + os.environ["MEETING"])
if rank == 2:  # this one never asks
    dist.barrier()
    sys.exit()
problems = [OP.problem.parse(f"B4,H16,S{{128 * n}},D64", "bf16") for n in range(1, 41)]
here, mine = Dispatch(), []
with Registry.open(os.environ["TILEBOOK_REGISTRY"], write=True) as registry:
    for n, problem in enumerate(problems):
        if (n + rank) % 2:  # verdicts come while both ask
            registry.merge((), [verdict(problem=problem, config=(OTHER, RUNNER_UP)[rank])], ())
        if n % 3:
            here.reload()
        choice = here.choose(OP, problem, torch.device("cuda", 0))
        mine.append((choice.implementation.name, choice.config))
everyone = [None] * 3
print(repr(mine), flush=True)
dist.barrier()
"""


@pytest.mark.long
def test_three_processes_of_which_one_never_asks(tmp_path):
    one, other, _ = ranks(3, textwrap.dedent(PROGRAM), tmp_path)
    assert one == other
    assert one.count("triton") >= 5
