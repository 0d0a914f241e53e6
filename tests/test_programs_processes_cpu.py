"""Programs on the CPU: processes."""

from programs.on_cpu import cpu as device  # noqa: F401
from programs.processes import *  # noqa: F403
