"""A program whose kernels are served or recorded does what it does without: its numbers, its errors, its memory."""

import gc
import itertools
import os
import threading

import others
import pytest
import torch
import triton
import triton.language as tl
from recorded import recording
from served import on_an_h200, stored, verdict
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import OutOfResources

import tilebook
from tilebook.foreign import record, serving
from tilebook.foreign.record import MOST_PROBLEMS, Recording
from tilebook.foreign.wrap import install

BLOCKS = [triton.Config({"BLOCK": block}, num_warps=4) for block in (16, 32, 64)]
X = torch.randn(100)


@triton.jit
def add_kernel(x, y, n, m, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(y + at, mask=at < n) + tl.load(x + at, mask=at < n), mask=at < n)


def added(kernel, x, y, m=0):
    kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, x.numel(), m)
    return y


@pytest.fixture
def registry(tmp_path, monkeypatch):
    on_an_h200(monkeypatch, tmp_path / "registry.db")
    stored(tmp_path / "registry.db")
    return tmp_path / "registry.db"


@pytest.fixture(params=["served", "ours"])
def autotune(request, registry, monkeypatch):
    """Makes autotuners of a program that is served, and those of `tilebook.autotune`: both search on a miss."""
    for name in ("__init__", "run"):
        monkeypatch.setattr(Autotuner, name, getattr(Autotuner, name))
    if request.param == "served":
        install("serve")

    def made(configs=BLOCKS, **options):
        options = {"key": ["n"], "do_bench": others.unmeasured, **options}
        if request.param == "ours":
            kernel = tilebook.autotune(configs, on_miss="tune", **options)(add_kernel)
        else:
            kernel = triton.autotune(configs, **options)(add_kernel)
        globals()["tuned_kernel"] = kernel
        return kernel

    return made


class Broken(triton.CompilationError):
    def __init__(self):
        Exception.__init__(self, "no such thing")

    def __str__(self):
        return "no such thing"


def compiles(monkeypatch, right, error):
    """From now on launches that are not right raise this error, before anything runs."""
    run = type(add_kernel).run

    def tight(self, *args, **kwargs):
        if not right(kwargs):
            raise error()
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(add_kernel), "run", tight)


def too_large():
    return OutOfResources(300_000, 232_448, "shared memory")


def test_an_error_in_a_search_is_the_programs_own(autotune, monkeypatch):
    kernel = autotune(do_bench=lambda call, quantiles: call() or [1.0] * 3)
    compiles(monkeypatch, lambda given: False, Broken)
    with pytest.raises(triton.CompilationError, match="no such thing"):
        added(kernel, X, torch.zeros(100))


def test_an_error_in_a_search_leaves_other_calls_their_verdicts(autotune, registry, monkeypatch):
    searched = []
    kernel = autotune(do_bench=lambda call, quantiles: searched.append(1) or call() or [1.0] * 3)
    stored(registry, verdict(kernel, (X, X, 100), BLOCKS[1]))
    added(kernel, X, torch.zeros(100))
    with monkeypatch.context() as patch:
        compiles(patch, lambda given: False, Broken)
        with pytest.raises(triton.CompilationError):
            added(kernel, X[:50], torch.zeros(50))
    assert len(searched) == 1
    added(kernel, X, torch.zeros(100))
    assert kernel.best_config is BLOCKS[1]
    assert len(searched) == 1


def test_a_config_that_no_longer_fits_gives_way_for_its_own_calls(registry, monkeypatch):
    kernel = tilebook.autotune(BLOCKS, key=["n"])(add_kernel)
    globals()["tuned_kernel"] = kernel
    stored(registry, verdict(kernel, (X, X, 100), BLOCKS[0]))
    added(kernel, X, torch.zeros(100))
    added(kernel, X[:50], torch.zeros(50))
    compiles(monkeypatch, lambda given: given["BLOCK"] > 16, too_large)
    assert torch.equal(added(kernel, X, torch.zeros(100)), X)
    assert kernel.best_config is BLOCKS[1]


