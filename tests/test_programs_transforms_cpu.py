"""Programs on the CPU: transforms."""

from programs.on_cpu import cpu as device  # noqa: F401
from programs.transforms import *  # noqa: F403
