"""Verdicts of strangers, of before and of nobody, verified here: what passes is one's own, what fails is not served."""

import dataclasses

import pytest
from audit_samples import DEFAULT, LATER, OP, PROBLEMS, TORCH, WINNER, Shop, imported, outcomes, times
from fakes import ENVIRONMENT, FakeRunner
from test_session import BEST, valley

from tilebook.op import Config
from tilebook.registry import DenyList, Environment, Failure, Finalist, VerdictStatus
from tilebook.registry.searched import cut_short
from tilebook.tuner.audit.subjects import VERIFY, Outcome
from tilebook.tuner.process.runner import Attempt, GpuRunner, Limits


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


@pytest.mark.usefixtures("forked")
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
