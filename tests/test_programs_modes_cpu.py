"""Programs on the CPU: modes."""

from programs.modes import *  # noqa: F403
from programs.on_cpu import cpu as device  # noqa: F401
