"""Programs on the GPU: options."""

import pytest
from programs.on_gpu import gpu as device  # noqa: F401
from programs.options import *  # noqa: F403

pytestmark = pytest.mark.gpu
