"""Programs on the GPU: fakes."""

import pytest
from programs.fakes import *  # noqa: F403
from programs.on_gpu import gpu as device  # noqa: F401

pytestmark = pytest.mark.gpu
