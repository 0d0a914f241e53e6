"""Programs on the CPU: parallel."""

from programs.on_cpu import cpu as device  # noqa: F401
from programs.parallel import *  # noqa: F403
