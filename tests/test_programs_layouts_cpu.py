"""Programs on the CPU: tensors and masks of any layout."""

from programs.layouts import *  # noqa: F403
from programs.masks import *  # noqa: F403
from programs.on_cpu import cpu as device  # noqa: F401
