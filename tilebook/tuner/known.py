"""What the registry knows about a problem before it is tuned, and the one way to tell it more."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from tilebook import provenance
from tilebook import registry as store
from tilebook.device import Device, package_version
from tilebook.op import Config, Implementation, Op, Problem, Space
from tilebook.registry import Json, Layers, Registry, Trial, Verdict, canonical
from tilebook.registry.searched import observed

PREDICTED = "predicted"
"""The mode of a run that compiles and ranks by the performance model, and measures nothing."""

_SEEDS_FROM_NEIGHBOURS = 4
_LINE = 1000  # hex digits in one string of the evidence, which may not be longer than 4,000 characters


@dataclass(frozen=True)
class Field:
    """What of a tunable implementation's space may run for one problem: the feasible configs that are not revoked.

    infeasible, revoked: how many of its configs are not among them, and why.
    """

    implementation: Implementation
    feasible: list[Config]
    infeasible: int = 0
    revoked: int = 0

    @property
    def name(self) -> str:
        return self.implementation.name

    @property
    def space(self) -> Space:
        assert self.implementation.space is not None
        return self.implementation.space


class Known:
    """The registry as the sessions of one run share it: one writer, whichever thread it is called from.

    mode: how samples are taken (see `measure.Mode`), or PREDICTED. Trials and verdicts of another mode, or of another
    environment, do not answer this run's question.
    """

    def __init__(
        self, registry: Registry, layers: Layers, gpu: Device, environment: Mapping[str, str], mode: str
    ) -> None:
        self.device = store.Device(*gpu.identity)
        self.environment = store.Environment(dict(environment))
        self.made = provenance.made()
        self.mode = mode
        self._registry, self._layers = registry, layers
        self._denied = store.DenyList(
            (revocation for _, revocation in layers.revocations()), self.environment.versions.get("triton", "")
        )
        self._writing = threading.Lock()

    def beside(self, gpu: Device, environment: Mapping[str, str], machine: str) -> Known:
        """The same registry as sessions on another machine see it, with another GPU model, say; written in turns."""
        other = copy(self)
        other.device = store.Device(*gpu.identity)
        other.environment = store.Environment(dict(environment))
        other.made = {**self.made, "machine": machine}
        return other

    def record(self, trials: Iterable[Trial] = (), verdict: Verdict | None = None) -> None:
        with self._writing:
            self._registry.record(trials, verdict)

    def revoked(self, implementation: Implementation, config: Mapping[str, store.ConfigValue]) -> bool:
        op = implementation.op.name
        return self._denied.find(op, implementation.digest, self.device.arch, implementation.name, config) is not None

    def field(self, implementation: Implementation, problem: Problem, gpu: Device) -> Field:
        """What of an implementation's space may run here."""
        assert implementation.space is not None
        runnable = implementation.space.feasible(problem, gpu)
        feasible = [config for config in runnable if not self.revoked(implementation, config)]
        return Field(implementation, feasible, len(implementation.space) - len(runnable), len(runnable) - len(feasible))

    def standing(self, op: Op[Any], problem: Problem, fields: Sequence[Field] = ()) -> Verdict | None:
        """The verdict that answers this run's question already, though perhaps for smaller spaces, or fewer.

        fields: what may run now, where that is known; a verdict whose winner is not among it does not count.
        """
        feasible = {each.name: each.feasible for each in fields}
        found = self._registry.verdicts(op=op.name, problem=problem.key, device=self.device, kernel=op.digest)
        for verdict in found:
            if not verdict.trusted or observed(verdict) or self._denied.winner(verdict) is not None:
                continue  # somebody else's word, what a program has seen, or proved wrong since
            if Config(verdict.config) not in feasible.get(verdict.implementation, [Config(verdict.config)]):
                continue  # the space has changed its mind since
            same = verdict.environment == self.environment
            if self.mode == PREDICTED:
                if verdict.measured or same:
                    return verdict
            elif verdict.measured and same and verdict.mode == self.mode:
                return verdict
        return self._measured(op, problem) if self.mode == PREDICTED else None

    def _measured(self, op: Op[Any], problem: Problem) -> Verdict | None:
        """What any layer has measured of the problem, as what ships may: no prediction is served beside it."""
        for _, verdict in self._layers.verdicts(op=op.name, problem=problem.key, device=self.device):
            told = verdict.measured and verdict.trusted and verdict.kernel == op.digest and not observed(verdict)
            if told and self._denied.winner(verdict) is None:
                return verdict
        return None

    def seeds(self, op: Op[Any], problem: Problem, field: Field) -> list[Config]:
        """An implementation's best on the nearest problems, on this GPU first, then on GPUs of its architecture."""
        ranked = []
        for _, verdict in self._layers.verdicts(op=op.name):
            if verdict.device.arch != self.device.arch:
                continue
            try:
                distance = problem.distance(op.problem.from_key(verdict.problem))
            except (TypeError, ValueError):
                continue
            its = [Config(c) for name, c in verdict.ranking() if name == field.name and field.space.contains(c)]
            if its and distance < float("inf"):
                ranked.append((verdict.device != self.device, distance, its[0]))
        ranked.sort(key=lambda each: each[:2])
        return [config for _, _, config in ranked[:_SEEDS_FROM_NEIGHBOURS]]

    def trials(self, op: Op[Any], problem: Problem, field: Field) -> dict[Config, Trial]:
        """What is known of each config from runs before, in the order in which they were first tried: same kernel,
        environment and mode. The last word on a config counts: a finalist may have failed its confirmation."""
        wanted, found = frozenset(field.feasible), dict[Config, Trial]()
        kernel = trial_kernel(field.implementation)
        for trial in self._registry.trials(
            op=op.name, problem=problem.key, device=self.device, kernel=kernel, origin="local"
        ):
            config = Config(trial.config)
            mode = trial.facts.get("mode", PREDICTED if "predicted_ms" in trial.facts else "graph")
            its = trial.implementation == field.name and trial.environment == self.environment
            if its and config in wanted and mode == self.mode:
                found[config] = trial
        return found


