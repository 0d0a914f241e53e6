"""What GPU and software are here, as far as can be told without PyTorch, whose import takes seconds.

Where a program has PyTorch loaded, `tilebook.device` is asked, which tells all of it.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from tilebook import device as devices

# Files that a driver makes: NVIDIA's, the same under WSL, AMD's.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")

# Numbers of `CUdevice_attribute` in the driver's interface.
_SM_COUNT, _MAJOR, _MINOR = 16, 75, 76


def present() -> bool:
    """Is there a GPU that PyTorch may be able to use?"""
    if _loaded() or not sys.platform.startswith("linux"):
        return devices.present()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return not hidden and any(map(os.path.exists, _DRIVERS)) and not {"cuda", "hip"}.isdisjoint(_build())


def target(gpu: str | None) -> tuple[str, str, int] | None:
    """The name, arch and SM count of the GPU here, where it is of that model or none is named; else the catalogue's.

    What is stored of the GPU here bears its own name, which may be longer than the catalogue's. None where there is no
    GPU and none was named. Raises UsageError.
    """
    named = None if gpu is None else devices.find(gpu)
    here = _here() if present() else None
    if here is not None and (named is None or devices.is_model(here[0], named.name)):
        return here
    return None if named is None else named.identity


def environment() -> Mapping[str, str]:
    """Those of `device.environment()` that the installed files tell."""
    if _loaded():
        return devices.environment()
    build = _build()
    versions = {
        "torch": build.get("__version__", "unknown"),
        "triton": devices.package_version("triton"),
        "cuda": build.get("cuda", "none"),
        "driver": devices.driver(),
        **_cudnn(),
    }
    return {name: version for name, version in versions.items() if version != "unknown"}


def _loaded() -> bool:
    return sys.modules.get("torch") is not None


def _here() -> tuple[str, str, int] | None:
    found = None if _loaded() else _by_driver()
    if found is None and devices.present():
        found = devices.current().identity
    return found


def _by_driver() -> tuple[str, str, int] | None:
    """What CUDA's driver says of the first GPU; None where it is not NVIDIA's."""
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name, found = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if driver.cuDeviceGetName(name, len(name), device):
        return None
    numbers = []
    for attribute in (_MAJOR, _MINOR, _SM_COUNT):
        if driver.cuDeviceGetAttribute(ctypes.byref(found), attribute, device):
            return None
        numbers.append(found.value)
    major, minor, sm_count = numbers
    return name.value.decode("utf-8", "replace"), f"sm_{major}{minor}", sm_count


@functools.cache
def _build() -> Mapping[str, str]:
    """What PyTorch's own file says of how it was built: `__version__`, `cuda`, `hip`; nothing where it is not there."""
    from importlib.util import find_spec

    found = find_spec("torch")
    if found is None or found.origin is None:
        return {}
    try:
        text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    return dict(re.findall(r"^(\w+)\b[^=\n]*= *['\"]([^'\"\n]+)['\"]", text, re.MULTILINE))


def _cudnn() -> dict[str, str]:
    """The version of the package that PyTorch's wheels bring along, as cuDNN writes it: 91900 is 9.19.0."""
    cuda = _build().get("cuda", "none").partition(".")[0]
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", devices.package_version(f"nvidia-cudnn-cu{cuda}"))
    return {} if found is None else {"cudnn": str(10_000 * int(found[1]) + 100 * int(found[2]) + int(found[3]))}
