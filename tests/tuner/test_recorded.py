"""A recorded sweep stands in for compilers and GPU: its answers, on its clock."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from fakes import FakePool, FakeRunner, Memory

from tilebook import device as devices
from tilebook import op as ops
from tilebook.op import Config
from tilebook.registry import Failure, Layers, Registry, VerdictStatus
from tilebook.tuner.known import PREDICTED, Known
from tilebook.tuner.model import predict
from tilebook.tuner.process.compile import Binary, Compiled
from tilebook.tuner.process.runner import Attempt, Candidate
from tilebook.tuner.progress import Run
from tilebook.tuner.session import Options, Session
from tilebook.tuner.sweeps.recorded import Lane, Machine, Step, beginning, default, neighbours, recorded_op, tune
from tilebook.tuner.sweeps.sweep import Measured, Sweep, read, record

SWEEPS = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h200" / "sweeps"
ATTENTION = SWEEPS / "attention_fwd-B4-H16-S2048-D64-bf16.jsonl"

A, B, C, D, E = (Config(BLOCK=block) for block in (16, 32, 64, 128, 256))


def line(config, compile_s, time_ms, run_s=1.0, failure=None):
    broken = failure is Failure.SPILLS
    compiled = Compiled((Binary("k", config.key, 1, 0, 32, 0, 4, 1),), compile_s, failure if broken else None)
    samples = () if failure else (time_ms, time_ms * 1.01, time_ms * 0.99)
    attempt = Attempt(failure, failure or "", None if failure else time_ms, samples)
    return Measured(Candidate("triton", config), compiled, attempt, 0.0 if broken else run_s)


@pytest.mark.parametrize("name", ["attention_fwd-B4-H16-S2048-D64-causal-bf16", "mlp_up_fwd-M4096-H768-I3072-bf16"])
def test_to_predict_the_search_finds_what_the_model_thinks_fastest_in_a_fraction_of_the_space(name):
    sweep = read(SWEEPS / f"{name}.jsonl")
    op, machine, memory = recorded_op(sweep), Machine(sweep), Memory()
    problem, work = op.problem.from_key(sweep.header["problem"]), op.tunable.space.work
    known = Known(memory, Layers([]), sweep.device, sweep.header["environment"], PREDICTED)
    session = Session(sweep.device, known, machine, None, Options(), Run(1, False))
    state = session.tune(op, problem)
    assert state.tried < len(sweep.ours) / 2
    compiles = {each.candidate.config: each.compiled for each in sweep.ours if each.compiled.failure is None}
    everywhere = [
        predict(problem.cost(), work(problem, config), compiled, sweep.device).time_ms
        for config, compiled in compiles.items()
    ]
    assert state.best_ms == pytest.approx(min(everywhere))


SWEEP = Sweep(
    {"default": dict(A)},
    (
        Measured(Candidate("torch"), None, Attempt(None, "", 7.0, (7.0,) * 3), 0.5),
        line(A, 3.0, 5.0),
        line(B, 1.0, 6.0),
        line(C, 2.0, 4.0),
        line(D, 1.0, 9.0, failure=Failure.SPILLS),
        line(E, 0.5, 3.0, run_s=2.0),
    ),
)


def submit(machine, *configs):
    return {machine.submit("op", "triton", "{}", config): config for config in configs}


def ready(machine, waiting, timeout_s=1.0):
    """The configs that are compiled by now, their results taken."""
    done = machine.wait(waiting, timeout_s)
    for future in done:
        future.result()
    return {waiting[future] for future in done}


def test_compilers_work_side_by_side_and_the_gpu_waits_for_what_it_measures():
    machine = Machine(SWEEP, workers=2)
    waiting = submit(machine, A, B, C)
    assert ready(machine, waiting, 0.0) == set()
    # Compiler 1: A until 3. Compiler 2: B until 1, then C until 3.
    assert ready(machine, waiting) == {B}
    assert machine.now == 1.0
    machine.attempt(Candidate("triton", B), None)
    assert machine.now == 2.0
    waiting = {future: config for future, config in waiting.items() if config != B}
    assert ready(machine, waiting) == {A, C}
    assert machine.now == 3.0
    machine.attempt(Candidate("triton", A), None)
    machine.attempt(Candidate("triton", C), None)
    assert machine.now == 5.0
    assert machine.steps == [Step(2.0, 2, 6.0), Step(4.0, 1, 5.0), Step(5.0, 3, 4.0)]


def test_compilers_go_on_while_the_gpu_measures():
    machine = Machine(SWEEP, workers=1)
    waiting = submit(machine, B, E, D)
    assert ready(machine, waiting) == {B}
    machine.attempt(Candidate("triton", B), None)
    assert machine.now == 2.0
    assert ready(machine, waiting, 0.0) == {B, E}  # E until 1.5, D until 2.5
    machine.attempt(Candidate("triton", E), None)
    assert machine.steps[-1] == Step(4.0, 2, 3.0)
    assert ready(machine, waiting, 0.0) == {B, D, E}
    assert machine.now == 4.0


def test_what_waits_in_front_of_the_gpu_takes_time_only_when_its_answer_is_taken():
    machine = Machine(SWEEP)
    waiting = submit(machine, B, E)
    assert ready(machine, waiting) == {E}  # at 0.5
    lane = Lane(machine)
    first = lane.submit(machine.attempt, Candidate("triton", E), None)
    assert machine.now == 0.5
    first.result()
    assert machine.now == 2.5
    assert ready(machine, waiting, 0.0) == {B, E}
    both = [lane.submit(machine.attempt, Candidate("triton", config), None) for config in (B, E)]
    assert machine.now == 2.5
    assert [(future.result().time_ms, machine.now) for future in both] == [(6.0, 3.5), (3.0, 5.5)]


def test_the_first_candidate_of_a_compile_process_counts_as_the_others():
    slow = dataclasses.replace(SWEEP, measured=(*SWEEP.measured, line(Config(BLOCK=512), 6.0, 1.0)))
    machine = Machine(slow)
    waiting = submit(machine, Config(BLOCK=512))
    machine.wait(waiting, 1.0)
    assert machine.now == 1.5  # the median of 3, 1, 2, 1, 0.5 and 6


def test_attempts_are_answered_as_recorded():
    machine = Machine(SWEEP)
    torch = machine.attempt(Candidate("torch"), None)
    assert (torch.time_ms, machine.now, machine.steps) == (7.0, 0.5, [])
    ready(machine, submit(machine, C))
    (spilled,) = submit(machine, D)
    machine.wait([spilled], 1.0)
    assert spilled.result().failure == "spills"
    assert machine.attempt(Candidate("triton", C), 3.0).failure is Failure.SLOW
    kept = machine.attempt(Candidate("triton", C), 5.0)
    assert (kept.failure, kept.time_ms, len(kept.samples_ms)) == (None, 4.0, 3)


def test_confirming_draws_from_the_recorded_samples_and_takes_their_time():
    machine = Machine(SWEEP)
    candidates = [Candidate("triton", A), Candidate("torch")]
    ours, theirs = (attempt.samples_ms for attempt in machine.confirm(candidates, 30, 0))
    assert len(ours) == len(theirs) == 30
    assert set(ours) == {5.0, 5.05, 4.95}
    assert machine.now == pytest.approx((sum(ours) + sum(theirs)) / 1e3)
    assert machine.confirm(candidates, 30, 0, fresh=True)[0].samples_ms != ours


def valley(candidate):
    if candidate.implementation != "triton":
        return 0.2
    rows, block, warps = (candidate.config.number(axis).bit_length() for axis in ("ROWS", "BLOCK", "num_warps"))
    return 0.1 * (1 + 0.05 * (rows - 2) ** 2 + 0.02 * (block - 12) ** 2 + 0.03 * (warps - 3) ** 2)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """RMSNorm's space, timed by a formula."""
    op, path = ops.get("rms_norm_fwd"), tmp_path_factory.mktemp("sweep") / "sweep.jsonl"
    problem = op.problem.parse("M8192,N4096", "bf16")
    pool = FakePool(code=lambda config: hashlib.sha256(config.key.encode()).hexdigest())
    record(op, problem, devices.find("H200"), path, pool, FakeRunner(valley), Run(1, True))
    return read(path)