def test_any_number_of_configs_may_not_fit(registry, monkeypatch):
    configs = [triton.Config({"BLOCK": 16}, num_warps=n) for n in range(1, 1500)]
    kernel = tilebook.autotune([*configs, BLOCKS[1]], key=["n"])(add_kernel)
    compiles(monkeypatch, lambda given: given["BLOCK"] > 16, too_large)
    assert torch.equal(added(kernel, X, torch.zeros(100)), X)


def test_a_config_that_the_programs_own_rules_leave_out_of_this_call_does_not_run(autotune, registry):
    def fits(configs, named, **arguments):
        return [each for each in configs if each.kwargs["BLOCK"] <= {**named, **arguments}["m"]]

    kernel = autotune(prune_configs_by={"early_config_prune": fits})
    stored(registry, verdict(kernel, (X, X, 100, 64), BLOCKS[2], BLOCKS[1], BLOCKS[0]))
    added(kernel, X, torch.zeros(100), 32)
    assert kernel.best_config is BLOCKS[1]


@pytest.mark.parametrize("covered", [False, True])
@pytest.mark.parametrize("how", ["reset_to_zero", "pre_hook"])
def test_what_a_search_would_have_set_anew_is_as_it_would_be(autotune, registry, how, covered):
    """A program may leave it to the first call of a key that what it adds to is zero."""

    def zero(given, reset_only=False):
        given["y"].zero_()

    kernel = autotune(**({how: ["y"]} if how == "reset_to_zero" else {how: zero}))
    if covered:
        stored(registry, verdict(kernel, (X, X, 100), BLOCKS[1]))
    y = torch.full((100,), 7.0)
    assert torch.equal(added(kernel, X, y), X)
    assert torch.equal(added(kernel, X, y), 2 * X)
    assert kernel.best_config is BLOCKS[covered]


def test_threads_are_asked_for_each_its_own(autotune, registry):
    """As those of a program that has a thread for each GPU."""
    waiting, going = threading.Event(), threading.Event()

    def slow(configs, named, **arguments):
        if "m" in arguments:
            waiting.set()
            assert going.wait(20)
        return configs

    kernel = autotune(reset_to_zero=["y"], prune_configs_by={"early_config_prune": slow})
    stored(registry, verdict(kernel, (X, X, 100), BLOCKS[1]), verdict(kernel, (X, X, 50), BLOCKS[1]))
    added(kernel, X[:50], torch.zeros(50))
    y = torch.full((100,), 7.0)
    grid = lambda meta: (triton.cdiv(100, meta["BLOCK"]),)  # noqa: E731
    other = threading.Thread(target=lambda: kernel[grid](X, y, 100, m=0))
    other.start()
    assert waiting.wait(20)
    added(kernel, X[:50], torch.zeros(50))
    going.set()
    other.join()
    assert torch.equal(y, X)


@pytest.mark.skipif(triton.__version__ < "3.7", reason="it then has one config searched, too")
def test_what_no_search_among_one_would_have_set_anew_is_left(autotune, registry):
    one = {"early_config_prune": lambda configs, named, **arguments: configs[1:2]}
    kernel = autotune(reset_to_zero=["y"], prune_configs_by=one)
    stored(registry, verdict(kernel, (X, X, 100), BLOCKS[1]))
    assert torch.equal(added(kernel, X, torch.ones(100)), X + 1)


def test_a_grid_that_tells_the_program_something_says_what_ran(tmp_path):
    kernel = others.scale_kernel
    told = []

    def grid(meta):
        told[:] = [meta["BLOCK"]]
        return (triton.cdiv(40, meta["BLOCK"]),)

    x = torch.randn(40)
    with recording(tmp_path) as made:
        kernel[grid](x, torch.empty_like(x), 40, 3.0)
    assert made.left_out == {}
    assert told == [kernel.best_config.kwargs["BLOCK"]]


