"""Programs on the GPU: transforms."""

import pytest
from programs.on_gpu import gpu as device  # noqa: F401
from programs.transforms import *  # noqa: F403

pytestmark = pytest.mark.gpu
