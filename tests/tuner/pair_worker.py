"""A GPU worker without a GPU, for tests of the runner: it answers at once, and breaks when a candidate says so."""

import os
import sys
import time
from typing import Any

from tilebook.tuner.process.child import Json, serve

_asked: list[str] = []


def handle(message: Json) -> Json:
    _asked.append(message["do"])
    match message["do"]:
        case "prepare":
            if message["problem"] == '{"rows":13}':
                raise RuntimeError("CUDA out of memory")
            return {"yardstick": []}
        case "probe":
            return {"healthy": "poisoned" not in _asked}
        case "attempt":
            _break(message["implementation"])
            facts = {"pid": os.getpid(), "mode": _mode(), "asked": list(_asked)}
            return {"failure": None, "reason": "", "time_ms": 1.0, "samples_ms": [1.0], "facts": facts}
        case "confirm":
            names = [each["implementation"] for each in message["candidates"]]
            for name in names:
                _break(name)
            wrong = {"failure": "wrong_answer", "reason": "found late"}
            return {
                "failures": [wrong if name == "wrong" else None for name in names],
                "samples_ms": [[] if name == "wrong" else [float(os.getpid())] * message["rounds"] for name in names],
            }
    raise KeyError(message["do"])


def _mode() -> str:
    return "prepared" if "prepare" in _asked else "not prepared"


def _break(how: str) -> None:
    match how:
        case "crash":
            os.abort()
        case "poison":  # an illegal access: the exception comes back, and nothing works from then on
            _asked.append("poisoned")
            raise RuntimeError("an illegal memory access was encountered")
        case "slow" | "as slow":
            time.sleep(1)
        case "raise":
            raise ValueError("the launcher objects")


def main(gpu: Any) -> None:
    assert gpu == "3"
    time.sleep(0.1)
    serve(handle)


if __name__ == "__main__":
    main(sys.argv[1])