def source_of(implementation: Implementation) -> str:
    """What a tunable implementation's times depend on: the digest of our source, or its package and the version."""
    return implementation.digest or f"{implementation.external} {package_version(implementation.external)}"


def trial_kernel(implementation: Implementation) -> str:
    """The digest that an implementation's trials are stored under; what has no space goes with the op's own kernel."""
    if implementation.external:
        return hashlib.sha256(source_of(implementation).encode()).hexdigest()
    return implementation.digest or implementation.op.digest


def searched(space: Space, feasible: Iterable[Config]) -> dict[str, Json]:
    """What a verdict's evidence says of the space behind it: its axes, and one bit for each feasible point."""
    bits = sum(1 << place for config in feasible if (place := _place(space.axes, config, space.later)) is not None)
    content: dict[str, Json] = {"axes": {axis: list(values) for axis, values in space.axes.items()}}
    digits = f"{bits:x}"
    content["feasible"] = [digits[at : at + _LINE] for at in range(0, len(digits), _LINE)]
    return {"digest": hashlib.sha256(canonical(content).encode()).hexdigest()[:16], **content}


def unsearched(verdict: Verdict, field: Field) -> list[Config] | None:
    """The feasible configs that were not in the space this verdict was chosen from: all of them where the
    implementation was not searched then, or has other source now. None where it had them all, or, of our own kernel,
    where the verdict does not say, as those of old do not."""
    ours = field.name == field.implementation.op.tunable.name
    spaces: Any = verdict.notes.get("spaces")
    then: Any = spaces.get(field.name) if isinstance(spaces, dict) else verdict.notes.get("space") if ours else None
    if not isinstance(then, dict):
        return None if ours else field.feasible
    if source_of(field.implementation) != verdict.source_of(field.name):
        return field.feasible
    if then.get("digest") == searched(field.space, field.feasible)["digest"]:
        return None
    try:
        bits = int("".join(then["feasible"]), 16)
        later = field.space.later
        places = ((config, _place(then["axes"], config, later)) for config in field.feasible)
        return [config for config, place in places if place is None or not bits >> place & 1] or None
    except (KeyError, ValueError):  # it leaves out which points there were, as what ships does
        return field.feasible


def _place(axes: Mapping[str, Sequence[Any]], config: Mapping[str, Any], later: Mapping[str, Any]) -> int | None:
    """A config's number in the space with these axes, whatever the order they are written in; None where it is not.

    later: what the config means by an axis that it leaves out (see `Space`).
    """
    if not config.keys() <= axes.keys() <= config.keys() | later.keys():
        return None
    place = 0
    for axis in sorted(axes):
        value = config[axis] if axis in config else later[axis]
        if value not in axes[axis]:
            return None
        place = place * len(axes[axis]) + axes[axis].index(value)
    return place
