"""Configs of a kernel against its default one."""

import torch


def agreeing(each, args, configs, right):
    """How many of the configs fit on this GPU; asserts that these give what `right` is, but for 2 % of the largest."""
    tried = 0
    for config in configs:
        try:
            found = each.tunable(*args, config=config)
        except Exception as broken:
            assert type(broken).__name__ == "OutOfResources", (config, broken)  # noqa: PT017
            continue
        tried += 1
        for mine, other in zip(found, right, strict=True):
            size = other.float().abs().max().item() if other.numel() else 0.0
            torch.testing.assert_close(mine.float(), other.float(), rtol=0, atol=2e-2 * size + 1e-6, msg=str(config))
    return tried
