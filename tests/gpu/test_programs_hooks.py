"""Programs on the GPU: hooks."""

import pytest
from programs.hooks import *  # noqa: F403
from programs.on_gpu import gpu as device  # noqa: F401

pytestmark = pytest.mark.gpu
