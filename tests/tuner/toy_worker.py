"""A GPU worker without a GPU, and without PyTorch, so that it starts at once: its candidates really break it.

Speaks the protocol of `tilebook.tuner.process.worker`; run as a module by tests.
"""

import os
import signal
import time

from tilebook.tuner.process.child import Json, serve
from tilebook.tuner.process.processes import left_behind

LOOP_S = 20
_context = {"broken": False}  # as a kernel's fault leaves a CUDA context: every later call fails too


class Unheard(Exception):
    pass


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def _break(kind: str, n: int) -> str | None:
    """Does what a bad candidate does; returns the class of a failure that the worker itself can name."""
    match kind:
        case "good":
            return None
        case "compile_error" | "out_of_resources":
            return kind
        case "illegal_access" | "misaligned_access" | "trap" if n % 2:
            _context["broken"] = True
            raise RuntimeError(f"CUDA error: {kind}")
        case "illegal_access":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "misaligned_access":
            os.kill(os.getpid(), signal.SIGBUS)
        case "trap":
            os.kill(os.getpid(), signal.SIGILL)
        case "long_loop":
            end = time.monotonic() + LOOP_S
            while time.monotonic() < end:
                pass
        case "ignored_sigterm":
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            time.sleep(600)
        case "forked_child":
            _fork(n)
        case "unknown_exception":
            raise (Unheard("of this one"), SystemExit(0), Unspeakable())[n % 3]
        case "killed_worker":
            os.kill(os.getpid(), signal.SIGKILL)
    return None


def _fork(n: int) -> None:
    """A child that stays in the process group, one that leaves it, a daemon, and one that goes on as the worker."""
    if os.fork() == 0:
        if n % 4 == 3:
            return
        if n % 4:
            os.setsid()
        if n % 4 == 2 and os.fork():
            os._exit(0)
        time.sleep(600)
        os._exit(0)
    time.sleep(0.01)


def handle(message: Json) -> Json:
    match message["do"]:
        case "attempt":
            me = os.getpid()
            try:
                failure = _break(message["config"].get("kind", "good"), message["config"].get("n", 0))
            finally:
                strays = left_behind() if os.getpid() == me else 0
            if strays:
                raise RuntimeError(f"left {strays} processes behind")
            return {"failure": failure, "reason": "", "time_ms": 1.0, "samples_ms": [1.0] * 15, "facts": {}}
        case "confirm":
            candidates = message["candidates"]
            samples = [[1.0 + 0.001 * (i % 3) for i in range(message["rounds"])] for _ in candidates]
            return {"failures": [None] * len(candidates), "samples_ms": samples}
        case "probe":
            if _context["broken"]:
                raise RuntimeError("CUDA error: sticky")
            return {"healthy": True}
    return {}


if __name__ == "__main__":
    serve(handle)
