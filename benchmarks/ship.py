"""Makes the registry that ships inside the package from one that was measured.

    python benchmarks/ship.py REGISTRY

Writes tilebook/shipped/<gpu>/<op>.jsonl, to be reviewed and committed, and builds tilebook/registry.db from it, which
is not. Only trusted verdicts of the kernels as they are now go in, with their evidence; trials stay behind. Revocations
are those of the measured registry and those that shipped before: what the package once revoked stays revoked.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tilebook import op as ops
from tilebook.registry import Layers, Registry, layers, shipped


def main(source: str, place: Path | None = None) -> None:
    place = layers.SHIPPED if place is None else place
    with Registry.open(source) as measured:
        current = [v for v in measured.verdicts() if v.op in ops.ops() and v.kernel == ops.get(v.op).digest]
        revocations = [revocation for _, revocation in Layers([("shipped", str(place))]).revocations()]
        known = {each.scope for each in revocations}
        revocations += [each for each in measured.revocations() if each.scope not in known]
    count = shipped.write(place, [each for each in current if each.measured], revocations)
    print(count, "verdicts in", shipped.text_of(place))


if __name__ == "__main__":
    main(*sys.argv[1:])
