"""The feature maps that kernels make of rows, by name."""

from __future__ import annotations

PERFORMER = "performer"
MAPPED = ("elu+1", "relu", "softmax")
"""Made of each row alone, as many features as it has numbers."""

MAPS = (*MAPPED, PERFORMER, "none")

FEATURES = 64
"""Of Performer, as its study had them."""

SEED = 0

HIDDEN = -1e30
"""Numbers of a mask from here down hide a key."""
