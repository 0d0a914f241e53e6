"""Programs on the CPU: modules."""

from programs.modules import *  # noqa: F403
from programs.on_cpu import cpu as device  # noqa: F401
