"""Programs on the CPU: options."""

from programs.on_cpu import either as device  # noqa: F401
from programs.options import *  # noqa: F403
