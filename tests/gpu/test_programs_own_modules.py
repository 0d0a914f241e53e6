"""Programs on the GPU: `tilebook.nn`."""

import pytest
from programs.on_gpu import gpu as device  # noqa: F401
from programs.own_modules import *  # noqa: F403

pytestmark = pytest.mark.gpu