def test_a_grid_of_a_kernel_with_a_space_says_what_ran(tmp_path):
    told = []

    def grid(meta):
        told[:] = [meta["BLOCK"]]
        return (triton.cdiv(100, meta["BLOCK"]),)

    try:
        tilebook.give_space(add_kernel, {"BLOCK": (16, 32, 64)}, key=["n"])
        with recording(tmp_path) as made:
            add_kernel[grid](X, torch.zeros(100), 100, 0, BLOCK=32)
    finally:
        vars(add_kernel).pop("run", None)
    assert made.left_out == {}
    assert told == [32]


def test_a_config_that_failed_at_one_key_is_not_said_to_have_failed_at_another(tmp_path):
    def bench(call, quantiles):
        call()
        return [float("inf") if failing and n == 2 else 1.0 for n in [next(count)] * 3]

    failing, count = False, itertools.count()
    kernel = triton.autotune(BLOCKS, key=["n"], do_bench=bench)(add_kernel)
    globals()["tuned_kernel"] = kernel
    x = torch.randn(200)
    with recording(tmp_path):
        added(kernel, x[:100], torch.zeros(100))
        failing, count = True, itertools.count()
        added(kernel, x[:50], torch.zeros(50))
        kernel[(7,)](x[:200:2], torch.zeros(100), 100, 0)  # as the first, with other strides
    (entry,) = record.read(tmp_path)
    assert [[each["BLOCK"] for each in problem.failed] for problem in entry.problems.values()] == [[], [64]]
    assert [len(problem.calls) for problem in entry.problems.values()] == [2, 1]


def test_misses_of_a_process_that_forks_are_counted_once(registry):
    kernel = tilebook.autotune(BLOCKS, key=["n"])(add_kernel)
    globals()["tuned_kernel"] = kernel
    for n in (100, 100, 50):
        added(kernel, X[:n], torch.zeros(n))
    reading, writing = os.pipe()
    if not os.fork():
        try:
            added(kernel, X, torch.zeros(100))
            os.write(writing, repr([miss.calls for miss in serving.misses()]).encode())
        finally:
            os._exit(0)
    os.wait()
    assert os.read(reading, 100) == b"[1]"
    assert [miss.calls for miss in serving.misses()] == [2, 1]


def test_so_many_problems_are_missed_as_anybody_would_tune(registry, monkeypatch):
    monkeypatch.setattr(serving, "_MOST_MISSED", 3)
    kernel = tilebook.autotune(BLOCKS, key=["n"])(add_kernel)
    globals()["tuned_kernel"] = kernel
    for n in (1, 2, 3, 4, 5, 5, 3):
        assert torch.equal(added(kernel, X[:n], torch.zeros(n)), X[:n])
    assert [miss.calls for miss in serving.misses()] == [1, 1, 2]


def test_any_number_of_keys_wait_for_one_list_of_configs(registry):
    kernel = tilebook.autotune(BLOCKS, key=["n"])(add_kernel)
    for n in range(1, 40):
        added(kernel, X[:n], torch.zeros(n))
    assert len({id(each) for each in kernel.cache._waiting.values()}) == 1


def test_what_a_record_leaves_out_takes_no_memory(tmp_path):
    made = Recording(tmp_path)
    kernel = others.scale_kernel
    x = torch.randn(4)
    for n in range(MOST_PROBLEMS + 300):
        made.note(kernel, (x, x, n, 3.0), {"grid": (1,), "warmup": False})
    for n in range(300):
        made.note(kernel, (x, x, "\n" + str(n), 3.0), {"grid": (1,), "warmup": False})
    assert sum(made.left_out.values()) == 600
    assert len(made._found) <= 2 * MOST_PROBLEMS
    assert len(made.left_out) <= 20


def test_kernels_that_are_made_anew_all_the_time_are_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "MOST_KERNELS", 3)
    made = Recording(tmp_path)
    x = torch.randn(4)
    for _ in range(20):
        kernel = triton.autotune(BLOCKS, key=["n"], do_bench=others.unmeasured)(add_kernel)
        made.note(kernel, (x, x, 4, 0), {"grid": (1,), "warmup": False})
    assert len(made.tuners) <= 4
    del kernel
    gc.collect()
    assert sum(isinstance(each, Autotuner) and each.fn is add_kernel for each in gc.get_objects()) <= 5
