"""Programs on the GPU: modes."""

import pytest
from programs.modes import *  # noqa: F403
from programs.on_gpu import gpu as device  # noqa: F401

pytestmark = pytest.mark.gpu
