"""A call runs what was chosen for it, is known again by all that its choice depends on, and never stops a program."""

import dataclasses
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from dispatch_samples import (
    COMPOSED,
    FUSED,
    GPU,
    OP,
    OTHER,
    OnSecondGpu,
    composed,
    doubling,
    on_gpu,
    verdict,
)

import tilebook
from tilebook import dispatch
from tilebook.dispatch import Choice, Dispatch, memo
from tilebook.kernels.attention.form import PLAIN
from tilebook.op import Config


def ours(x, *rest, config):
    return (x.as_subclass(torch.Tensor) + x.as_subclass(torch.Tensor),)


def broken(x, *rest, config):
    raise RuntimeError("no such instruction")


@pytest.fixture(autouse=True)
def _unrecorded(monkeypatch):
    """No plans: what is launched here is no kernel."""
    monkeypatch.setattr("tilebook.dispatch.choice.record", lambda run, args: (run(*args), None))


# Known again


def test_a_call_like_one_before_is_not_chosen_again(here, monkeypatch):
    op, x = doubling(ours), on_gpu(torch.ones(4))
    assert here.known(op, (x,)) is None
    choice = here.lookup(op, (x,))
    monkeypatch.setattr(here, "choose", None)
    assert here.lookup(op, (on_gpu(torch.zeros(4)),)) is choice
    assert here.known(op, (on_gpu(torch.zeros(4)),)) is choice


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "other",
    [
        lambda: on_gpu(torch.ones(2, 4)),
        lambda: on_gpu(torch.ones(4, 4).t()),
        lambda: on_gpu(torch.ones(4, 4, dtype=torch.bfloat16)),
        lambda: on_gpu(torch.ones(17)[1:].view(4, 4)),
        lambda: on_gpu(torch.ones(4, 4), OnSecondGpu),
    ],
    ids=["shape", "strides", "dtype", "alignment", "GPU"],
)
def test_a_call_is_another_if_any_tensor_differs_in(here, which, other):
    op, args = doubling(ours), [on_gpu(torch.arange(16.0).view(4, 4)) for _ in range(2)]
    choice = here.lookup(op, tuple(args))
    args[which] = other()
    assert here.known(op, tuple(args)) is None
    assert here.lookup(op, tuple(args)) is not choice


def test_a_call_is_another_if_a_later_tensor_is_on_the_cpu_or_none(here):
    op, args = doubling(ours), [on_gpu(torch.ones(4)), on_gpu(torch.ones(4))]
    here.lookup(op, tuple(args))
    for other in (torch.ones(4), None):
        args[1] = other
        assert here.known(op, tuple(args)) is None


def test_a_call_is_another_if_an_option_or_the_op_differs(here):
    op, x = doubling(ours), on_gpu(torch.ones(4))
    here.lookup(op, (x, 1.0))
    assert here.known(op, (x, 2.0)) is None
    assert here.known(doubling(ours), (x, 1.0)) is None


def test_what_the_caller_looks_at_makes_a_call_another(here):
    op, x, y = doubling(ours), on_gpu(torch.ones(4)), on_gpu(torch.ones(3))
    choice = here.lookup(op, (x,), (x, y))
    assert here.known(op, (x, y)) is choice
    assert here.known(op, (x, on_gpu(torch.ones(5)))) is None
    assert here.known(op, (x,)) is None


def test_memory_of_choices_is_bounded(here, monkeypatch):
    monkeypatch.setattr(memo.Memo, "MOST", 3)
    op = doubling(ours)
    for n in range(1, 9):
        here.run(op, on_gpu(torch.ones(n)))
    known = [n for n in range(1, 9) if here.known(op, (on_gpu(torch.ones(n)),)) is not None]
    assert known == [6, 7, 8]


def test_reload_forgets_choices(here):
    op, x = doubling(ours), on_gpu(torch.ones(4))
    here.lookup(op, (x,))
    here.reload()
    assert here.known(op, (x,)) is None


# Forced


def test_a_config_that_is_asked_for_may_name_an_axis_as_it_was_before():
    q, k, v = (torch.zeros(1, 1, 8, 16) for _ in range(3))
    with dispatch.use("triton", Config({**OTHER, **OP.tunable.space.later})):
        assert dispatch.lookup(OP, (q, k, v, PLAIN, 1.0)).config == OTHER


