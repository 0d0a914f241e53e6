"""What GPU this is, and a catalogue of GPU models for those that are not here. PyTorch is asked for the GPU alone."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from tilebook.errors import UsageError
from tilebook.registry.checks import called, words


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU model: what a verdict is made for. Sizes in bytes, rates in bytes/s and dense bf16 FLOP/s.

    `name`, `arch` and `sm_count` identify it; the rest are the limits that spaces and the performance model read.
    """

    name: str
    arch: str  # "sm_90", "gfx942"
    sm_count: int
    memory: int
    bandwidth: float
    flops: float
    l2: int
    shared_per_block: int
    shared_per_sm: int
    registers_per_sm: int = 65536
    threads_per_sm: int = 2048
    warp_size: int = 32

    @property
    def identity(self) -> tuple[str, str, int]:
        """What the registry knows it by: the arguments of its own `Device`."""
        return self.name, self.arch, self.sm_count

    @property
    def backend(self) -> str:
        """Triton's name of the backend: "cuda" or "hip"."""
        return "cuda" if self.arch.startswith("sm_") else "hip"

    @property
    def capability(self) -> int:
        """90 for sm_90; 0 for GPUs that are not NVIDIA's."""
        return int(self.arch.removeprefix("sm_")) if self.backend == "cuda" else 0


_GB, _MB, _TERA = 10**9, 1 << 20, 1e12

# Compute capabilities 8.9 and 12.0 share these limits.
_GEFORCE: dict[str, Any] = {"shared_per_block": 101_376, "shared_per_sm": 102_400, "threads_per_sm": 1536}
_HOPPER: dict[str, Any] = {"shared_per_block": 232_448, "shared_per_sm": 233_472}  # and Blackwell of the data centre

# Datasheets for memory, bandwidth and the dense bf16 rate with fp32 accumulation; the CUDA programming guide's table of
# compute capabilities for the per-block and per-SM limits.
CATALOGUE: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device(
            name="NVIDIA A100",
            arch="sm_80",
            sm_count=108,
            memory=80 * _GB,
            bandwidth=2.04e12,
            flops=312 * _TERA,
            l2=40 * _MB,
            shared_per_block=166_912,
            shared_per_sm=167_936,
        ),
        Device(
            name="NVIDIA H100",
            arch="sm_90",
            sm_count=132,
            memory=80 * _GB,
            bandwidth=3.35e12,
            flops=989 * _TERA,
            l2=50 * _MB,
            **_HOPPER,
        ),
        Device(
            name="NVIDIA H200",
            arch="sm_90",
            sm_count=132,
            memory=141 * _GB,
            bandwidth=4.8e12,
            flops=989 * _TERA,
            l2=60 * _MB,
            **_HOPPER,
        ),
        Device(
            name="NVIDIA B200",
            arch="sm_100",
            sm_count=148,
            memory=180 * _GB,
            bandwidth=8.0e12,
            flops=2250 * _TERA,
            l2=126 * _MB,
            **_HOPPER,
        ),
        Device(
            name="NVIDIA L4",
            arch="sm_89",
            sm_count=58,
            memory=24 * _GB,
            bandwidth=0.3e12,
            flops=121 * _TERA,
            l2=48 * _MB,
            **_GEFORCE,
        ),
        Device(
            name="NVIDIA GeForce RTX 4090",
            arch="sm_89",
            sm_count=128,
            memory=24 * _GB,
            bandwidth=1.008e12,
            flops=165 * _TERA,
            l2=72 * _MB,
            **_GEFORCE,
        ),
        Device(
            name="NVIDIA GeForce RTX 5090",
            arch="sm_120",
            sm_count=170,
            memory=32 * _GB,
            bandwidth=1.792e12,
            flops=210 * _TERA,
            l2=96 * _MB,
            **_GEFORCE,
        ),
        Device(
            name="AMD Instinct MI300X",
            arch="gfx942",
            sm_count=304,
            memory=192 * _GB,
            bandwidth=5.3e12,
            flops=1307 * _TERA,
            l2=256 * _MB,
            shared_per_block=65_536,
            shared_per_sm=65_536,
            registers_per_sm=131_072,
            warp_size=64,
        ),
    )
}

# What a driver appends to a model's name without making it another model. A "Laptop GPU" or a MIG slice is another.
_PACKAGING = re.compile(r"\d+gb|sxm\d*|pcie|hbm\d\w*|nvl|oam|hgx|dgx")


def is_model(name: str, model: str) -> bool:
    """Does a GPU of this name belong to that model of the catalogue?"""
    own, its = words(name), set(words(model))
    return its <= set(own) and all(word in its or _PACKAGING.fullmatch(word) for word in own)


