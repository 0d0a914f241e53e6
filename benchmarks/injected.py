"""500 candidates that break in ten ways, on the GPU that is here: what became of each kind, as JSON.

    python benchmarks/injected.py [--per-kind 50] [--workers 16] [--out FILE]

Takes minutes: most kinds kill their worker, and a new one has to import PyTorch.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from compare import save

tests = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(tests / "gpu"), str(tests / "tuner")]

from injected_failures import EXPECTED, run  # noqa: E402 (found by the lines above)

from tilebook import device as devices  # noqa: E402


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--per-kind", type=int, default=50)
    arguments.add_argument("--workers", type=int, default=16)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = run(dict.fromkeys(EXPECTED, given.per_kind), given.workers, Path(directory))
    if given.out:
        save(given.out, "injected failures", devices.current().name, **json.loads(report.to_json()))
    print(report.to_json())
    kinds = report.kinds.items()
    right = all(set(k.classes) <= EXPECTED[n] and sum(k.classes.values()) == k.count for n, k in kinds)
    clean = report.orphans == 0 and report.memory_lost_mib <= 64 and report.overrun_s <= 5
    return 0 if right and clean and not any(k.served or k.aborted for _, k in kinds) else 1


if __name__ == "__main__":
    sys.exit(main())
