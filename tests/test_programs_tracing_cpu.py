"""Programs on the CPU: tracing."""

from programs.on_cpu import cpu as device  # noqa: F401
from programs.tracing import *  # noqa: F403
from programs.tracing import _nothing_compiled_before  # noqa: F401
