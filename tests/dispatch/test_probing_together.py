"""Of a distributed program one process probes; the others take what it finds when they hear of it, and never wait."""

import warnings

import pytest
import torch.distributed as dist
from dispatch_samples import FUSED, GPU, OP
from processes import ranks
from test_agreement import Group

from tilebook.dispatch import agreement
from tilebook.dispatch.agreement import Agreement

OURS = ("triton", {"TILE": 2}, "exact", "a" * 64)
THEIRS = ("torch", None, "fallback", "")


def member(rank, store, monkeypatch):
    group = Group()
    group.rank = lambda: rank
    monkeypatch.setattr(agreement, "_group", lambda: group)
    monkeypatch.setattr(agreement, "_store", lambda group: store)
    made = Agreement()
    assert made.begun()
    return made


def test_what_is_announced_is_decided_for_all_once_they_hear_of_it(monkeypatch):
    store = dist.HashStore()
    first, other = (member(rank, store, monkeypatch) for rank in (0, 1))
    assert (first.leads, other.leads) == (True, False)
    assert other.settle(OP, FUSED, GPU, THEIRS) == first.settle(OP, FUSED, GPU, OURS) == THEIRS
    assert other.heard() == []
    first.announce(OP, FUSED, GPU, OURS)
    assert first.settle(OP, FUSED, GPU, THEIRS) == OURS
    assert other.settle(OP, FUSED, GPU, THEIRS) == THEIRS  # nothing has changed for it yet
    assert other.heard() == [(OP.name, FUSED.key)]
    assert other.heard() == []
    assert other.settle(OP, FUSED, GPU, THEIRS) == OURS


def test_a_store_that_is_gone_ends_it_with_one_warning(monkeypatch):
    class Gone:
        def add(self, key, amount):
            raise ConnectionError("nobody listens")

        set = add

    for rank in (0, 1):
        it = member(rank, Gone(), monkeypatch)
        with pytest.warns(RuntimeWarning, match="cannot agree.*nobody listens"):
            _ = it.announce(OP, FUSED, GPU, OURS) if it.leads else it.heard()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            it.announce(OP, FUSED, GPU, OURS)
            assert it.heard() == []
        assert it.settle(OP, FUSED, GPU, THEIRS) == THEIRS


PROGRAM = """
import os, sys
sys.path[:0] = {paths}
import torch, torch.distributed as dist
from pathlib import Path
from dispatch_samples import GPU
from probing_samples import Program
from tilebook import device as devices

devices.current = lambda index=0: GPU
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.current_device = lambda: 0
import tilebook.dispatch.choice as choice
choice.record = lambda run, args: (run(*args), None)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", rank=rank, world_size=2, init_method="file://" + os.environ["MEETING"])
it = Program(Path(os.environ["TILEBOOK_REGISTRY"]), 60e-6)
it.call()  # whoever is first decides that it is PyTorch's
dist.barrier()
if rank == 0 or os.environ["SLOW"] == "0":
    it.run(6000)
dist.barrier()
it.run(6000)
dist.barrier()
it.op.ran.clear()
it.run(50)
print(*it.serves, *sorted(set(it.op.ran)), len(it.prober.states), flush=True)
dist.barrier()
it.prober.close()
"""


@pytest.mark.long
@pytest.mark.parametrize("slow", [0, 1])
def test_two_processes_serve_what_the_first_has_found(tmp_path, slow):
    first, other = ranks(2, PROGRAM, tmp_path, SLOW=str(slow))
    assert first.split() == ["triton", "exact", "triton", "1"]
    assert other.split() == ["triton", "exact", "triton", "0"]  # has looked at no problem itself
