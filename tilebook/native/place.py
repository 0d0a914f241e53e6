"""Where the extension is kept, and whether it is there."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

import platformdirs
import torch

NAME = "tilebook_served"
_FILES = (
    "extension.cpp", "served.cpp", "plans.cpp", "casts.cpp", "aliases.cpp", "layouts.cpp", "mlp.cpp",
    "learned.cpp", "forms.cpp", "gates.cpp", "keys.cpp", "notes.cpp", "autocast.h", "described.h", "forms.h",
    "plans.h", "shared.h", "typed.h", "watched.h",
)  # fmt: skip
SOURCES = tuple(Path(__file__).with_name(name) for name in _FILES)
UNIT = SOURCES[0]
"""What is compiled; it includes the others."""


def folder() -> Path | None:
    """Where extensions are kept: $TILEBOOK_NATIVE, else in the user's cache. None where that is 0: to do without."""
    told = os.environ.get("TILEBOOK_NATIVE", "")
    return None if told == "0" else Path(told or Path(platformdirs.user_cache_dir("tilebook")) / "native")


def place(root: Path) -> Path:
    """Where in that folder the extension for this PyTorch and this Python is, or would be."""
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update(source.read_bytes())
    abi, commit = torch.compiled_with_cxx11_abi(), torch.version.git_version  # of builds that share a version
    for each in (torch.__version__, commit, sys.version, sysconfig.get_platform(), abi):
        digest.update(str(each).encode())
    return root / digest.hexdigest()[:16] / f"{NAME}.so"


def built() -> Path | None:
    """The extension, if it has been built. Only a file of this user's own, which nobody else can write."""
    root = folder()
    if root is None:
        return None
    path = place(root)
    with suppress(OSError):
        if all(_private(each) for each in (path, path.parent)):
            return path
    return None


def sealed(library: bytes) -> bytes:
    """A library with its digest behind it, which no loader looks at."""
    return library + hashlib.sha256(library).digest()


def whole(path: Path) -> bool:
    """Is it what was built, to the last byte? To load a part of one, as a full disk leaves it, ends the process."""
    with suppress(OSError):
        content = path.read_bytes()
        size = hashlib.sha256().digest_size
        return len(content) > size and sealed(content[:-size]) == content
    return False


def _private(path: Path) -> bool:
    info = path.stat()
    return info.st_uid == os.getuid() and not info.st_mode & 0o022
