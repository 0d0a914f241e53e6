"""What each GPU of the catalogue can do."""

import pytest

from tilebook import arch
from tilebook.device import find

FEATURES = {name: getattr(arch, name) for name in arch.__all__}


@pytest.mark.parametrize(
    ("gpu", "features"),
    [
        ("A100", {"has_cp_async"}),
        ("L4", {"has_cp_async"}),
        ("H200", {"has_cp_async", "has_tma", "has_wgmma", "async_mma"}),
        ("B200", {"has_cp_async", "has_tma", "has_tcgen05", "async_mma", "since_blackwell"}),
        ("RTX 5090", {"has_cp_async", "has_tma", "since_blackwell"}),
        ("MI300X", set()),
    ],
)
def test_a_gpu_has_the_features_of_its_architecture(gpu, features):
    assert {name for name, has in FEATURES.items() if has(find(gpu))} == features
