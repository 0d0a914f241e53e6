"""Programs on the CPU: fakes."""

from programs.fakes import *  # noqa: F403
from programs.on_cpu import cpu as device  # noqa: F401
