"""Programs on the CPU: `tilebook.nn`."""

from programs.on_cpu import cpu as device  # noqa: F401
from programs.own_modules import *  # noqa: F403
