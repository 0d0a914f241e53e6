"""Programs on the GPU: modules."""

import pytest
from programs.modules import *  # noqa: F403
from programs.on_gpu import gpu as device  # noqa: F401

pytestmark = pytest.mark.gpu
