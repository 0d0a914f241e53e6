"""Programs on the CPU: tensors of any layout."""

from programs.layouts import *  # noqa: F403
from programs.on_cpu import cpu as device  # noqa: F401
