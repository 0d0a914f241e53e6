"""A registry full of verdicts of others: what a look-up of ours, and of one kernel among them, asks of it is no more.

Work is counted, not time: the steps of SQLite's virtual machine, which visits rows one by one. `strangers.py` in
`benchmarks/reliability` measures time with hundreds of thousands.
"""

import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from served import GPU, on_an_h200

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "reliability"))
import strangers as crowd

from tilebook import inventory
from tilebook import op as ops
from tilebook.cli.common import is_problem
from tilebook.dispatch import Dispatch
from tilebook.foreign.serving import Book
from tilebook.op import Config
from tilebook.registry import Registry, load

OTHERS, KERNELS, OURS = 2_000, 100, 40


def filled(path, others, kernels):
    path.with_suffix(".jsonl").write_text(crowd.exchanged(others, kernels, OURS))
    with path.with_suffix(".jsonl").open(newline="\n") as stream, Registry.open(path, write=True) as target:
        report = load(target, stream, allowed=inventory.axes(), trust=True, is_problem=is_problem)
    assert (report.verdicts, report.skipped) == (others + OURS, [])
    return path


@pytest.fixture(scope="module")
def registries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("among")
    alone = filled(folder / "alone.db", OTHERS // KERNELS * 8, 8)
    return alone, filled(folder / "among.db", OTHERS, KERNELS)


@pytest.fixture
def steps(monkeypatch):
    """Counts the steps of all databases that are opened from now on."""
    taken, connect = [0], sqlite3.connect

    def counting():
        taken[0] += 1

    def connected(*args, **options):
        made = connect(*args, **options)
        made.set_progress_handler(counting, 1)
        return made

    monkeypatch.setattr(sqlite3, "connect", connected)
    monkeypatch.setattr("tilebook.registry.readers.CHECKED_BYTES", 0)  # the small one is not looked at as a whole
    return taken


def each(taken, calls):
    """The steps of each of these calls."""
    found = []
    for call in calls:
        before = taken[0]
        call()
        found.append(taken[0] - before)
    return found


def ours(registry, taken, monkeypatch):
    """Of a program's first look-up, of a problem with a verdict, of one without, and of a call like one before."""
    on_an_h200(monkeypatch, registry)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    op, here, gpu = ops.get("attention_fwd"), Dispatch(), torch.device("cuda", 0)
    with sqlite3.connect(registry) as database:
        (key,) = database.execute("SELECT key FROM problem WHERE op = ? LIMIT 1", [op.name]).fetchone()
    known = op.problem.from_key(key)
    new = [type(known).parse(f"B3,H16,S{n},D128", "bf16") for n in (77, 3001)]
    taken[0] = 0
    return each(
        taken, [lambda problem=problem: here.choose(op, problem, gpu) for problem in (new[0], known, new[1], known)]
    )


def theirs(registry, taken):
    """Of the first look-up of a kernel of others, of a key with a verdict, and of one without."""
    kernel = SimpleNamespace(
        op=crowd.name(7), digest=crowd.digest(7), configs=dict.fromkeys(map(Config, crowd.CONFIGS))
    )
    book = Book(GPU, str(registry))
    taken[0] = 0
    found = each(taken, [lambda n=n: book.ranked(kernel, crowd.key(n), True) for n in (0, 1, 10**6)])
    assert len(book.ranked(kernel, crowd.key(1), True)) == 4
    return found


def test_look_ups_of_ours_take_no_more_steps_among_thousands_of_others(registries, steps, monkeypatch):
    alone, among = (ours(registry, steps, monkeypatch) for registry in registries)
    assert alone[0] > 100  # something is counted
    assert all(more <= 1.1 * few + 20 for few, more in zip(alone, among, strict=True)), (alone, among)
    assert among[-1] == 0


def test_look_ups_of_a_kernel_of_others_take_no_more_steps_among_thousands_of_others(registries, steps):
    alone, among = (theirs(registry, steps) for registry in registries)
    assert alone[0] > 100
    assert all(more <= 1.1 * few + 20 for few, more in zip(alone, among, strict=True)), (alone, among)