def test_what_is_forced_is_not_known_again_and_does_not_stay(here):
    op, x = doubling(ours), on_gpu(torch.ones(4))
    chosen = here.lookup(op, (x,))
    with here.use("torch"):
        assert here.known(op, (x,)) is None
        assert here.lookup(op, (x,)).implementation.name == "torch"
        with here.use("triton", Config(TILE=2)):
            assert here.lookup(op, (x,)).config == Config(TILE=2)
        assert here.lookup(op, (x,)).implementation.name == "torch"
    assert here.lookup(op, (x,)) is chosen


def test_what_is_forced_on_an_op_that_lacks_it_leaves_the_op_as_it_is(here):
    with here.use("unheard_of"):
        assert here.lookup(doubling(ours), (on_gpu(torch.ones(4)),)).source == "default"


def test_a_backward_pass_is_forced_by_itself(here):
    with here.use("triton"):
        choice = here.lookup(OP, FUSED.inputs("meta", 0))
    assert not choice.native
    assert here.backward_of(choice) is choice


# On the CPU


def test_on_the_cpu_pytorch_runs():
    q = torch.randn(1, 2, 8, 16)
    choice = dispatch.lookup(OP, (q, q, q, PLAIN, 0.25))
    assert (choice.implementation.name, choice.source, choice.native) == ("torch", "fallback", True)
    assert dispatch.backward_of(choice).native
    assert torch.equal(tilebook.attention(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))


# Backward passes


def test_a_backward_pass_is_that_of_its_own_verdict(choose):
    backward = OP.backward
    problem = backward.problem.parse("B4,H16,S2048,D64", "bf16")
    config = next(iter(backward.tunable.space.feasible(problem, GPU)))
    won = verdict(op=backward.name, problem=problem, kernel=backward.digest, config=config)
    forward = choose(won)
    assert forward.native
    assert not choose.here.backward_of(forward).native
    assert choose.here.backward_of(forward).config == config
    other = choose.again(OP.problem.parse("B4,H16,S2048,D128", "bf16"))
    assert choose.here.backward_of(other).native


def test_a_backward_verdict_that_cannot_be_used_stops_nothing(choose, monkeypatch):
    choice = choose(composed(), problem=COMPOSED)

    def broken(*_):
        raise KeyError("nobody thought of this")

    monkeypatch.setattr(dispatch.Snapshot, "choose", broken)
    with pytest.warns(RuntimeWarning, match="nobody thought of this"):
        assert choose.here.backward_of(choice).source == "default"


# What raises


def test_a_choice_that_raises_is_replaced_after_one_warning(here):
    op, x = doubling(broken), on_gpu(torch.ones(4))
    with pytest.warns(RuntimeWarning, match=r"doubling N4: triton TILE=1 failed \(RuntimeError: no such instruction"):
        first = here.run(op, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = here.run(op, x)
    assert torch.equal(first[0], second[0])
    assert op.ran == ["triton", "torch", "torch"]


def test_a_choice_that_fails_later_is_replaced_too(here):
    def failing(x, *rest, config):
        if len(op.ran) > 2:
            raise RuntimeError("no memory for a plan")
        return ours(x, config=config)

    op, x = doubling(failing), on_gpu(torch.ones(4))
    here.run(op, x)
    here.run(op, x)
    with pytest.warns(RuntimeWarning, match="torch serves instead"):
        here.run(op, x)
    here.run(op, x)
    assert op.ran == ["triton", "triton", "triton", "torch", "torch"]


@pytest.mark.filterwarnings("error")
def test_a_call_that_nothing_takes_raises_what_it_raised_and_changes_nothing(here):
    def picky(x, *rest, config=None):
        if float(x.as_subclass(torch.Tensor)[0]) < 0:
            raise RuntimeError("a negative number")
        return ours(x, config=config)

    op, good, bad = doubling(picky, picky), on_gpu(torch.ones(4)), on_gpu(-torch.ones(4))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="a negative number"):
            here.run(op, bad)
    choice = here.known(op, (good,))
    assert (choice.calls, choice.spare) == (0, None)
    op.ran.clear()
    here.run(op, good)
    assert op.ran == ["triton"]


def test_a_spare_that_raises_gives_way_to_pytorch(here):
    op, x = doubling(broken), on_gpu(torch.ones(4))
    default = here.choose(op, op.problem.of(x), torch.device("cuda", 0))
    winner = Choice(op.tunable, Config(TILE=2), "nearest", default.problem, default.gpu, instead=here._spare)
    with pytest.warns(RuntimeWarning, match="no such instruction"):
        winner(x)
    winner(x)
    assert op.ran == ["triton", "triton", "torch", "torch"]


