"""Programs on the GPU: parallel."""

import pytest
from programs.on_gpu import gpu as device  # noqa: F401
from programs.parallel import *  # noqa: F403

pytestmark = pytest.mark.gpu
