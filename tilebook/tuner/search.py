"""The search over one space: Optuna proposes, every proposal is turned into a feasible config not tried before."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna

from tilebook.op import Config, Space, UsageError

# TPE ignores failed trials; told a large finite value, it keeps away from where they are.
INFEASIBLE_MS = 1e6

_Params = tuple[int, ...]


def sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """An Optuna sampler by name: `tpe` (ours: multivariate, grouped, with a constant liar), `random`, or any other
    class of `optuna.samplers` without its suffix (`cmaes`, `gp`, `nsgaii` …). Raises UsageError on an unknown one."""
    kinds = {
        label.removesuffix("Sampler").lower(): kind
        for label, kind in vars(optuna.samplers).items()
        if label.endswith("Sampler") and label not in ("BaseSampler", "GridSampler", "PartialFixedSampler")
    }
    if name not in kinds:
        raise UsageError(f"no search {name!r}; there are {', '.join(sorted([*kinds, 'grid']))}")
    options: dict[str, Any] = {"seed": seed} if "seed" in inspect.signature(kinds[name]).parameters else {}
    if name == "tpe":
        options |= {"multivariate": True, "group": True, "constant_liar": True, "n_startup_trials": 16}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return kinds[name](**options)


class Search:
    """Ask/tell over the feasible configs of a space.

    Axes are searched as ordered integers (the index of the value). Seeds come first, in order. What Optuna proposes
    twice, or outside the feasible set, is replaced by the nearest config not yet asked for.
    """

    def __init__(
        self, space: Space, feasible: Sequence[Config], seeds: Iterable[Config], method: str = "tpe", seed: int = 0
    ) -> None:
        self._space = space
        self._axes = {axis: values for axis, values in space.axes.items() if len(values) > 1}
        self._left: dict[_Params, Config] = {self._index(config): config for config in feasible}
        self._feasible = frozenset(self._left)
        self._queue = [config for config in dict.fromkeys(seeds) if self._index(config) in self._left]
        self._open: dict[Config, optuna.trial.Trial | None] = {}
        self._told: set[Config] = set()
        self._times: dict[Config, float] = {}
        self._study: optuna.Study | None = None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if method != "grid":
            self._study = optuna.create_study(sampler=sampler(method, seed))

    @property
    def exhausted(self) -> bool:
        """Has every feasible config been asked for?"""
        return not self._left

    @property
    def best(self) -> tuple[Config, float] | None:
        return min(self._times.items(), key=lambda item: item[1]) if self._times else None

    def told(self, config: Config) -> bool:
        """Is it known how this config did?"""
        return config in self._told

    def ask(self, n: int) -> list[Config]:
        """Up to `n` feasible configs not asked for before."""
        batch: list[Config] = []
        while len(batch) < n and self._left:
            if self._queue:
                config, trial = self._queue.pop(0), None
            elif self._study is None:
                config, trial = next(iter(self._left.values())), None
            else:
                config, trial = self._propose(self._study)
            if self._left.pop(self._index(config), None) is not None:
                self._open[config] = trial
                batch.append(config)
        return batch

    def _propose(self, study: optuna.Study) -> tuple[Config, optuna.trial.Trial | None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = study.ask({a: optuna.distributions.IntDistribution(0, len(v) - 1) for a, v in self._axes.items()})
        wanted = tuple(int(trial.params[axis]) for axis in self._axes)
        if wanted in self._left:
            return self._left[wanted], trial
        if wanted in self._feasible:  # proposed again: what it was told before stands
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, INFEASIBLE_MS)
        nearest = min(self._left, key=lambda at: (sum(abs(a - b) for a, b in zip(at, wanted, strict=True)), at))
        return self._left[nearest], None

    def tell(self, config: Config, time_ms: float | None) -> None:
        """The time of a config, or None where it turned out not to run, or not to be right."""
        trial = self._open.pop(config, None)
        self._told.add(config)
        self._left.pop(self._index(config), None)
        if time_ms is not None:
            self._times[config] = time_ms
        if self._study is None:
            return
        value = INFEASIBLE_MS if time_ms is None else time_ms
        if trial is not None:
            self._study.tell(trial, value)
            return
        distributions: Mapping[str, Any] = {
            axis: optuna.distributions.IntDistribution(0, len(values) - 1) for axis, values in self._axes.items()
        }
        params = dict(zip(self._axes, self._index(config), strict=True))
        made = optuna.trial.create_trial(params=params, distributions=dict(distributions), value=value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.add_trial(made)

    def polish(self, config: Config) -> list[Config]:
        """The feasible configs one step from this one that nobody has asked for; they count as asked for now."""
        near = [each for each in self._space.neighbours(config) if self._index(each) in self._left]
        for each in near:
            del self._left[self._index(each)]
            self._open[each] = None
        return near

    def _index(self, config: Config) -> _Params:
        return tuple(values.index(config[axis]) for axis, values in self._axes.items())
