"""Tunes injected candidates through the real session into a real registry, and says what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakes import ENVIRONMENT, GPU, FakePool
from injected import Pair

from tilebook.op import Config, Op
from tilebook.registry import Layers, Registry, Status
from tilebook.tuner.known import Known
from tilebook.tuner.progress import ProblemState, Run
from tilebook.tuner.session import Options, Session
from tilebook.tuner.shards import tune_all


@dataclass
class Outcome:
    """What became of the bad candidates of one tune."""

    states: list[ProblemState]
    classes: Counter[str]  # of the failures; "passed" where one did not fail
    served: int  # verdicts that a bad candidate has won
    listed: int  # bad candidates among the finalists of verdicts, what to fall back on
    verdicts: int
    reasons: list[str]

    @property
    def aborted(self) -> int:
        """Problems that ended without a verdict."""
        return len(self.states) - self.verdicts


class _Lent:
    """A runner that outlives the session."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def close(self) -> None: ...


def tune_injected(
    path: Path, op: Op[Pair], problems: Sequence[Pair], runner: Any, gpu: Any = GPU, environment: Any = ENVIRONMENT
) -> Outcome:
    """Tunes the problems with this runner into a registry of their own at `path`, and reads it back.

    The runner stays open. A candidate counts with what became of it last: a finalist may pass as a trial and fail then.
    """
    layers = Layers([("explicit", str(path))])
    with layers.writer() as registry:
        options, run = Options(method="grid", rounds=10), Run(len(problems), True)
        known = Known(registry, layers, gpu, environment, "graph")
        session = Session(gpu, known, FakePool(), _Lent(runner), options, run)
        states = tune_all([session], [(op, problem) for problem in problems], run)
    with Registry.open(path) as registry:
        trials = sorted(registry.trials(), key=lambda trial: trial.created_at)
        last = {(t.problem, Config(t.config)): t for t in trials if t.implementation == "triton"}
        bad = [trial for (_, config), trial in last.items() if config["kind"] != "good"]
        verdicts = registry.verdicts()
    winners = [verdict.config for verdict in verdicts]
    named = [config for verdict in verdicts for _, config in verdict.ranking()]
    return Outcome(
        states,
        Counter("passed" if t.status is Status.OK else str(t.failure) for t in bad),
        sum(config.get("kind", "good") != "good" for config in winners),
        sum(config.get("kind", "good") != "good" for config in named),
        len(verdicts),
        [t.reason for t in bad],
    )
