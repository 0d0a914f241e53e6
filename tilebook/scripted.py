"""`tilebook.tune`: what a script or a notebook calls, tuned from there."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tilebook.errors import UsageError
from tilebook.foreign import serving
from tilebook.foreign.offered import offered
from tilebook.foreign.record import Recording
from tilebook.foreign.wrap import noting

__all__ = ["tune"]


def tune(
    calls: Callable[[], Any], *, rules: Mapping[str, Mapping[str, Any]] | None = None, registry: str | None = None,
    gpu: str | None = None, budget_s: float | None = None, trials: int | None = None, force: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Tunes the autotuned Triton kernels that a function calls, for what it calls them with: see `tilebook.autotune`.

    Args:
        calls: is called once, here. Its kernels must be in modules that can be imported, or in the script itself.
        rules: kernel → argument → rule, how integer tensors are made, as `tilebook tune --rules` has them in a file.
        registry: a file or SQLAlchemy URL; the user's by default.
        gpu: the model to tune for; the one here by default. Where it is not here, configs are compiled and ranked.
        budget_s: ends after about so many seconds.
        trials: configs to try for a problem; as many as a search of its own takes by default.
        force: also what has a verdict already.
        seed: of the search.

    Returns:
        A dictionary for each problem, heaviest first, with the keys that `tilebook tune --format json` prints: op,
        problem, config, time_ms, speedup, status … What failed has none, and is warned of. Verdicts are in the
        registry, and serve calls of `tilebook.autotune`'s kernels that come after.

    Raises:
        UsageError: no kernel that can be tuned was called, or an unknown GPU. RegistryError: the registry cannot be
            written.
    """
    from tilebook.report.rows import tuned  # both want the extra `tune`
    from tilebook.tuner.run import tune_problems

    with tempfile.TemporaryDirectory(prefix="tilebook-") as made:
        folder = Path(made)
        recording = Recording(folder / "recorded")
        with noting(recording):
            calls()
        recording.write()
        if not recording.entries():
            none = "it called none (tilebook's own functions are tuned by the command `tilebook tune`)"
            reasons = "; ".join(recording.left_out) or none
            raise UsageError(f"no autotuned kernel that can be tuned was called: {reasons}")
        file = folder / "rules.json"
        file.write_text(json.dumps(rules or {}), encoding="utf-8")
        with offered(folder / "recorded", file) as offer:
            if not offer.problems:
                raise UsageError("; ".join(offer.left_out))
            done = tune_problems(
                offer.problems, gpu=gpu, registry=registry, budget_s=budget_s, trials=trials, force=force, seed=seed,
                weights=offer.weights,
            )  # fmt: skip
    serving.reload()
    for tuner in recording.tuners:
        if isinstance(tuner.cache, serving.Served):
            tuner.cache.forget()
    for state in done.states:
        if state.error:
            warnings.warn(f"tilebook: {state.op} {state.label}: {state.error}", RuntimeWarning, stacklevel=2)
    if done.interrupted:
        raise KeyboardInterrupt
    return tuned(done.states, done.layer, done.gpu.name)
