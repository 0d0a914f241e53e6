"""A registry whose verdicts are looked at again, on a GPU that answers from a formula."""

import dataclasses

import pytest
from fakes import ENVIRONMENT, GPU, FakeRunner, tune
from test_session import BEST, valley
from toy import Scaling, make_op

from tilebook.op import Config
from tilebook.registry import Failure, Finalist, Layers, Registry
from tilebook.tuner.audit.run import Auditor
from tilebook.tuner.audit.subjects import AUDIT, Bench, looked, subjects
from tilebook.tuner.budget import Budget
from tilebook.tuner.process.runner import Candidate

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
