"""How long the commands take that only read or move records, with what ships and with a registry of one's own.

    python benchmarks/reliability/commands.py [--registry FILE] [--times 5] [--out FILE]

Each is a process of its own, with an empty home; the fastest of several counts, on the clock and on the CPU. Python
keeps its bytecode, as pip does of what it installs; a run before those that count makes it. Said, too: whether PyTorch
or SQLAlchemy was imported. --registry adds `show` of one GPU's op, `export` and `status` of that file. No GPU needed.

Exit status: 1 where a command imported either, or took more than 0.5 s of CPU time with what ships.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from here import tell

COMMANDS = (
    "show", "show --op rms_norm_fwd --gpu H200 --format json", "status --gpu H200", "check", "diff shipped shipped",
    "export shipped.jsonl", "import shipped.jsonl", "export mine.jsonl", "merge shipped.jsonl mine.jsonl -o all.db",
    "remove --op rms_norm_fwd --dry-run", "prune --dry-run", "keys show", "revoke --list",
)  # fmt: skip
LARGE = (
    "show --op attention_fwd --gpu H200",
    "status --gpu H200",
    "export large.jsonl --gpu H200",
    "export large.jsonl",
)
_RUN = """
import sys
from tilebook.cli import main
try:
    main(sys.argv[1:])
finally:
    print(*({"torch", "sqlalchemy"} & set(sys.modules)), file=sys.stderr)
"""


def timed(folder: Path, command: str, times: int) -> dict[str, Any]:
    """The fastest of so many runs."""
    found = []
    for _ in range(1 + times):
        for name in command.split("-o ")[1:]:
            (folder / name).unlink(missing_ok=True)
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", _RUN, *command.split()], cwd=folder, capture_output=True, text=True,
            env=environment(folder),
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise SystemExit(f"{command}: {done.stderr[-2000:]}")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found.append((time.perf_counter() - began, cpu))
        imported = done.stderr.splitlines()[-1].split()
    seconds, cpu = min(found[1:]), min(each for _, each in found[1:])
    return {"seconds": round(seconds[0], 3), "cpu_seconds": round(cpu, 3), "imports": sorted(imported)}


def environment(folder: Path) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    home = {"XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    return {**found, **home, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONPYCACHEPREFIX": f"{folder}/bytecode"}


MOST_S = 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--registry", type=Path)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {each: timed(Path(folder), each, given.times) for each in COMMANDS}
        slow = any(each["cpu_seconds"] > MOST_S for each in found.values())
        if given.registry is not None:
            more = f" --registry {given.registry.absolute()}"
            found |= {f"{each} --registry …": timed(Path(folder), each + more, 1) for each in LARGE}
    tell({"commands": found}, given.out)
    return 1 if slow or any(each["imports"] for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
