"""Plants faults in kernels as users have them and has them tuned: what is caught, how, and what honest configs pass.

    python benchmarks/reliability/planted.py [--only softmax] [--json FILE]

The kernels are those of `tests/foreign/corpus`: each has honest configs and one for each kind of fault. A program that
calls them is recorded, the record is tuned, kernel by kernel, as by `tilebook tune --recorded`, the registry is read.
On a GPU all of it is real. Without one kernels run in Triton's interpreter and compilers and clock are made up, the
clock so that faulty configs are the fastest: verification alone keeps them from winning.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOREIGN = ROOT / "tests" / "foreign"
PATHS = [str(each) for each in (ROOT, FOREIGN, ROOT / "tests", ROOT / "tests" / "tuner", ROOT / "tests" / "gpu")]

HANGS_S = 8.0
"""A config that has no answer for so long hangs: these kernels take microseconds, interpreted less than a second."""


def row(kernel: str, seconds: float, registry: Path) -> dict[str, Any]:
    """What has become of a kernel's configs."""
    import planted

    its = planted.found(registry, kernel)
    return {
        "kernel": kernel,
        "seconds": round(seconds, 1),
        "honest": its.tried,
        "honest_refused": its.honest,
        "caught": {fault: how[:200] for fault, how in sorted(its.refused.items())},
        "missed": its.missed(kernel),
        "faults_in_the_verdict": sorted(fault for fault in its.served if fault),
        "verdict": bool(its.served),
        "wrongs": planted.wrongs(kernel, its),
    }


def tuned(kernel: str, folder: Path) -> None:
    """Records a call of the kernel and tunes the record, into `registry.db`."""
    import planted

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "TILEBOOK_TRITON": f"record:{folder / 'record'}"}
    command = [sys.executable, "-m", "corpus", "cuda", kernel]
    subprocess.run(command, check=True, env=environment)
    environment.pop("TILEBOOK_TRITON")
    options = ["--rules", planted.rules(folder), "--registry", folder / "registry.db", "--workers", "8"]
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "impatient.py"), "tune", "--recorded", folder / "record"]
    subprocess.run([*map(str, [*command, *options])], check=True, env=environment, stdout=subprocess.DEVNULL)


def interpreted(kernel: str, folder: Path) -> None:
    """The same in the interpreter, by the real worker and session."""
    import corpus
    import planted
    from interpreter import mended
    from recorded import recording, tune

    with mended(), recording(folder / "record"):
        corpus.CALLS[kernel]("cpu")
    tune(folder / "record", folder / "registry.db", planted.rules(folder), attempt_s=HANGS_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose names have this in them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    if gpu := torch.cuda.is_available():
        how = tuned
    else:
        os.environ["TRITON_INTERPRET"], how = "1", interpreted
        os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)
    sys.path[:0] = PATHS
    import corpus
    from here import environment

    found = []
    for kernel in (name for name in corpus.CALLS if options.only in name):
        with tempfile.TemporaryDirectory(prefix="tb-planted-") as folder:
            began = time.perf_counter()
            how(kernel, Path(folder))
            found.append(row(kernel, time.perf_counter() - began, Path(folder) / "registry.db"))
        print(json.dumps(found[-1]), flush=True)
    totals = {
        "kernels": len(found),
        "honest": sum(each["honest"] for each in found),
        "honest_refused": sum(len(each["honest_refused"]) for each in found),
        "faults": sum(len(each["caught"]) + len(each["missed"]) for each in found),
        "missed": sum(len(each["missed"]) for each in found),
        "faults_in_verdicts": sum(len(each["faults_in_the_verdict"]) for each in found),
        "seconds": round(sum(each["seconds"] for each in found), 1),
    }
    where = torch.cuda.get_device_name() if gpu else "Triton's interpreter"
    report = {
        "benchmark": "planted faults",
        "on": where,
        "environment": environment(),
        "totals": totals,
        "results": found,
    }
    print(json.dumps(totals, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
