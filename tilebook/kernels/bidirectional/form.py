"""The feature maps that kernels make of rows, by name."""

from __future__ import annotations

PERFORMER = "performer"
MAPS = ("elu+1", "relu", "softmax", PERFORMER, "none")

FEATURES = 64
"""Of Performer, as its study had them."""

SEED = 0
