"""Makes the toy op importable by name; fixtures of several files."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from audit_samples import evidence, shop  # noqa: F401
