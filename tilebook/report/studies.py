"""Trials as studies of Optuna, in a storage that Optuna itself and optuna-dashboard open."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from tilebook.errors import UsageError
from tilebook.registry.records import Status, Trial
from tilebook.registry.target import refuse_journal
from tilebook.report.rows import label

_MARK = "tilebook:sha256"
"""The attribute of an Optuna trial that has the digest of ours. "tilebook" is a version beside it."""

_STATES = {Status.OK: TrialState.COMPLETE, Status.FAILED: TrialState.FAIL, Status.REJECTED: TrialState.PRUNED}


def write(file: Path, trials: Iterable[Trial]) -> tuple[int, int]:
    """Adds trials to the studies in a file, one study for each problem, GPU and implementation; returns how many
    studies there are of these, and how many trials are new.

    A file that is not there is made; so the same trials may be added again while a tune goes on, and the dashboard
    shows what has come. Raises UsageError where there is something else than a storage of Optuna's.
    """
    with _alone(file.parent):
        there = _refuse_foreign(file)
        try:
            return _added(file, trials)
        except (RuntimeError, optuna.exceptions.OptunaError, SQLAlchemyError) as error:
            if not there:  # what was begun would be no storage of Optuna's
                file.unlink(missing_ok=True)
            raise UsageError(f"{file} cannot be written: {str(error).partition(chr(10))[0]}") from error


def _added(file: Path, trials: Iterable[Trial]) -> tuple[int, int]:
    studies: dict[str, list[Trial]] = {}
    for each in trials:
        name = f"{each.op} {label(each.op, each.problem)} on {each.device.name}: {each.implementation}"
        studies.setdefault(name, []).append(each)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Of a URL with a ? in the file's name SQLAlchemy would open another file.
    storage = optuna.storages.RDBStorage("sqlite:///studies", {"creator": lambda: sqlite3.connect(file)})
    new = 0
    for name, its in studies.items():
        study = optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)
        known = {each.user_attrs.get(_MARK) for each in study.get_trials(deepcopy=False)}
        made = _made([each for each in its if each.sha256 not in known], its)
        try:
            study.add_trials(made)
        except ValueError as error:
            raise UsageError(f"{file} was made before there was all of {name}: name another file ({error})") from error
        new += len(made)
    return len(studies), new


def _made(new: Sequence[Trial], its: Sequence[Trial]) -> list[FrozenTrial]:
    """Optuna's trials, in which every axis has the values that any of the study's have tried."""
    values: dict[str, set[Any]] = {}
    for each in its:
        for axis, value in each.config.items():
            values.setdefault(axis, set()).add(value)
    axes = {axis: _axis(found) for axis, found in values.items()}
    return [_trial(each, {axis: axes[axis] for axis in each.config}) for each in new]


def _axis(values: set[Any]) -> BaseDistribution:
    """Of integers a study may meet more later on; of other values it must know all from the beginning."""
    if all(type(each) is int for each in values):
        return IntDistribution(min(values), max(values))
    flags = {False, True} if all(type(each) is bool for each in values) else set()
    return CategoricalDistribution(sorted(values | flags, key=lambda each: (type(each).__name__, each)))


def _trial(trial: Trial, axes: dict[str, Any]) -> FrozenTrial:
    timed = trial.status is Status.OK and trial.time_ms is not None
    state = _STATES[trial.status] if timed or trial.status is not Status.OK else TrialState.PRUNED
    told = {
        **trial.environment.versions,
        "reason": trial.reason,
        "failure": trial.failure and trial.failure.value,
        "made": trial.facts.get("made"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        made = create_trial(
            params=dict(trial.config),
            distributions=axes,
            value=trial.time_ms if timed else None,
            state=state,
            user_attrs={name: value for name, value in told.items() if value} | {_MARK: trial.sha256},
        )
    moment = trial.created_at.astimezone().replace(tzinfo=None)  # Optuna's own are local times
    made.datetime_start, made.datetime_complete = moment, moment
    return made


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While others wait that write studies into this folder: two at once would add the same trials."""
    held = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _refuse_foreign(file: Path) -> bool:
    """Is there a storage? Raises UsageError where something else is there."""
    if not file.exists():
        return False
    with contextlib.suppress(sqlite3.Error), contextlib.ExitStack() as cleanup:
        if file.is_file():  # SQLite would wait for what a pipe has
            refuse_journal(file)
            found = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)
            cleanup.callback(found.close)
            found.execute("SELECT library_version FROM version_info, study_directions")
            return True
    raise UsageError(f"{file} is there and holds no studies of Optuna: it is left as it is")
