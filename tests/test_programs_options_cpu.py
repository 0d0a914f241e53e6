"""Programs on the CPU: options."""

from programs.on_cpu import cpu as device  # noqa: F401
from programs.options import *  # noqa: F403
