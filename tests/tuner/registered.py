"""Makes the injected ops known by name; workers import it last.

In the tests' own process they stay unknown: there every known op is a kernel family's, and is tested as one.
"""

import injected

from tilebook import op as ops

ops._OPS.update({op.name: op for op in injected.MADE})
