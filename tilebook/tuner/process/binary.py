"""What a compiled kernel needs and whether two are the same, read off their machine code. Runs in compile children."""

from __future__ import annotations

import functools
import hashlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_CUOBJDUMP_LIMIT_S = 20.0


@dataclass(frozen=True)
class Facts:
    """registers: per thread (VGPRs and AGPRs on AMD). spills: bytes of local memory per thread."""

    code: str  # digest of the machine code
    registers: int
    spills: int


def facts(asm: Any) -> Facts:
    """The facts of a Triton kernel's `asm`, which holds a cubin or an AMD code object with its assembly text."""
    if "cubin" in asm:
        return _cubin_facts(asm["cubin"])
    text = asm["amdgcn"]
    return Facts(code_digest(asm["hsaco"]), _amd(text, "vgpr_count"), _amd(text, "private_segment_fixed_size"))


@functools.lru_cache(maxsize=64)
def _cubin_facts(cubin: bytes) -> Facts:
    # One call of cuobjdump takes 3 ms, a hundredth of the compile before it, and it knows every version of the format.
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_CUOBJDUMP_LIMIT_S).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Facts(code_digest(cubin), found["REG"], found["STACK"] + found["LOCAL"])


def _amd(text: str, field: str) -> int:
    found = re.search(rf"^\s*-?\s*\.{field}:\s*(\d+)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"the AMD assembly text has no .{field}")
    return int(found[1])


def code_digest(elf: bytes) -> str:
    """SHA-256 of an ELF file's instructions and constants: names, line tables and notes do not count."""
    sha = hashlib.sha256()
    for name, content in _sections(elf):
        kind = re.match(r"\.text|\.rodata|\.nv\.constant\d*", name)
        if kind:
            sha.update(f"{kind[0]} {len(content)} ".encode())
            sha.update(content)
    return sha.hexdigest()


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a 64-bit little-endian ELF file's sections, in their order."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", elf, 40)
    entry, count, names = struct.unpack_from("<HHH", elf, 58)
    # Of each header: name, type, offset, size.
    headers = [struct.unpack_from("<II16xQQ", elf, table + entry * index) for index in range(count)]
    nobits = 8
    for name, kind, offset, size in headers:
        if kind != nobits:
            start = headers[names][2] + name
            yield elf[start : elf.index(b"\0", start)].decode(), elf[offset : offset + size]
