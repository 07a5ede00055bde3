# SPDX-License-Identifier: Apache-2.0
"""What this machine is: its processor, what of it this process may use, its memory. Linux tells all of it."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from shadowc.runtime.cores import cpu_quota, usable_cores

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
EXTENSIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "avx_vnni": "AVX VNNI",
    "amx_int8": "AMX int8",
    "asimd": "NEON",
    "asimddp": "dot products",
    "i8mm": "int8 matrices",
    "sve": "SVE",
    "sve2": "SVE2",
}
"""Flag of the kernel -> name, of what the operators have code for or what changes their speed."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Facts; None where the system does not tell."""

    processor: str
    extensions: tuple[str, ...]
    cores: int
    """That this process may use, hyper-threads counted."""
    all_cores: int
    quota: float | None
    """Cores' worth of time that a container grants; None: no limit."""
    memory: int | None
    """Bytes."""
    available: int | None
    """Bytes that can be had without swapping."""
    large_pages: str | None
    """Who gets large pages: always, madvise or never."""


def here() -> Hardware:
    """This machine."""
    cpu = _fields(_text(_CPUINFO).split("\n\n")[0])
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    memory = _fields(_text(_MEMINFO))
    pages = re.search(r"\[(\w+)\]", _text(_LARGE_PAGES))
    return Hardware(
        processor=cpu.get("model name") or platform.processor() or platform.machine(),
        extensions=tuple(name for flag, name in EXTENSIONS.items() if flag in flags),
        cores=usable_cores(),
        all_cores=os.cpu_count() or 1,
        quota=cpu_quota(),
        memory=_bytes(memory.get("MemTotal")),
        available=_bytes(memory.get("MemAvailable")),
        large_pages=pages[1] if pages else None,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _fields(block: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def _bytes(text: str | None) -> int | None:
    """`16318256 kB` in bytes."""
    number = (text or "").partition(" ")[0]
    return int(number) * 1024 if number.isdigit() else None
