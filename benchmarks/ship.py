"""Makes the registry that ships inside the package from one that was measured.

    python benchmarks/ship.py REGISTRY

Only trusted verdicts of the kernels as they are now go in, with their evidence; trials stay behind. Revocations are
those of the measured registry and those that shipped before: what the package once revoked stays revoked.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tilebook import op as ops
from tilebook.registry import Registry, ship
from tilebook.registry.layers import SHIPPED


def main(source: str) -> None:
    with tempfile.TemporaryDirectory() as folder, Registry.open(source) as measured:
        current = [v for v in measured.verdicts() if v.op in ops.ops() and v.kernel == ops.get(v.op).digest]
        with Registry.open(Path(folder) / "current.db", write=True) as kept:
            kept.merge((), [v for v in current if v.measured], measured.revocations())
            if SHIPPED.exists():
                with Registry.open(SHIPPED) as before:
                    kept.merge(revocations=before.revocations())
            SHIPPED.unlink(missing_ok=True)
            print(ship(kept, SHIPPED), "verdicts in", SHIPPED)


if __name__ == "__main__":
    main(*sys.argv[1:])
