"""Programs on the GPU: processes."""

import pytest
from programs.on_gpu import gpu as device  # noqa: F401
from programs.processes import *  # noqa: F403

pytestmark = pytest.mark.gpu