def find(name: str) -> Device:
    """The catalogue's GPU that is called so, in whole words: "H200", "rtx 4090", "NVIDIA H100 80GB HBM3".

    Raises UsageError on any other name, with the known ones, nearest first.
    """
    found = [each for each in CATALOGUE.values() if called(name, each.name)]
    found = found or [each for each in CATALOGUE.values() if is_model(name, each.name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"GPU {name!r} is ambiguous: {', '.join(each.name for each in found)}")

    from difflib import SequenceMatcher

    def unlike(known: str) -> float:
        alike = [SequenceMatcher(None, word, its).ratio() for word in words(name) for its in words(known)]
        return -max(alike, default=0.0)

    known = ", ".join(sorted(CATALOGUE, key=unlike))
    raise UsageError(f"GPU {name!r} is not in the catalogue; known, nearest first: {known}")


def is_here(model: Device, gpu: Device) -> bool:
    """Is this machine's GPU of that model of the catalogue? An "NVIDIA H100 80GB HBM3" is an "NVIDIA H100"."""
    return is_model(gpu.name, model.name)


_posed: ContextVar[Device | None] = ContextVar("tilebook_posed_gpu", default=None)


@contextmanager
def posing_as(gpu: Device) -> Iterator[None]:
    """While the block lasts, `current` is this GPU, whatever is here: to compile for a GPU that is not."""
    token = _posed.set(gpu)
    try:
        yield
    finally:
        _posed.reset(token)


def current(index: int = 0) -> Device:
    """The GPU with this CUDA index. Limits are the driver's; rates come from the catalogue, else from an estimate."""
    return _posed.get() or _present(index)


@functools.cache
def _present(index: int) -> Device:
    import torch

    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch, shared = properties.gcnArchName.split(":")[0], 65_536
        per_sm = shared
    else:
        arch = f"sm_{properties.major}{properties.minor}"
        shared, per_sm = properties.shared_memory_per_block_optin, properties.shared_memory_per_multiprocessor
    known = _similar(properties.name)
    # An unknown model: 4096 dense bf16 flops per SM and cycle at 1.5 GHz, and an A100's bandwidth per SM.
    base = known or Device(
        name=properties.name,
        arch=arch,
        sm_count=properties.multi_processor_count,
        memory=properties.total_memory,
        bandwidth=19e9 * properties.multi_processor_count,
        flops=4096 * 1.5e9 * properties.multi_processor_count,
        l2=properties.L2_cache_size,
        shared_per_block=shared,
        shared_per_sm=per_sm,
    )
    return replace(
        base,
        name=properties.name,
        arch=arch,
        sm_count=properties.multi_processor_count,
        memory=properties.total_memory,
        l2=properties.L2_cache_size,
        shared_per_block=shared,
        shared_per_sm=per_sm,
        threads_per_sm=properties.max_threads_per_multi_processor,
        warp_size=getattr(properties, "warp_size", 32),
    )


def _similar(name: str) -> Device | None:
    matches = [device for device in CATALOGUE.values() if is_model(name, device.name)]
    return matches[0] if len(matches) == 1 else None


def present() -> bool:
    """Is there a GPU in this machine that PyTorch can use?"""
    import torch

    return torch.cuda.is_available()


def package_version(package: str) -> str:
    """The installed version, or "unknown"."""
    from importlib import metadata  # which imports as much as all that a command reads records with

    try:
        return str(metadata.version(package))
    except metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))


@functools.cache
def environment() -> Mapping[str, str]:
    """Versions that a measurement depends on, softly: a verdict measured under others is stale, not wrong."""
    import torch

    versions: dict[str, str] = {"python": sys.version.split()[0], "torch": str(torch.__version__)}
    versions |= {package: package_version(package) for package in ("triton", "tilebook")}
    versions["cuda"] = torch.version.cuda or "none"
    versions["ptxas"] = _ptxas()
    if present():
        versions["driver"] = driver()
        cudnn: Any = torch.backends.cudnn
        if cudnn.is_available():
            versions["cudnn"] = str(cudnn.version())
    return versions


def _ptxas() -> str:
    try:
        from triton import knobs

        return str(knobs.nvidia.ptxas.version)
    except Exception:
        return "unknown"


def driver() -> str:
    """The kernel driver's version, read where Linux shows it: asking nvidia-smi takes a second."""
    try:
        with open("/proc/driver/nvidia/version") as lines:
            words = lines.readline().split()
        return next(word for word in words if word[0].isdigit() and "." in word)
    except (OSError, StopIteration):
        return "unknown"
