"""What a GPU's architecture can do, by the feature's name: no caller compares numbers of compute capabilities.

Sources: the CUDA C++ programming guide's table of compute capabilities, and the PTX manual's target notes. AMD's GPUs
have none of these.
"""

from __future__ import annotations

from tilebook.device import Device

__all__ = ["async_mma", "has_cp_async", "has_tcgen05", "has_tma", "has_wgmma", "since_blackwell"]


def has_cp_async(device: Device) -> bool:
    """Copies from global to shared memory that need no registers (`cp.async`), and bf16 tensor cores: since Ampere."""
    return device.capability >= 80


def has_tma(device: Device) -> bool:
    """Tiles copied by a tensor descriptor (`cp.async.bulk.tensor`): since Hopper."""
    return device.capability >= 90


def has_wgmma(device: Device) -> bool:
    """Products by a group of four warps out of shared memory (`wgmma`): Hopper alone."""
    return device.capability == 90


def has_tcgen05(device: Device) -> bool:
    """Products with tensor memory (`tcgen05`): Blackwell of the data centre, not the GeForce's sm_120."""
    return 100 <= device.capability < 120


def async_mma(device: Device) -> bool:
    """Do tensor cores read tiles from shared memory by themselves? Elsewhere tiles pass through registers."""
    return has_wgmma(device) or has_tcgen05(device)


def since_blackwell(device: Device) -> bool:
    """Blackwell and later, the GeForce's too: what Triton's pipeliner does from sm_100 on."""
    return device.capability >= 100
