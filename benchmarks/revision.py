"""What is measured."""

import subprocess
from pathlib import Path


def revision() -> str:
    """The commit noted beside a tree that travelled without its history, else the checkout's."""
    noted = Path("COMMIT")
    if noted.exists():
        return noted.read_text().strip()
    told = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(told, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"
