"""Programs on the CPU: hooks."""

from programs.hooks import *  # noqa: F403
from programs.on_cpu import cpu as device  # noqa: F401
