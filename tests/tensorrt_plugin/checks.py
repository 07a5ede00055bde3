# SPDX-License-Identifier: Apache-2.0
"""The gates on a built plugin. Each returns sentences, none if all is well, so that planted defects can show that it
fails; none of them loads the library."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.tensorrt_plugin import toolchain

EXPORTS = frozenset({"getCreators", "setLoggerFinder"})
SYSTEM = re.compile(r"lib(c|m|stdc\+\+|gcc_s|dl|rt|pthread)\.so\.\d+|ld-linux.*\.so\.\d+")
# All that a launch and its error take. Nothing here allocates, waits, or copies to the host.
CUDA_CALLS = frozenset({
    "__cudaRegisterFatBinary", "__cudaRegisterFatBinaryEnd", "__cudaUnregisterFatBinary", "__cudaRegisterFunction",
    "__cudaRegisterVar", "__cudaPushCallConfiguration", "__cudaPopCallConfiguration", "__cudaLaunchKernel",
    "__cudaGetKernel", "__cudaInitModule", "cudaLaunchKernel", "cudaLaunchKernelExC", "cudaGetLastError",
    "cudaPeekAtLastError", "cudaGetErrorString", "cudaMemcpyAsync", "cudaMemsetAsync",
})  # fmt: skip


def exports(library: Path, expected: frozenset[str] = EXPORTS) -> list[str]:
    """Dynamic symbols that are not the expected ones."""
    lines = [line.split() for line in toolchain.run("readelf", "--wide", "--dyn-syms", library).splitlines()]
    found = {f[7].split("@")[0] for f in lines if len(f) >= 8 and f[4] in ("GLOBAL", "WEAK") and f[6] != "UND"}
    return [f"{name} is exported" for name in sorted(found - expected)] + [
        f"{name} is not exported" for name in sorted(expected - found)
    ]


def needs(library: Path) -> list[str]:
    """Libraries it would be linked to that a machine without TensorRT and driver may lack."""
    found = re.findall(r"\(NEEDED\).*\[(.+)\]", toolchain.run("readelf", "--wide", "--dynamic", library))
    return [f"{name} is needed" for name in found if not SYSTEM.fullmatch(name)]


def architectures(library: Path) -> list[str]:
    """Architectures without machine code, and whether the last one is there as PTX."""
    tool = toolchain.cuobjdump_path()
    assert tool is not None
    code = set(re.findall(r"sm_(\d+)[a-z]?\.cubin", toolchain.run(tool, "--list-elf", library)))
    ptx = set(re.findall(r"sm_(\d+)[a-z]?\.ptx", toolchain.run(tool, "--list-ptx", library)))
    expected = toolchain.architectures()
    missing = [f"no code for sm_{number}" for number in expected if number not in code]
    return missing + ([] if ptx == {expected[-1]} else [f"PTX for {sorted(ptx)}, expected {expected[-1]}"])


def cuda_calls(objects: list[Path]) -> list[str]:
    """CUDA functions that the objects call beyond launching: allocation, synchronisation, the driver."""
    found = []
    for path in objects:
        for line in toolchain.run("nm", "--undefined-only", path).splitlines():
            name = line.split()[-1]
            if re.match(r"_*cu(da)?[A-Z]", name) and name.removesuffix("_ptsz") not in CUDA_CALLS:
                found.append(f"{path.name} calls {name}")
    return found


@dataclass(frozen=True)
class Budget:
    """The most that any instance of a kernel may take: registers per thread, shared bytes per block, bytes of stack."""

    registers: int
    shared: int = 0
    spilled: int = 0


def budget(report: str, limits: dict[str, Budget]) -> list[str]:
    """Kernels of a `ptxas -v` report that exceed their budget or have none, and budgets that belong to no kernel.

    Args:
        report: what ptxas wrote, mangled names.
        limits: by name of the kernel, without template arguments.
    """
    found = []
    seen = set()
    for block in report.split("Compiling entry function '")[1:]:
        name, target = re.match(r"(\S+)' for '(\w+)'", block).groups()  # type: ignore[union-attr]
        kernel = next((k for k in limits if f"{len(k)}{k}" in name), None)
        if kernel is None:
            found.append(f"{name} for {target}: no budget for this kernel")
            continue
        seen.add(kernel)
        used = {
            "registers": _number(r"Used (\d+) registers", block),
            "bytes of shared memory": _number(r"(\d+) bytes smem", block),
            "bytes of stack and spills": max(
                _number(r"(\d+) bytes stack frame", block), _number(r"(\d+) bytes spill stores", block)
            ),
        }
        limit = limits[kernel]
        for (what, size), most in zip(used.items(), (limit.registers, limit.shared, limit.spilled), strict=True):
            if size > most:
                found.append(f"{name} for {target}: {size} {what}, budget {most}")
    return found + [f"{kernel}: a budget for no kernel" for kernel in limits if kernel not in seen]


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0
