"""`tilebook.autotune`: in the place of `triton.autotune`, with verdicts instead of a search in the user's process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import triton
from triton.runtime.autotuner import Autotuner

from tilebook.errors import UsageError
from tilebook.foreign import serving
from tilebook.foreign.kernel import Unfit, descriptors
from tilebook.foreign.serving import under_way

OnMiss = Literal["serve", "tune", "error"]

_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
_MOST_CONFIGS = 10_000


class Missing(UsageError):
    """A call of a kernel that no verdict covers, where the kernel wants one."""


class Tuned(Autotuner):  # type: ignore[misc]
    """Triton's autotuner with a memory that asks the registries."""

    def __init__(self, *args: Any, reference: Callable[..., Any] | None, on_miss: OnMiss, **kwargs: Any) -> None:
        descriptors()
        super().__init__(*args, **kwargs)
        self.reference = reference
        self.cache = _Memory(self, on_miss)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        while True:
            under_way.call = self, args, kwargs
            try:
                return super().run(*args, **kwargs)
            except serving.FAILURES:
                # What stands first may not fit here; the next that does serves from then on.
                if not isinstance(self.cache, _Memory) or not self.cache.next(getattr(self, "best_config", None)):
                    raise
            finally:
                under_way.call = None  # or it would keep the call's tensors


class _Memory(serving.Served):
    """Of what no verdict covers it says that the first feasible config serves, and counts the calls."""

    def __init__(self, tuner: Tuned, on_miss: OnMiss) -> None:
        super().__init__(tuner, {})
        self._on_miss = on_miss
        self._waiting: dict[Any, Sequence[Any]] = {}  # by key, what may run: the first serves
        self._orders: dict[tuple[int, ...], Sequence[Any]] = {}  # what waits, once for all keys, by its configs' ids
        self._counted: dict[Any, list[float]] = {}

    def __contains__(self, key: object) -> bool:
        self._last = key
        if dict.__contains__(self, key):
            return True
        if key not in self._waiting and not self._decide(key):
            return False
        if key in self._counted:
            self._counted[key][0] += 1
        return True

    def __missing__(self, key: Any) -> Any:
        return self._waiting[key][0]

    def next(self, failed: Any) -> bool:
        """Is there another config for the call that was asked about last, whose config did not fit?"""
        waiting = self._waiting.get(self._last, [])
        if len(waiting) < 2 or waiting[0] is not failed:
            return False
        self._waiting[self._last] = waiting = waiting[1:]
        if self._last in self._counted:
            self._counted[self._last][0] -= 1  # the same call comes again
        if dict.__contains__(self, self._last):
            self[self._last] = waiting[0]
        return True

    def forget(self) -> None:
        self.clear()
        self._waiting.clear()
        self._orders.clear()
        self._counted.clear()

    def _decide(self, key: Any) -> bool:
        """False where the autotuner is to search. Raises Missing where that is asked for."""
        tuner, gpu, problem, call = self._tuner, None, "", self._call()
        left = searched = list(tuner.prune_configs({} if call is None else dict(call[1])))
        try:
            here = serving.book()
            problem, gpu = self.kernel.problem(key), here.gpu
            configs, ranked = self.kernel.configs, here.chosen(self.kernel, problem, measured=False)
            # Behind them the others: what a verdict found elsewhere may not fit beside this call's arguments.
            found = [configs[each] for each in ranked if configs[each] in left]
            left = here.allowed(self.kernel, left)
        except Exception as broken:  # the program goes on without verdicts
            serving.say(tuner, broken)
            found = []
        if not found and self._on_miss == "error":
            raise Missing(f"no verdict covers {tuner.base_fn.__name__} with {key}: tune it, or ask for on_miss='serve'")
        if not found and self._on_miss == "tune":
            return False
        self._waiting[key] = self._ordered([*found, *(each for each in left if each not in found)])
        if found:
            self[key] = found[0]
        elif gpu is not None:
            args = () if call is None else (*call[0], *call[1].values())
            moved = sum(x.numel() * x.element_size() for x in args if isinstance(x, torch.Tensor))
            self._counted[key] = serving.missed(self.kernel, problem, gpu, moved)
        self._settle(call, self._waiting[key][0], searched)
        return True

    def _ordered(self, configs: Sequence[Any]) -> Sequence[Any]:
        return self._orders.setdefault(tuple(map(id, configs)), configs)


