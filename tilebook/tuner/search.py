"""The search over one space: Optuna and a model of what was measured propose feasible configs not tried before."""

from __future__ import annotations

import inspect
import itertools
import operator
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna

from tilebook.op import Config, Space, UsageError

# TPE ignores failed trials; told a large finite value, it keeps away from where they are.
INFEASIBLE_MS = 1e6

_Params = tuple[int, ...]

_FIRST = 16  # configs around the seeds that are tried before anything is known
_MOVED = (0.3, 0.7)  # of the axes, on which the first and the last of them have another value than their seed
_SPREAD = 8  # drawn for each of them, of which the one unlike all the others is taken
_ENOUGH = 4  # times that the model needs to say anything
_REACH = 1.2  # the distance at which two configs' times have lost all but 1/e of their correlation
_CLIP = 1.5  # ln: how much slower than the best a config may count as; beyond, only that it is hopeless matters
_DRAWN = 512  # unseen configs that the model chooses from, and told ones that it learns from: it must take milliseconds


def promising(told: np.ndarray, log_ms: np.ndarray, under_way: np.ndarray, unseen: np.ndarray) -> int:
    """Which of the `unseen` configs may be the fastest: lowest mean less one deviation of a Gaussian process.

    Rows are configs, each axis scaled to 0 … 1; the correlation of two falls with the steps between them. Configs
    that are under way add certainty but no time, so that the next ones are sought elsewhere.
    """

    def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        apart: np.ndarray = np.abs(one[:, None] - other[None]).sum(-1)
        return np.asarray(np.exp(-apart / _REACH))

    noise, log_ms = 1e-3, np.minimum(log_ms, log_ms.min() + _CLIP)
    mean, deviation = log_ms.mean(), log_ms.std() + 1e-6
    weights = np.linalg.solve(alike(told, told) + noise * np.eye(len(told)), (log_ms - mean) / deviation)
    expected = alike(unseen, told) @ weights
    tried = np.concatenate([told, under_way])
    near = alike(unseen, tried)
    explained = np.linalg.solve(alike(tried, tried) + noise * np.eye(len(tried)), near.T)
    doubt = np.sqrt(np.maximum(1 - np.einsum("ij,ji->i", near, explained), 0.0))
    return int(np.argmin(expected - doubt))


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


def _differing(one: _Params, other: _Params) -> int:
    """Axes on which two configs have other values."""
    return sum(map(operator.ne, one, other))


class Search:
    """Ask/tell over the feasible configs of a space.

    Axes are searched as ordered integers (the index of the value). Seeds come first, in order. With `tpe` a batch of
    configs that differ from them on several axes follows, and then Optuna's proposals alternate with the model's
    (`promising`). A seed outside the feasible set is replaced by the nearest feasible config, which is tried alone;
    what Optuna proposes there, or twice, by the nearest not yet asked for.

    seeds: the feasible configs that it begins with.
    """

    def __init__(
        self, space: Space, feasible: Sequence[Config], seeds: Iterable[Config], method: str = "tpe", seed: int = 0
    ) -> None:
        self._space = space
        self._axes = {axis: values for axis, values in space.axes.items() if len(values) > 1}
        self._left: dict[_Params, Config] = {self._index(config): config for config in feasible}
        self._feasible = frozenset(self._left)
        wanted = [self._index(config) for config in seeds]
        self.seeds = tuple(dict.fromkeys(self._left[self._nearest(at)] for at in wanted if self._left))
        # What a seed is worth does not pass on to a config that only stands in for it, still less to those around that.
        proper = [seed for seed in self.seeds if self._index(seed) in wanted]
        self._queue = list(self.seeds)
        self._open: dict[Config, optuna.trial.Trial | None] = {}
        self._told: set[Config] = set()
        self._times: dict[Config, float] = {}
        self._study: optuna.Study | None = None
        self._random = random.Random(seed)
        self._modelled = method == "tpe"
        self._turn = 0
        if self._modelled:
            self._queue += self._around(proper or self.seeds)
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
            elif self._models_turn():
                config, trial = self._model(), None
            else:
                config, trial = self._propose(self._study)
            if self._left.pop(self._index(config), None) is not None:
                self._open[config] = trial
                batch.append(config)
        return batch

    def _around(self, seeds: Sequence[Config]) -> list[Config]:
        """Configs that have another value than one of the seeds on each of some axes, drawn at random: first on few.

        Any other value and not just the next one, and each unlike those before it: where a seed is no better than the
        rest, what is near it and what is near each other is worse than chance.
        """
        found = [self._index(seed) for seed in seeds]
        sizes = [len(values) for values in self._axes.values()]

        def drawn(share: float) -> Iterator[_Params]:
            for _ in range(100 * _SPREAD):
                at = self._index(self._random.choice(seeds))
                moved = tuple(
                    (x + self._random.randrange(1, size)) % size if self._random.random() < share else x
                    for x, size in zip(at, sizes, strict=True)
                )
                if moved in self._left and moved not in found:
                    yield moved

        for n in range(_FIRST if seeds else 0):
            some = list(itertools.islice(drawn(_MOVED[0] + (_MOVED[1] - _MOVED[0]) * n / (_FIRST - 1)), _SPREAD))
            if some:
                found.append(max(some, key=lambda at: min(_differing(at, other) for other in found)))
        return [self._left[at] for at in found[len(seeds) :]]

    def _models_turn(self) -> bool:
        self._turn += 1
        return self._modelled and self._turn % 2 == 0 and len(self._times) >= _ENOUGH

    def _model(self) -> Config:
        steps = [len(values) - 1 for values in self._axes.values()]

        def scaled(configs: Iterable[_Params]) -> np.ndarray:
            return np.array([[x / n for x, n in zip(at, steps, strict=True)] for at in configs]).reshape(-1, len(steps))

        worst = max(self._times.values())
        told = sorted(self._told, key=lambda config: (self._times.get(config, worst), config.key))[:_DRAWN]
        log_ms = np.log([self._times.get(config, worst) for config in told])
        unseen = list(self._left)
        if len(unseen) > _DRAWN:
            unseen = self._random.sample(unseen, _DRAWN)
        best = promising(scaled(map(self._index, told)), log_ms, scaled(map(self._index, self._open)), scaled(unseen))
        return self._left[unseen[best]]

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
        return self._left[self._nearest(wanted)], None

    def _nearest(self, wanted: _Params) -> _Params:
        return min(self._left, key=lambda at: (sum(abs(a - b) for a, b in zip(at, wanted, strict=True)), at))

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
        return tuple(values.index(self._space.value(config, axis)) for axis, values in self._axes.items())