def test_where_pytorch_has_a_kernel_a_winner_that_raises_leaves_the_call_to_it(here):
    op, x = doubling(broken, fused=True), on_gpu(torch.ones(4))
    choice = here.choose(op, op.problem.of(x), torch.device("cuda", 0))
    winner = Choice(op.tunable, Config(TILE=2), "exact", choice.problem, choice.gpu, instead=here._spare)
    with pytest.warns(RuntimeWarning, match="torch serves instead"):
        winner(x)
    assert op.ran == ["triton", "torch"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("where", ["kernel", "spare"])
def test_out_of_memory_is_the_callers_to_handle(here, where):
    def hungry(*args, config=None):
        raise torch.OutOfMemoryError("too much")

    op, x = doubling(*((hungry, ours) if where == "kernel" else (broken, hungry))), on_gpu(torch.ones(4))
    with pytest.raises(torch.OutOfMemoryError):
        here.run(op, x)
    choice = here.known(op, (x,))
    assert (choice.calls, choice.spare) == (0, None)


# While a graph is captured


def test_what_would_have_to_be_compiled_is_left_to_pytorch_while_a_graph_is_captured(here, monkeypatch):
    op, x = doubling(ours), on_gpu(torch.ones(4))
    here.lookup(op, (x,))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(3):
        here.run(op, x)
    assert (op.ran, here.known(op, (x,)).calls) == (["torch"] * 3, 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    here.run(op, x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    here.run(op, x)
    assert op.ran[3:] == ["triton", "triton"], "compiled before, it is captured"


def test_a_call_at_fault_has_compiled_nothing_that_a_graph_could_capture(here, monkeypatch):
    well = []

    def theirs(x, *rest):
        if not well:
            raise RuntimeError("no")
        return ours(x, config=None)

    op, x = doubling(broken, theirs), on_gpu(torch.ones(4))
    with pytest.raises(RuntimeError, match="no such instruction"):
        here.run(op, x)
    well.append(True)
    op.ran.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    here.run(op, x)
    assert op.ran == ["torch"]


# Misses


def test_misses_are_counted_and_weighed_and_verdicts_are_not(choose):
    covered, missed = choose(verdict()), choose.again(OP.problem.parse("B4,H16,S2048,D128", "bf16"))
    choose.here._memo.update({(OP, 1): covered, (OP, 2): missed, (OP, 3): choose.again(COMPOSED)})
    covered.calls, missed.calls = 5, 3
    (miss,) = choose.here.misses()
    assert (miss.problem, miss.calls) == (missed.problem.key, 3)
    assert miss.time_ms > 0


def test_a_program_of_a_dtype_that_no_kernel_takes_has_no_misses(choose):
    """Asked at the program's end, where nothing may go wrong any more."""
    odd = choose(problem=dataclasses.replace(FUSED, dtype="float64"))
    choose.here._memo[OP, 1] = odd
    odd.calls = 3
    assert choose.here.misses() == []


def test_a_forked_process_counts_its_own_calls(choose):
    missed = choose(problem=OP.problem.parse("B4,H16,S2048,D128", "bf16"))
    choose.here._memo[OP, 1] = missed
    missed.calls = 3
    choose.here.forked()
    assert choose.here.misses() == []
    missed.calls += 2
    assert [miss.calls for miss in choose.here.misses()] == [2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_program_tells_its_dispatch_of_a_fork(monkeypatch):
    reader, writer = os.pipe()
    dispatch.here._inherited = {}
    missed = SimpleNamespace(calls=7)
    monkeypatch.setitem(dispatch.here._memo, "call", missed)
    if os.fork() == 0:
        os.write(writer, str(dispatch.here._inherited.get(id(missed))).encode())
        os._exit(0)
    assert os.read(reader, 10) == b"7"
    assert id(missed) not in dispatch.here._inherited


def test_importing_tilebook_is_light():
    code = "import sys, tilebook; print([m for m in ('torch', 'triton', 'sqlalchemy', 'optuna') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_program_has_one_dispatch():
    assert isinstance(dispatch.here, Dispatch)
    assert dispatch.run.__self__ is dispatch.lookup.__self__ is dispatch.here