def autotune(
    configs: Sequence[Any] = (),
    key: Sequence[str] = (),
    prune_configs_by: Mapping[str, Any] | None = None,
    reset_to_zero: Sequence[str] | None = None,
    restore_value: Sequence[str] | None = None,
    pre_hook: Callable[..., Any] | None = None,
    post_hook: Callable[..., Any] | None = None,
    warmup: int | None = None,
    rep: int | None = None,
    use_cuda_graph: bool = False,
    do_bench: Callable[..., Any] | None = None,
    cache_results: bool = False,
    *,
    reference: Callable[..., Any] | None = None,
    space: Mapping[str, Sequence[Any]] | None = None,
    on_miss: OnMiss = "serve",
) -> Callable[[Any], Any]:
    """As `triton.autotune`, but a call's config comes from a verdict, and nothing is tuned in the user's process.

    configs … cache_results: Triton's own arguments (docs of `triton.autotune`, Triton 3.6 to 3.9).
    reference: a PyTorch function that gives the truth. It is called with those of the kernel's arguments that it names,
        floating-point tensors in fp32, and returns what the kernel writes, in the order of its arguments, or a dict by
        their names. Without one a config is right if it agrees with most of the first few.
    space:   axes of configs, such as {"BLOCK_M": (64, 128), "num_warps": (4, 8)}: every combination is a config, behind
        those of `configs`. `prune_configs_by` leaves out what cannot run.
    on_miss: what a call does that no verdict covers: "serve" runs the first config that fits and counts the call for
        `tilebook status`; "tune" searches as `triton.autotune` does, and keeps the result for this process; "error"
        raises UsageError.

    Raises UsageError for a space of more than 10,000 configs, for one that is empty, and for an unknown `on_miss`.
    """
    if on_miss not in ("serve", "tune", "error"):
        raise UsageError(f"on_miss is 'serve', 'tune' or 'error', not {on_miss!r}")
    listed = [*configs, *(_config(each) for each in combined(space or {}))]
    if not listed:
        raise UsageError("autotune needs configs or a space")
    if any(getattr(each, "ir_override", None) is not None for each in listed):
        raise Unfit("a config with ir_override cannot be tuned: it is another kernel")

    def decorate(fn: Any) -> Tuned:
        return Tuned(
            fn,
            fn.arg_names,
            listed,
            list(key),
            reset_to_zero,
            restore_value,
            pre_hook=pre_hook,
            post_hook=post_hook,
            prune_configs_by=prune_configs_by,
            warmup=warmup,
            rep=rep,
            use_cuda_graph=use_cuda_graph,
            do_bench=do_bench,
            cache_results=cache_results,
            reference=reference,
            on_miss=on_miss,
        )

    return decorate


def combined(space: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of a space's values, none where it has no axes.

    Raises UsageError for none, for too many, and for what is no space."""
    if not isinstance(space, Mapping) or any(isinstance(n, str) or not isinstance(n, Sequence) for n in space.values()):
        raise UsageError(f"a space is axes and the values of each, not {space!r}"[:200])
    count = math.prod(len(values) for values in space.values())
    if not 0 < count <= _MOST_CONFIGS:
        raise UsageError(f"a space has from 1 to {_MOST_CONFIGS} configs, not {count}")
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values()) if space]


def _config(chosen: dict[str, Any]) -> Any:
    options = {name: chosen.pop(name) for name in _OPTIONS if name in chosen}
    return triton.Config(chosen, **options)