def test_a_session_tunes_over_a_sweep_and_finds_what_was_fastest(sweep):
    state, machine = tune(sweep, Options())
    assert not state.error
    assert state.verdict.status is VerdictStatus.MEASURED
    fastest = min(sweep.ours, key=lambda each: each.attempt.time_ms)
    assert min(step.time_ms for step in machine.steps) <= fastest.attempt.time_ms * 1.01
    assert state.verdict.implementation == "triton"
    assert sorted(step.number for step in machine.steps) == list(range(1, len(machine.steps) + 1))
    assert machine.now > machine.steps[-1].seconds  # the finals took time too


def test_the_same_seed_takes_the_same_steps(sweep):
    assert tune(sweep, Options(seed=3))[1].steps == tune(sweep, Options(seed=3))[1].steps


def test_a_session_starts_from_todays_default_where_the_sweep_has_it(sweep):
    op = ops.get("rms_norm_fwd")
    today = op.tunable.space.default(op.problem.from_key(sweep.header["problem"]), sweep.device)
    other = next(each.candidate.config for each in sweep.ours if each.candidate.config != today)
    old = dataclasses.replace(sweep, header={**sweep.header, "default": dict(other)})
    assert default(old) == today
    problem = op.problem.from_key(sweep.header["problem"])
    assert recorded_op(old).tunable.space.default(problem, sweep.device) == today
    without = [each for each in old.measured if each.candidate.config != today]
    assert default(dataclasses.replace(old, measured=tuple(without))) == other
    failed = dataclasses.replace(
        next(each for each in old.measured if each.candidate.config == today), attempt=Attempt(Failure.SPILLS, "spills")
    )
    assert default(dataclasses.replace(old, measured=(*without, failed))) == other


