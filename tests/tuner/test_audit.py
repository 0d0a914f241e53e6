"""Verdicts looked at again: what is wrong or slow here is found and no longer served, the rest is left as it is."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from fakes import ENVIRONMENT, GPU, Clock, FakeRunner, TimedRunner, tune
from test_session import BEST, valley
from toy import Scaling, make_op

from tilebook.op import Config
from tilebook.registry import DenyList, Device, Environment, Failure, Finalist, Layers, Miss, Registry, VerdictStatus
from tilebook.registry.searched import cut_short
from tilebook.tuner.audit.run import Auditor
from tilebook.tuner.audit.subjects import AUDIT, VERIFY, Bench, Outcome, looked, nearest_first, sampled, subjects
from tilebook.tuner.budget import Budget
from tilebook.tuner.process.runner import Attempt, Candidate, GpuRunner, Limits
from tilebook.tuner.session import Options

OP = make_op()
LATER = {**ENVIRONMENT, "triton": "3.8.0"}
WINNER, DEFAULT, TORCH = (
    Candidate("triton", BEST),
    Candidate("triton", Config(BLOCK=16, num_warps=1, num_stages=1)),
    Candidate("torch"),
)
PROBLEMS = [Scaling(64 << n, 64) for n in range(4)]


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    """Verdicts of a tune in the environment of before, one for each problem; the best config wins all of them."""
    _, registry = tune(tmp_path_factory.mktemp("tuned") / "r.db", FakeRunner(valley), problems=PROBLEMS[:1], op=OP)
    (found,) = registry.verdicts()
    assert Config(found.config) == BEST
    finalists = (*found.finalists, Finalist("triton", Config(BLOCK=64, num_warps=4, num_stages=2), time_ms=1.25))
    return [dataclasses.replace(found, problem=problem.key, finalists=finalists) for problem in PROBLEMS]


@pytest.fixture
def shop(tmp_path, evidence):
    return Shop(tmp_path / "registry.db", evidence)


class Shop:
    """A registry with these verdicts, to be looked at on a GPU that answers from a formula."""

    def __init__(self, path, verdicts, op=OP):
        self.path, self.op = path, op
        self.layers = Layers([("explicit", str(path))])
        with self.layers.writer() as registry:
            registry.merge(verdicts=verdicts)

    def verdict(self, problem=PROBLEMS[0]):
        with Registry.open(self.path) as registry:
            return next(each for each in registry.verdicts() if each.problem == problem.key)

    def revocations(self):
        with Registry.open(self.path) as registry:
            return registry.revocations()

    def bench(self, runner, environment=LATER, clock=None):
        more = {} if clock is None else {"clock": clock}
        return Bench(GPU, environment, lambda mode: runner, ops=lambda: {self.op.name: self.op}, **more)

    def look(self, by, runner, environment=LATER, budget_s=None, clock=None):
        """Findings by problem, in the order in which they were come to."""
        here = self.bench(runner, environment, clock)
        with self.layers.writer() as registry:
            budget = Budget(budget_s, clock=here.clock)
            auditor = Auditor(here, self.layers, registry, budget)
            found = subjects(self.layers, here, by)
            if by == AUDIT:
                found = [each for each in found if not looked(registry, here, each)]
            return {each.subject.problem: each for each in getattr(auditor, by)(found)}


def times(changes):
    """The valley with other times: factors by candidate, or failures in the place of a time."""

    def time_ms(candidate):
        change = changes.get(candidate, 1.0)
        return change if isinstance(change, Failure) else valley(candidate) * change

    return time_ms


def imported(verdict, **changes):
    return dataclasses.replace(verdict, origin="imported", trusted=False, **changes)


def outcomes(findings):
    return {each.outcome for each in findings.values()}


# Verify


def test_an_import_that_passes_is_trusted_and_says_what_was_measured_here(tmp_path, evidence):
    shop = Shop(tmp_path / "r.db", [imported(evidence[0], notes={"tried": 7, "searches": {}})])
    here = FakeRunner(lambda c: valley(c) * (1.2 if c.implementation == "triton" else 1.0))
    (finding,) = shop.look(VERIFY, here, ENVIRONMENT).values()
    after = shop.verdict()
    assert (finding.outcome, finding.rival) == (Outcome.KEPT, "torch")
    assert finding.ratio == pytest.approx(2 / 1.2, rel=0.02)
    assert (after.trusted, after.origin, after.config) == (True, "local", dict(BEST))
    assert after.time_ms == pytest.approx(1.2, rel=0.02)
    assert all(each.samples_ms for each in after.finalists), "a stranger's runners-up are not taken on trust"
    assert set(after.notes) == {"checked", "made"}
    assert after.notes["checked"]["origin"] == "imported"
    assert shop.look(VERIFY, FakeRunner(valley), ENVIRONMENT) == {}


def test_a_stale_verdict_that_passes_is_of_this_environment_and_keeps_what_it_falls_back_on(shop):
    before = shop.verdict()
    shop.look(VERIFY, FakeRunner(valley))
    after = shop.verdict()
    assert after.environment == Environment(LATER)
    assert {each.key for each in after.finalists} == {each.key for each in before.finalists}
    assert any(each.time_ms is None for each in after.finalists), "what did not run here has no time"
    assert after.notes["spaces"] == before.notes["spaces"]


def test_a_prediction_that_passes_is_measured_from_then_on(tmp_path, evidence):
    winner = Finalist("triton", dict(BEST), predicted_ms=0.5)
    nothing = {"default_time_ms": None, "interval": None, "status": VerdictStatus.PREDICTED, "finalists": (winner,)}
    shop = Shop(tmp_path / "r.db", [imported(evidence[0], **nothing)])
    assert outcomes(shop.look(VERIFY, FakeRunner(valley))) == {Outcome.KEPT}
    assert shop.verdict().status is VerdictStatus.MEASURED
    assert shop.verdict().time_ms == pytest.approx(1.0, rel=0.02)


def test_what_a_broken_process_says_cannot_move_the_cursor(tmp_path, evidence):
    shop = Shop(tmp_path / "r.db", evidence[:1])
    (finding,) = shop.look(VERIFY, Flaky(Failure.WRONG_ANSWER, "max\x1b[31m error\nof 3")).values()
    assert finding.reason.isprintable()


@pytest.mark.parametrize("failure", [Failure.WRONG_ANSWER, Failure.NOT_REPEATABLE, Failure.WORKER_DIED])
def test_an_import_whose_winner_fails_is_quarantined_with_the_reason(tmp_path, evidence, failure):
    shop = Shop(tmp_path / "r.db", [imported(evidence[0])])
    (finding,) = shop.look(VERIFY, FakeRunner(times({WINNER: failure}))).values()
    (revocation,) = shop.revocations()
    assert finding.outcome is Outcome.QUARANTINED
    assert f"injected {failure}" in finding.reason
    assert finding.reason in revocation.reason
    assert "verify, M64,H64" in revocation.reason
    assert (revocation.config, revocation.kernel, revocation.triton) == (dict(BEST), OP.digest, "==3.8.0")
    assert not shop.verdict().trusted
    assert DenyList([revocation], "3.8.0").winner(shop.verdict()) is not None
    assert shop.look(VERIFY, FakeRunner(valley)) == {}, "it is not looked at again"


@pytest.mark.parametrize("winner", [WINNER, DEFAULT], ids=["winner", "default"])
def test_a_winner_that_fails_as_a_finalist_is_quarantined(tmp_path, evidence, winner):
    verdict = evidence[0]
    first = next(each for each in verdict.finalists if each.config == dict(winner.config))
    finalists = (first, *(each for each in verdict.finalists if each is not first))
    shop = Shop(tmp_path / "r.db", [dataclasses.replace(verdict, finalists=finalists)])
    runner = FakeRunner(valley)
    runner.unsound = {winner: Failure.WRONG_ANSWER}
    assert outcomes(shop.look(VERIFY, runner)) == {Outcome.QUARANTINED}
    (revocation,) = shop.revocations()
    assert "wrong answer: found late" in revocation.reason
    assert revocation.config == dict(winner.config)


def test_what_was_revoked_for_one_problem_is_not_run_for_the_next(shop):
    runner = FakeRunner(times({WINNER: Failure.WRONG_ANSWER}))
    findings = shop.look(VERIFY, runner)
    assert len(findings) == len(PROBLEMS)
    assert outcomes(findings) == {Outcome.QUARANTINED}
    assert runner.attempted.count(WINNER) == 1


class Flaky(FakeRunner):
    """Its winner fails once, with these words."""

    def __init__(self, failure, reason, often=1):
        super().__init__(valley)
        self.failure, self.reason, self.often = failure, reason, often

    def attempt(self, candidate, most_ms):
        if candidate == WINNER and self.often:
            self.often -= 1
            return Attempt(self.failure, self.reason)
        return super().attempt(candidate, most_ms)


def test_a_crash_that_does_not_come_again_is_not_held_against_the_winner(tmp_path, evidence):
    shop = Shop(tmp_path / "r.db", evidence[:1])
    assert outcomes(shop.look(VERIFY, Flaky(Failure.WORKER_DIED, "killed by signal 9"))) == {Outcome.KEPT}
    assert shop.revocations() == []


def test_a_wrong_answer_is_held_against_it_at_once(tmp_path, evidence):
    shop = Shop(tmp_path / "r.db", evidence[:1])
    assert outcomes(shop.look(VERIFY, Flaky(Failure.WRONG_ANSWER, "max error 3"))) == {Outcome.QUARANTINED}


def test_no_memory_is_no_reason_to_quarantine(tmp_path, evidence):
    shop = Shop(tmp_path / "r.db", evidence[:1])
    runner = Flaky(Failure.OUT_OF_RESOURCES, "CUDA out of memory. Tried to allocate 2 GiB", often=9)
    (finding,) = shop.look(VERIFY, runner).values()
    assert finding.outcome is Outcome.FAILED
    assert "out of memory" in finding.reason
    assert (shop.verdict(), shop.revocations()) == (evidence[0], [])


def test_where_pytorchs_own_call_fails_nobody_is_accused(tmp_path, evidence):
    shop = Shop(tmp_path / "r.db", evidence[:1])
    runner = FakeRunner(times({TORCH: Failure.RUN_ERROR, WINNER: Failure.RUN_ERROR}))
    assert outcomes(shop.look(VERIFY, runner)) == {Outcome.FAILED}
    assert shop.revocations() == []


def test_an_import_that_is_slower_here_gives_way_to_what_beat_it(tmp_path, evidence):
    shop = Shop(tmp_path / "r.db", [imported(evidence[0])])
    (finding,) = shop.look(VERIFY, FakeRunner(times({WINNER: 3.0, DEFAULT: 0.9}))).values()
    assert finding.outcome is Outcome.DEMOTED
    after = shop.verdict()
    assert after.trusted
    assert after.finalists[0].key != evidence[0].finalists[0].key
    assert after.time_ms < 3.0
    assert "takes 3" in after.notes["checked"]["reason"]
    assert cut_short(after), "another tune searches again"


class SlowAtFirst(FakeRunner):
    """The winner is slow in the first process alone."""

    def _confirmed(self, candidate, rounds):
        found = super()._confirmed(candidate, rounds)
        if candidate == WINNER and not self.confirmed[-1][1]:
            return dataclasses.replace(found, samples_ms=tuple(9 * each for each in found.samples_ms))
        return found


def test_what_a_fresh_process_does_not_see_demotes_nothing(tmp_path, evidence):
    shop = Shop(tmp_path / "r.db", evidence[:1])
    runner = SlowAtFirst(valley)
    assert outcomes(shop.look(VERIFY, runner)) == {Outcome.KEPT}
    assert [fresh for _, fresh in runner.confirmed] == [False, True]
    assert Config(shop.verdict().config) == BEST


# Real workers


def test_a_stranger_that_hangs_or_kills_its_process_is_quarantined_and_nothing_stays_behind(tmp_path, evidence):
    from test_injected_failures import FAILING, alive

    def claims(kind):
        winner = Finalist("triton", {"kind": kind, "n": 1}, time_ms=0.1)
        default = Finalist("triton", {"kind": "good", "n": 0}, time_ms=1.0, default=True)
        problem = FAILING.problem(64 + len(kind), 48, 2, kind=kind)
        more = {"finalists": (winner, default), "default_time_ms": 1.0, "sources": {}, "kernel": FAILING.digest}
        return imported(evidence[0], op=FAILING.name, problem=problem.key, **more)

    kinds = ("ignored_sigterm", "killed_worker", "good")
    mark = f"of_{tmp_path.name}"
    shop = Shop(tmp_path / "r.db", [claims(kind) for kind in kinds], FAILING)
    runner = GpuRunner(0, limits=Limits(attempt_s=1.5, confirm_s=30), modules=[mark], worker="toy_worker")
    findings = {problem.kind: each for problem, each in shop.look(VERIFY, runner, ENVIRONMENT).items()}
    assert {kind: each.outcome for kind, each in findings.items()} == {
        "ignored_sigterm": Outcome.QUARANTINED,
        "killed_worker": Outcome.QUARANTINED,
        "good": Outcome.KEPT,
    }
    assert "no result within 1.5 s" in findings["ignored_sigterm"].reason
    assert alive(mark) == 0


def test_a_strangers_wrong_kernel_is_seen_by_the_tuners_own_verification(tmp_path, evidence):
    import wrong_op

    op = wrong_op.WRONG
    kind = next(name for name in op.tunable.space.axes["kind"] if name != "good")
    winner = Finalist("triton", {"kind": kind, "n": 0}, time_ms=0.1)
    default = Finalist("triton", {"kind": "good", "n": 0}, time_ms=1.0, default=True)
    more = {"finalists": (winner, default), "default_time_ms": 1.0, "sources": {}, "kernel": op.digest}
    problem = op.problem(64, 48, 1, kind=kind)
    shop = Shop(tmp_path / "r.db", [imported(evidence[0], op=op.name, problem=problem.key, **more)], op)
    runner = GpuRunner(0, modules=["wrong_op", "registered"], worker="cpu_worker")
    (finding,) = shop.look(VERIFY, runner, ENVIRONMENT).values()
    assert finding.outcome is Outcome.QUARANTINED
    assert finding.reason.startswith("wrong answer: ")
    assert not shop.verdict(problem).trusted


# Audit


def test_an_audit_leaves_what_holds_as_it_is_and_looks_at_it_once(shop, evidence):
    runner = FakeRunner(valley)
    assert outcomes(shop.look(AUDIT, runner)) == {Outcome.KEPT}
    assert set(runner.attempted) == {WINNER, TORCH}
    assert runner.confirmed == []
    assert [shop.verdict(problem) for problem in PROBLEMS] == evidence
    assert shop.look(AUDIT, FakeRunner(valley)) == {}
    assert len(shop.look(AUDIT, FakeRunner(valley), {**LATER, "triton": "3.9.0"})) == len(PROBLEMS)


def test_a_winner_that_became_slow_is_demoted_and_one_that_became_wrong_is_quarantined(tmp_path, evidence):
    shop = Shop(tmp_path / "r.db", evidence[:1])
    (slow,) = shop.look(AUDIT, FakeRunner(times({WINNER: 1.5}))).values()
    assert slow.outcome is Outcome.DEMOTED
    assert Config(shop.verdict().config) != BEST
    assert shop.verdict().environment == Environment(LATER)
    shop = Shop(tmp_path / "other.db", evidence[:1])
    assert outcomes(shop.look(AUDIT, FakeRunner(times({WINNER: Failure.WRONG_ANSWER})))) == {Outcome.QUARANTINED}


def test_a_winner_that_became_slow_and_is_still_the_best_stays(tmp_path, evidence):
    shop = Shop(tmp_path / "r.db", evidence[:1])
    slower = FakeRunner(lambda c: valley(c) * (1.3 if c.implementation == "triton" else 1.0))
    assert outcomes(shop.look(AUDIT, slower)) == {Outcome.KEPT}
    assert shop.verdict() == evidence[0]


def test_a_gpu_that_is_slower_as_a_whole_costs_no_second_look(shop):
    runner = FakeRunner(lambda c: 1.1 * valley(c))
    assert outcomes(shop.look(AUDIT, runner)) == {Outcome.KEPT}
    assert set(runner.attempted) == {WINNER, TORCH}


def test_pytorch_that_gained_and_is_still_behind_costs_no_second_look(shop):
    runner = FakeRunner(times({TORCH: 0.7}))
    assert outcomes(shop.look(AUDIT, runner)) == {Outcome.KEPT}
    assert set(runner.attempted) == {WINNER, TORCH}


def test_pytorch_that_got_ahead_serves(shop):
    findings = shop.look(AUDIT, FakeRunner(times({TORCH: 0.4})))
    assert outcomes(findings) == {Outcome.DEMOTED}
    assert {each.served for each in findings.values()} == {"torch"}


def test_an_audit_that_is_interrupted_goes_on_with_the_rest(shop):
    class Stopping(FakeRunner):
        def prepare(self, op, problem):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    runner = Stopping(valley)
    runner.left = 3
    with pytest.raises(KeyboardInterrupt):
        shop.look(AUDIT, runner)
    assert len(shop.look(AUDIT, FakeRunner(valley))) == len(PROBLEMS) - 2


def test_what_the_budget_does_not_reach_is_said_and_stays(shop):
    clock = Clock()
    findings = shop.look(AUDIT, TimedRunner(clock, valley, prepare=10.0), budget_s=18.0, clock=clock)
    said = [each.outcome for each in findings.values()]
    assert said == [Outcome.KEPT] * 2 + [Outcome.NOT_REACHED] * 2
    assert clock.now <= 22
    assert len(shop.look(AUDIT, FakeRunner(valley))) == 2


def test_the_like_of_what_regressed_comes_next_nearest_first(shop):
    found = {each.problem: each for each in subjects(shop.layers, shop.bench(None), AUDIT)}
    far, near, nearest, regressed = (found[problem] for problem in (PROBLEMS[0], *PROBLEMS[1:]))
    other = dataclasses.replace(far, winner=TORCH)
    assert nearest_first([other, far, near, nearest], regressed) == [nearest, near, far, other]


def test_an_audit_goes_on_with_the_like_of_what_regressed(shop):
    class OneSlow(FakeRunner):
        def prepare(self, op, problem):
            self._time_ms = times({WINNER: 1.5}) if problem == first else valley

    order = [each.problem for each in sampled(subjects(shop.layers, shop.bench(None), AUDIT), 0)]
    first, *rest = order
    near = sorted(rest, key=first.distance)
    assert near != rest
    findings = shop.look(AUDIT, OneSlow(valley))
    assert list(findings) == [first, *near]
    assert [each.outcome for each in findings.values()] == [Outcome.DEMOTED] + [Outcome.KEPT] * len(rest)


def test_a_sample_prefers_what_programs_use(shop):
    used = PROBLEMS[0]
    with shop.layers.writer() as registry:
        registry.count_misses([Miss(OP.name, used.key, Device(*GPU.identity), 1000, 1.0)])
    found = subjects(shop.layers, shop.bench(None), AUDIT)
    assert (found[0].problem, found[0].weight) == (used, 1.0)
    assert all(sampled(found, seed)[0].problem == used for seed in range(20))
    alike = [dataclasses.replace(each, weight=1.0) for each in found]
    assert {sampled(alike, seed)[0].problem for seed in range(40)} == set(PROBLEMS)


def test_what_would_not_be_served_whatever_is_found_is_left_out(tmp_path, evidence):
    other = dataclasses.replace(evidence[0], device=Device("NVIDIA A100", "sm_80", 108))
    retired = dataclasses.replace(evidence[1], kernel="0" * 64)
    shop = Shop(tmp_path / "r.db", [other, retired, evidence[2]])
    assert [each.verdict.problem for each in subjects(shop.layers, shop.bench(None), VERIFY)] == [evidence[2].problem]
    assert subjects(shop.layers, shop.bench(None, ENVIRONMENT), VERIFY) == [], "nothing has changed"


def test_another_python_makes_nothing_stale(tmp_path, evidence):
    shop = Shop(tmp_path / "r.db", [dataclasses.replace(evidence[0], environment=Environment({"python": "3.11"}))])
    assert subjects(shop.layers, shop.bench(None, {"python": "3.12"}), VERIFY) == []


# Recorded sweeps


@pytest.fixture(scope="module")
def program():
    path = Path(__file__).parents[2] / "benchmarks" / "audit.py"
    spec = importlib.util.spec_from_file_location("audit_program", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_planted_regressions_of_recorded_sweeps_are_found_and_none_of_the_others_is_demoted(program):
    names = ("mlp_act_bwd-M4096-H768-I3072-bf16", "attention_fwd-B4-H16-S2048-D64-bf16")
    sweeps = [program.read(program.SWEEPS / f"{name}.jsonl") for name in names]
    verdicts = [each for sweep in sweeps for each in program.tuned(sweep, options=Options(trials=12))]
    total = program.summary([program.judge(verdicts, seed) for seed in range(5)])
    assert total["regressed"] >= 4
    assert (total["missed"], total["false"]) == (0, 0)
    short = program.judge(verdicts, 0, share=0.05)
    assert short["looked_at"] < short["verdicts"]
    assert short["false"] == 0


def test_the_figures_that_are_told_of_the_audit_are_those_of_its_program(program):
    assert program.reached(json.loads((program.RESULTS).read_text(encoding="utf-8")))
