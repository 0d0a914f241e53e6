"""Compiles, for an H200 that need not be there, the first config of each fault of all kernels of the corpus.

Prints a line of JSON for each kernel: its name, how many faults, how many different codes, and what failed.
"""

import contextlib
import json
import sys
from pathlib import Path

import corpus
from corpus import sly
from triton.runtime.autotuner import Autotuner

from tilebook import device as devices
from tilebook.foreign.offered import offered
from tilebook.foreign.record import Recording
from tilebook.tuner.process.compiler import _pose_as, compile_here


def record(folder: Path) -> None:
    """Notes what kernels would be called with; none is started, so that programs find their results wrong."""
    made = Recording(folder)
    Autotuner.run = lambda self, *args, **options: made.note(self, args, options)
    for program in (*corpus.CALLS.values(), *sly.CALLS.values()):
        with contextlib.suppress(AssertionError):
            program("cpu")
    assert made.left_out == {}
    made.write()


def main(folder: Path) -> None:
    record(folder / "record")
    (folder / "rules.json").write_text(json.dumps({**corpus.RULES, **sly.RULES}))
    gpu = devices.find("H200")
    _pose_as(gpu)
    with offered(folder / "record", folder / "rules.json") as offer:
        for op, problem in offer.problems:
            first = {config["FAULT"]: config for config in reversed(list(op.tunable.space.configs()))}
            found = {n: compile_here(gpu, op.name, "triton", problem.key, dict(each)) for n, each in first.items()}
            failed = {n: f"{each.failure}: {each.reason}" for n, each in found.items() if each.failure}
            codes = {each.fingerprint for each in found.values()}
            print(json.dumps([op.name, len(found), len(codes), failed]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
