"""Programs on the GPU: tracing."""

import pytest
from programs.on_gpu import gpu as device  # noqa: F401
from programs.tracing import *  # noqa: F403
from programs.tracing import _nothing_compiled_before  # noqa: F401

pytestmark = pytest.mark.gpu
