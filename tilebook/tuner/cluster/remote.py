"""The driver's side of a host: compilers and a GPU as a session needs them, behind an actor that may be lost."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import suppress
from typing import Any

from tilebook.errors import GpuLost, one_line
from tilebook.op import Op, Problem, Value
from tilebook.tuner.cluster.host import Hello
from tilebook.tuner.process.compile import Compiled
from tilebook.tuner.process.runner import Attempt, Candidate

_GRACE_S = 5.0  # for a host to end its processes before its actor is killed


class Remote:
    """A host on some node, by its actor. It is a `Compilers` and a `Runner`; once it is lost or closed, whatever was
    asked of it raises GpuLost."""

    def __init__(self, ray: Any, actor: Any, workers: int, name: str) -> None:
        self.workers, self.name = workers, name
        self._ray, self._actor = ray, actor
        self._open: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._gone = ""

    def hello(self, names: Sequence[str]) -> Hello:
        """What the host says of itself; waits until the cluster has room for it."""
        found: Hello = self._ask("hello", names).result()
        return found

    def submit(self, op: str, implementation: str, problem_key: str, config: Mapping[str, Value]) -> Future[Compiled]:
        return self._ask("compile", op, implementation, problem_key, dict(config))

    def wait(self, futures: Collection[Future[Compiled]], timeout_s: float) -> set[Future[Compiled]]:
        return wait(futures, timeout=timeout_s, return_when=FIRST_COMPLETED).done

    def prepare(self, op: Op[Any], problem: Problem) -> None:
        self._ask("prepare", op.name, problem.key).result()

    def attempt(self, candidate: Candidate, most_ms: float | None) -> Attempt:
        found: Attempt = self._ask("attempt", candidate, most_ms).result()
        return found

    def confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int, *, fresh: bool = False) -> list[Attempt]:
        found: list[Attempt] = self._ask("confirm", list(candidates), rounds, seed, fresh).result()
        return found

    def close(self) -> None:
        """Nothing more is asked of it, from any thread. `end` takes it down."""
        self.lose("closed")

    def lose(self, why: str) -> None:
        """Ends whatever was asked of it, and all that will be, with GpuLost."""
        with self._lock:
            self._gone = self._gone or f"{self.name} was lost: {why}"
            lost, self._open = self._open, set()
        for future in lost:
            with suppress(InvalidStateError):
                future.set_exception(GpuLost(self._gone))

    def end(self) -> None:
        """Ends its processes, then the actor: at once where it does not answer."""
        self.close()
        # What Ray raises here is that the actor is gone, or the cluster.
        with suppress(Exception):
            self._ray.wait([self._actor.close.remote()], timeout=_GRACE_S)
        with suppress(Exception):
            self._ray.kill(self._actor)

    def _ask(self, method: str, *args: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        with self._lock:
            gone = self._gone
            if not gone:
                self._open.add(answer)
        if gone:
            answer.set_exception(GpuLost(gone))
            return answer
        try:
            given = getattr(self._actor, method).remote(*args).future()
        except self._ray.exceptions.RayError as error:
            self.lose(_why(self._ray, error))
            return answer
        given.add_done_callback(lambda done: self._answered(answer, done))
        return answer

    def _answered(self, answer: Future[Any], given: Future[Any]) -> None:
        """Passes on what Ray answered: an exception of the host's is raised as itself, one of Ray's means a loss."""
        errors = self._ray.exceptions
        error = given.exception()
        if isinstance(error, errors.RayTaskError):
            error = error.cause
        elif isinstance(error, errors.RayError):
            self.lose(_why(self._ray, error))
            return
        with self._lock:
            self._open.discard(answer)
        with suppress(InvalidStateError):  # it was lost, or cancelled, meanwhile
            if error is None:
                answer.set_result(given.result())
            else:
                answer.set_exception(error)


def _why(ray: Any, error: BaseException) -> str:
    """What Ray says of a loss, short: it goes on for a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "it is out of reach"
    if isinstance(error, ray.exceptions.ActorDiedError) and not any("Error: " in line for line in lines):
        return "it died"
    said = [line for line in lines if "Error: " in line] or lines or [type(error).__name__]
    return one_line(said[-1])[:200]
