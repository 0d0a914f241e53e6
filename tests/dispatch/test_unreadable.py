"""A registry that is missing, broken or not ours never stops a program, and is left as it was."""

import os
import sqlite3
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from dispatch_samples import (
    COMPOSED,
    COMPOSED_DEFAULT,
    COMPOSED_OTHER,
    FUSED,
    GPU,
    OP,
    OTHER,
    composed,
    doubling,
    on_gpu,
    revocation,
    verdict,
)

import tilebook
from tilebook.dispatch import Dispatch, Snapshot
from tilebook.registry import Registry, serving


def test_missing_explicit_registry_warns_once_and_serves_defaults(choose):
    with pytest.warns(RuntimeWarning, match="default configs"):
        assert choose.again(COMPOSED).config == COMPOSED_DEFAULT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose.again(FUSED).native


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\0" + b"\xff" * 4096])
def test_broken_registry_warns_and_serves_defaults_and_stays_as_it_was(choose, content):
    choose.path.write_bytes(content)
    with pytest.warns(RuntimeWarning):
        assert choose.again(COMPOSED).config == COMPOSED_DEFAULT
    assert choose.path.read_bytes() == content


def test_registry_of_somebody_else_is_not_read(choose):
    with sqlite3.connect(choose.path) as database:
        database.execute("create table verdict (a, b)")
    with pytest.warns(RuntimeWarning):
        assert choose.again(COMPOSED).source == "default"


def test_a_warning_does_not_deny_the_verdicts_that_serve(choose, tmp_path):
    with Registry.open(tmp_path / "none.db", write=True) as shipped:
        shipped.record(verdict=verdict())
    choose.path.write_bytes(b"not a database")
    with pytest.warns(RuntimeWarning, match=r"not a SQLite database; the verdicts that can be read serve; without one"):
        choice = choose.again(FUSED)
    assert (choice.source, choice.layer) == ("exact", "shipped")


def test_without_a_home_the_explicit_layer_and_what_ships_serve(choose, tmp_path, monkeypatch):
    with Registry.open(tmp_path / "none.db", write=True) as shipped:
        shipped.record(verdict=verdict())
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.delenv("TILEBOOK_REGISTRY")
        assert choose.again(FUSED).layer == "shipped"
        monkeypatch.setenv("TILEBOOK_REGISTRY", str(choose.path))
        assert choose(verdict()).layer == "explicit"


def test_during_graph_capture_nothing_is_read(choose, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr("tilebook.dispatch.Snapshot", None)
    assert choose.again(COMPOSED).source == "fallback"


def test_what_was_chosen_blind_while_a_graph_was_captured_is_chosen_again_after(here, monkeypatch):
    op, x = doubling(lambda x, *_, config: (2 * x,)), on_gpu(torch.ones(4))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    blind = here.lookup(op, (x,))
    assert (blind.source, here.known(op, (x,))) == ("fallback", None)
    assert here.backward_of(blind).native
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert here.lookup(op, (x,)).source == "default"


def test_the_registry_is_read_once_for_each_gpu(gpu, monkeypatch):
    read = []
    monkeypatch.setattr("tilebook.dispatch.Snapshot", lambda device: read.append(device) or Snapshot(device))
    with Registry.open(gpu, write=True):
        here = Dispatch()
    for index in (0, 1, 0, 1):
        here.choose(OP, COMPOSED, torch.device("cuda", index))
    here.choose(OP, COMPOSED, torch.device("cuda"))
    assert len(read) == 2


@pytest.fixture
def locked(choose, monkeypatch):
    """A connection that holds the lock of a registry with a verdict."""
    choose(verdict(), composed())
    monkeypatch.setattr(serving, "READER_WAIT_S", 0.0)
    choose.here = Dispatch()
    writer = sqlite3.connect(choose.path, isolation_level=None)
    yield writer
    writer.close()


def test_a_registry_that_is_locked_is_asked_again_for_the_next_problem(choose, locked):
    locked.execute("BEGIN EXCLUSIVE")
    with pytest.warns(RuntimeWarning, match="locked"):
        assert choose.again(FUSED).native
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose.again(COMPOSED).config == COMPOSED_DEFAULT
        locked.execute("ROLLBACK")
        assert choose.again(FUSED).config == OTHER
        assert choose.again(COMPOSED).config == COMPOSED_OTHER


def test_what_a_locked_registry_revokes_is_known_before_its_verdicts_serve(choose, locked):
    with Registry.open(choose.path, write=True) as registry:
        registry.revoke(revocation())
    locked.execute("BEGIN EXCLUSIVE")
    with pytest.warns(RuntimeWarning, match="locked"):
        choose.again(FUSED)
    locked.execute("ROLLBACK")
    assert choose.again(FUSED).source == "fallback"


def test_damage_in_an_ops_rows_is_warned_of_when_the_op_is_first_asked_for(choose):
    choose(verdict())
    with sqlite3.connect(choose.path) as database:
        database.execute("UPDATE verdict SET served = 'x'")
    snapshot = Snapshot(GPU)
    with pytest.warns(RuntimeWarning, match="left out 1 damaged row"):
        assert snapshot.choose(OP, FUSED).native
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snapshot.choose(OP, COMPOSED)


_CHOOSES = """
import sys
import torch
from tilebook import device as devices, dispatch, op as ops
devices.current = lambda index=0: devices.find("H200")
torch.cuda.current_device = lambda: 0
torch.cuda.is_current_stream_capturing = lambda: False
op = ops.get("attention_fwd")
dispatch.choose(op, op.problem.parse("B4,H16,S2048,D64,causal", "bf16"), torch.device("cuda", 0))
read = dispatch.here._snapshots[0]._table.verdicts(op.name)
print({each.layer for each in read}, sorted({"sqlalchemy", "alembic"} & set(sys.modules)))
"""


def test_a_first_call_loads_no_sqlalchemy(tmp_path):
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path), "PYTHONPATH": str(Path(tilebook.__file__).parents[1])}
    environment.pop("TILEBOOK_REGISTRY", None)
    run = [sys.executable, "-c", _CHOOSES]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("{'shipped'} []\n", "")
