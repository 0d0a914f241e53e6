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

_LIMIT_S = 20.0
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?\s*([A-Z][\w.]*) *(.*?) *;")


@dataclass(frozen=True)
class Facts:
    """registers: per thread (VGPRs and AGPRs on AMD). spills: bytes of local memory per thread."""

    code: str  # digest of the machine code
    registers: int
    spills: int


class Miscompiled(Exception):
    """Machine code that cannot be right, whatever it was compiled from."""


def facts(asm: Any) -> Facts:
    """The facts of a Triton kernel's `asm`, which holds a cubin or an AMD code object with its assembly text.

    Raises Miscompiled.
    """
    if "cubin" in asm:
        if "wgmma.mma_async" in asm["ptx"]:
            _check_registers(asm["cubin"])
        return _cubin_facts(asm["cubin"])
    text = asm["amdgcn"]
    return Facts(code_digest(asm["hsaco"]), _amd(text, "vgpr_count"), _amd(text, "private_segment_fixed_size"))


@functools.lru_cache(maxsize=64)
def _cubin_facts(cubin: bytes) -> Facts:
    # One call of cuobjdump takes 3 ms, a hundredth of the compile before it, and it knows every version of the format.
    usage = _told("cuobjdump", cubin, "-res-usage")
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Facts(code_digest(cubin), found["REG"], found["STACK"] + found["LOCAL"])


def _told(tool: str, cubin: bytes, option: str) -> str:
    """What one of CUDA's tools that come with Triton prints of a cubin."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, tool).path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_LIMIT_S).stdout


@functools.lru_cache(maxsize=64)
def _check_registers(cubin: bytes) -> None:
    """Raises Miscompiled where a uniform register is read that nothing has set.

    ptxas 12.8 makes that of products whose factors lie at one place of shared memory in two layouts: the addresses of
    these factors are in such registers, and what is read is anything, or nobody's.
    """
    unset = unset_registers(_told("nvdisasm", cubin, "-c"))
    if unset:
        raise Miscompiled(f"ptxas has made code that reads registers before they are set: {unset}")


def unset_registers(assembly: str) -> str:
    """The first instruction of a disassembled cubin that reads uniform registers which none before it sets, if any."""
    known: set[int] = set()
    for line in assembly.splitlines():
        if line.lstrip().startswith(".section"):
            known = set()
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        at, name, text = found.groups()
        # These two may set a predicate first.
        set_and_read = re.sub(r"^U?P\w, ", "", text) if name.startswith(("ULOP3", "R2UR")) else text
        first, *rest = (each.strip() for each in set_and_read.split(","))
        target = re.fullmatch(r"UR(\d+)", first)
        read: set[int] = set()
        for described, number in re.findall(r"(gdesc\[)?\bUR(\d+)", ",".join(rest) if target else text):
            n = int(number)
            # Of a product's two factors the first may be in registers.
            registers = rest and rest[0].startswith("R")
            read |= {n} if not described else {n + 2, n + 3} if registers else {n, n + 1, n + 2, n + 3}
        if read - known:
            return f"{at} {name} {text}"
        if target:
            width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
            known |= set(range(int(target[1]), int(target[1]) + width))
    return ""


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
