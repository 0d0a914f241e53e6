"""What commands that only read or move records load: of a registry in a file neither SQLAlchemy nor PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

COMMANDS = (
    "keys show",
    "show --op rms_norm_fwd",
    "status --gpu H200",
    "export shipped.jsonl --op rms_norm_fwd",
    "revoke --list",
    "import shipped.jsonl",
    "show --trials",
    "export mine.jsonl",
    "diff shipped mine.jsonl --op rms_norm_fwd",
    "diff user shipped --op rms_norm_fwd",
    "merge shipped.jsonl user -o all.db",
    "check --registry all.db",
    "check --repair --registry all.db",
    "prune --yes",
    "remove --op rms_norm_fwd --gpu H200 --dry-run",
    "remove --op rms_norm_fwd --yes",
)

RUN = """
import json, sys
from tilebook.cli import main
heavy, found = {"sqlalchemy", "alembic", "torch", "triton", "optuna", "numpy"}, {}
for command in json.loads(sys.argv[1]):
    try:
        main(command.split())
    except SystemExit as ended:
        found[command] = [ended.code, *sorted(heavy & set(sys.modules))]
print(json.dumps(found))
"""


def test_commands_that_read_or_move_records_load_neither_sqlalchemy_nor_pytorch(tmp_path: Path) -> None:
    home = {"XDG_DATA_HOME": str(tmp_path / "data"), "XDG_CONFIG_HOME": str(tmp_path / "settings")}
    environment = {**os.environ, **home}
    environment.pop("TILEBOOK_REGISTRY", None)
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(COMMANDS)],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {command: [0] for command in COMMANDS}, done.stderr
    assert (tmp_path / "all.db").exists()
