"""Makes the injected ops importable by name, here and in workers, and the tuner's fakes."""

import sys
from pathlib import Path

here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent / "tuner")]
