"""What the registry knows about a problem before it is tuned, and the one way to tell it more."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tilebook import registry as store
from tilebook.device import Device
from tilebook.op import Config, Op, Problem, Space
from tilebook.registry import Json, Layers, Registry, Trial, Verdict, canonical

PREDICTED = "predicted"
"""The mode of a run that compiles and ranks by the performance model, and measures nothing."""

_SEEDS_FROM_NEIGHBOURS = 4
_LINE = 1000  # hex digits in one string of the evidence, which may not be longer than 4,000 characters


class Known:
    """The registry as the sessions of one run share it: one writer, whichever thread it is called from.

    mode: how samples are taken (see `measure.Mode`), or PREDICTED. Trials and verdicts of another mode, or of another
    environment, do not answer this run's question.
    """

    def __init__(
        self, registry: Registry, layers: Layers, gpu: Device, environment: Mapping[str, str], mode: str
    ) -> None:
        self.device = store.Device(gpu.name, gpu.arch, gpu.sm_count)
        self.environment = store.Environment(dict(environment))
        self.mode = mode
        self._registry, self._layers = registry, layers
        self._denied = store.DenyList(layers.revocations(), self.environment.versions.get("triton", ""))
        self._writing = threading.Lock()

    def record(self, trials: Iterable[Trial] = (), verdict: Verdict | None = None) -> None:
        with self._writing:
            self._registry.record(trials, verdict)

    def revoked(self, op: Op[Any], implementation: str, config: Mapping[str, store.ConfigValue]) -> bool:
        return self._denied.find(op.name, op.digest, self.device.arch, implementation, config) is not None

    def standing(self, op: Op[Any], problem: Problem, feasible: Sequence[Config]) -> Verdict | None:
        """The verdict that answers this run's question already, though perhaps for a smaller space."""
        found = self._registry.verdicts(op=op.name, problem=problem.key, device=self.device, kernel=op.digest)
        for verdict in found:
            if not verdict.trusted or self._denied.winner(verdict) is not None:
                continue  # somebody else's word, or proved wrong since
            if verdict.implementation == op.tunable.name and Config(verdict.config) not in feasible:
                continue  # the space has changed its mind since
            same = verdict.environment == self.environment
            if self.mode == PREDICTED:
                if verdict.measured or same:
                    return verdict
            elif verdict.measured and same and verdict.evidence.get("mode", "graph") == self.mode:
                return verdict
        return None

    def seeds(self, op: Op[Any], problem: Problem) -> list[Config]:
        """Winners of the nearest problems on this GPU first, then on GPUs of the same architecture."""
        space, ranked = op.tunable.space, []
        for _, verdict in self._layers.verdicts(op=op.name):
            if verdict.device.arch != self.device.arch:
                continue
            try:
                distance = problem.distance(op.problem.from_key(verdict.problem))
            except (TypeError, ValueError):
                continue
            ours = [
                Config(c) for name, c in verdict.ranking() if name == op.tunable.name and space and space.contains(c)
            ]
            if ours and distance < float("inf"):
                ranked.append((verdict.device != self.device, distance, ours[0]))
        ranked.sort(key=lambda each: each[:2])
        return [config for _, _, config in ranked[:_SEEDS_FROM_NEIGHBOURS]]

    def trials(self, op: Op[Any], problem: Problem, feasible: Sequence[Config]) -> dict[Config, Trial]:
        """What is known of each config from runs before, in the order in which they were first tried: same kernel,
        environment and mode. The last word on a config counts: a finalist may have failed its confirmation."""
        wanted, found = frozenset(feasible), dict[Config, Trial]()
        for trial in self._registry.trials(
            op=op.name, problem=problem.key, device=self.device, kernel=op.digest, origin="local"
        ):
            config = Config(trial.config)
            mode = trial.facts.get("mode", PREDICTED if "predicted_ms" in trial.facts else "graph")
            ours = trial.implementation == op.tunable.name and trial.environment == self.environment
            if ours and config in wanted and mode == self.mode:
                found[config] = trial
        return found


def searched(space: Space, feasible: Iterable[Config]) -> dict[str, Json]:
    """What a verdict's evidence says of the space behind it: its axes, and one bit for each feasible point."""
    bits = sum(1 << place for config in feasible if (place := _place(space.axes, config)) is not None)
    content: dict[str, Json] = {"axes": {axis: list(values) for axis, values in space.axes.items()}}
    digits = f"{bits:x}"
    content["feasible"] = [digits[at : at + _LINE] for at in range(0, len(digits), _LINE)]
    return {"digest": hashlib.sha256(canonical(content).encode()).hexdigest()[:16], **content}


def unsearched(verdict: Verdict, space: Space, feasible: Sequence[Config]) -> list[Config] | None:
    """The feasible configs that were not in the space this verdict was chosen from; None where it had
    them all, or where the verdict does not say, as those of old do not."""
    then: Any = verdict.evidence.get("space")
    if not isinstance(then, dict) or then.get("digest") == searched(space, feasible)["digest"]:
        return None
    try:
        bits = int("".join(then["feasible"]), 16)
        new = [c for c in feasible if (place := _place(then["axes"], c)) is None or not bits >> place & 1]
        return new or None
    except (AttributeError, KeyError, TypeError, ValueError):  # evidence is free-form, and may be somebody else's
        return None


def _place(axes: Mapping[str, Sequence[Any]], config: Mapping[str, Any]) -> int | None:
    """A config's number in the space with these axes, whatever the order they are written in; None where it is not."""
    if set(config) != set(axes):
        return None
    place = 0
    for axis in sorted(axes):
        if config[axis] not in axes[axis]:
            return None
        place = place * len(axes[axis]) + axes[axis].index(config[axis])
    return place
