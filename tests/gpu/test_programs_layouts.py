"""Programs on the GPU: tensors and masks of any layout."""

import pytest
from programs.layouts import *  # noqa: F403
from programs.masks import *  # noqa: F403
from programs.on_gpu import gpu as device  # noqa: F401

pytestmark = pytest.mark.gpu