@pytest.fixture
def learnt(tmp_path):
    """A sweep of attention, and a registry with verdicts of its problem and of others, each with another winner."""
    op, sweep = ops.get("attention_fwd"), read(ATTENTION)
    verdict = tune(sweep, Options(trials=4))[0].verdict
    winners = [each.candidate.config for each in sweep.ours if each.candidate.config != default(sweep)]
    shapes = ("B4,H16,S2048,D64", "B8,H32,S2048,D64", "B4,H16,S8192,D64", "B4,H16,S4096,D64", "B4,H16,S4096,D128")
    with Registry.open(tmp_path / "shipped.db", write=True) as registry:
        for shape, config in zip(shapes, winners, strict=False):
            key = op.problem.parse(shape, "bf16").key
            winner = dataclasses.replace(verdict.winner, implementation="triton", config=dict(config), default=False)
            registry.record(verdict=dataclasses.replace(verdict, problem=key, finalists=(winner,), notes={}))
    # Its own, what differs only in batch and heads, and what no verdict of can serve it, are left out.
    return sweep, neighbours(sweep, tmp_path / "shipped.db"), (default(sweep), winners[3], winners[2])


def test_a_session_begins_with_what_it_may_learn_from_other_problems(learnt):
    sweep, verdicts, first = learnt
    assert beginning(sweep) == first[:1]
    assert beginning(sweep, verdicts) == first
    times = {each.candidate.config: each.attempt.time_ms for each in sweep.ours}
    _, machine = tune(sweep, Options(trials=4), verdicts=verdicts)
    measured = {step.number: step.time_ms for step in machine.steps}
    assert [measured.get(place) for place in (1, 2, 3)] == [times[config] for config in first]


def test_a_session_asks_for_nothing_that_the_sweep_has_not(sweep):
    few = dataclasses.replace(sweep, measured=sweep.measured[:12])
    op = recorded_op(few)
    problem = op.problem.from_key(sweep.header["problem"])
    assert set(op.tunable.space.feasible(problem, few.device)) == {each.candidate.config for each in few.ours}
    state, _ = tune(few, Options())
    assert not state.error
    assert state.tried == 12


def test_a_sweep_of_a_space_with_other_axes_can_still_be_replayed(sweep):
    axes = {**sweep.header["axes"], "GONE": [1]}
    header = {**sweep.header, "axes": axes, "default": {**sweep.header["default"], "GONE": 1}}
    lines = [each.to_json() for each in sweep.measured]
    for each in lines:
        if "compiled" in each:
            each["config"] = {**each["config"], "GONE": 1}
    old = Sweep(header, tuple(Measured.from_json(json.loads(json.dumps(each))) for each in lines))
    state, _ = tune(old, Options(trials=10))
    assert not state.error
    assert state.verdict is not None
