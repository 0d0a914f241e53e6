"""Tunes injected candidates through the real session into a real registry, and says what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakes import ENVIRONMENT, GPU, FakePool
from injected import Pair

from tilebook.op import Op
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
    served: int  # verdicts that name a bad candidate, as winner or as evidence
    verdicts: int
    reasons: list[str]

    @property
    def aborted(self) -> int:
        """Problems that ended without a verdict."""
        return len(self.states) - self.verdicts


def tune_injected(
    path: Path, op: Op[Pair], problems: Sequence[Pair], runner: Any, gpu: Any = GPU, environment: Any = ENVIRONMENT
) -> Outcome:
    """Tunes the problems with this runner into a registry of their own at `path`, and reads it back."""
    layers = Layers([("explicit", str(path))])
    with layers.writer() as registry:
        options, run = Options(method="grid", rounds=10), Run(len(problems), True)
        known = Known(registry, layers, gpu, environment, "graph")
        session = Session(gpu, known, FakePool(), runner, options, run)
        states = tune_all([session], [(op, problem) for problem in problems], run)
    with Registry.open(path) as registry:
        bad = [t for t in registry.trials() if t.implementation == "triton" and t.config["kind"] != "good"]
        verdicts = registry.verdicts()
    named = [config for verdict in verdicts for _, config in verdict.ranking()]
    return Outcome(
        states,
        Counter("passed" if t.status is Status.OK else str(t.failure) for t in bad),
        sum(config.get("kind", "good") != "good" for config in named),
        len(verdicts),
        [t.reason for t in bad],
    )
