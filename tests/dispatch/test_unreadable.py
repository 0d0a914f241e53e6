"""A registry that is missing, broken or not ours never stops a program, and is left as it was."""

import sqlite3
import warnings

import pytest
import torch
from dispatch_samples import COMPOSED, COMPOSED_DEFAULT, FUSED, OP, doubling, on_gpu

from tilebook.dispatch import Dispatch
from tilebook.registry import Registry


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
    from tilebook.dispatch import Snapshot

    read = []
    monkeypatch.setattr("tilebook.dispatch.Snapshot", lambda device: read.append(device) or Snapshot(device))
    with Registry.open(gpu, write=True):
        here = Dispatch()
    for index in (0, 1, 0, 1):
        here.choose(OP, COMPOSED, torch.device("cuda", index))
    here.choose(OP, COMPOSED, torch.device("cuda"))
    assert len(read) == 2
