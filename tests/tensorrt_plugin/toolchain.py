# SPDX-License-Identifier: Apache-2.0
"""What these tests work with: built plugins and their objects, TensorRT's headers, RTX's libraries, CUDA's tools."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import shadowc.plugins

TOP = Path(__file__).parents[2]
PLUGIN_SOURCES = TOP / "plugins" / "tensorrt"
KERNEL_SOURCES = TOP / "plugins" / "cuda"
FAMILIES = ("trt11", "trt10", "rtx1")
NO_PLUGIN = "no TensorRT plugin was built here: it needs nvcc and TensorRT's headers"


def libraries() -> dict[str, Path]:
    """Family -> the installed plugin built from headers of that family. SHADOWC_TRT_LIBRARY names another build."""
    chosen = os.environ.get("SHADOWC_TRT_LIBRARY")
    folders = [Path(chosen).parent] if chosen else [Path(folder) for folder in shadowc.plugins.__path__]
    found = {}
    for family in FAMILIES:
        paths = [path for folder in folders if (path := folder / f"libshadowc_{family}.so").is_file()]
        found |= {family: paths[0]} if paths else {}
    return found


def twin(library: Path) -> Path:
    """The self-registering twin of a plugin."""
    return library.with_name(f"{library.stem}_auto.so")


def build_folder() -> Path | None:
    """The CMake build folder that the plugin came from, if this is a checkout."""
    found = [path.parent for path in libraries().values()] + sorted(TOP.glob("build/*"), key=_age)
    return next((folder for folder in found if any(folder.glob("plugins/cuda/CMakeFiles/*/*.cu.o"))), None)


def objects() -> list[Path]:
    """Object files of kernels and glue, before the CUDA runtime is linked in."""
    folder = build_folder()
    if folder is None:
        return []
    return sorted(folder.glob("plugins/cuda/CMakeFiles/*/*.o")) + sorted(
        folder.glob("plugins/tensorrt/CMakeFiles/*/*.o")
    )


def ptxas_reports() -> list[Path]:
    """What ptxas said when the kernels were compiled, one file per source."""
    folder = build_folder()
    return [] if folder is None else sorted(folder.glob("plugins/cuda/CMakeFiles/*/*.ptxas"))


def header_sets() -> dict[str, Path]:
    """Version -> folder of TensorRT headers: those in TENSORRT_INCLUDE_DIR and in build/tensorrt_headers."""
    named = [Path(p) for p in re.split("[;:]", os.environ.get("TENSORRT_INCLUDE_DIR", "")) if p]
    found = {}
    for folder in [*sorted(TOP.glob("build/tensorrt_headers/*")), *named]:
        text = (folder / "NvInferVersion.h").read_text() if (folder / "NvInferVersion.h").is_file() else ""
        parts = [
            re.search(rf"define (?:TRT_{part}_\w+|NV_TENSORRT_{part}) +(\d+)", text)
            for part in ("MAJOR", "MINOR", "PATCH")
        ]
        if all(parts):
            found[".".join(part[1] for part in parts if part)] = folder
    return found


def cuda_include() -> Path | None:
    """Folder of cuda_runtime_api.h."""
    nvcc = nvcc_path()
    if nvcc is None:
        return None
    home = Path(nvcc).resolve().parents[1]
    return next(
        (f for f in (home / "include", Path("/usr/local/cuda/include")) if (f / "cuda_runtime_api.h").is_file()), None
    )


def nvcc_path() -> str | None:
    """CUDA's compiler."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def architectures() -> tuple[str, ...]:
    """What a plugin holds code for, the last one as PTX too; CUDA 12 knows 110, Jetson Thor, by another number."""
    nvcc = nvcc_path()
    known = run(nvcc, "--list-gpu-arch").split() if nvcc else []
    every = ("75", "80", "86", "87", "89", "90", "100", "110", "120")
    return tuple(number for number in every if not known or f"compute_{number}" in known)


def cuobjdump_path() -> str | None:
    """The tool that lists GPU code, of the CUDA toolkit or of the Python package nvidia-cuda-cuobjdump."""
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    package = importlib.util.find_spec("nvidia")
    for folder in (package.submodule_search_locations or []) if package else []:
        found = found or next((str(p) for p in Path(folder).glob("cu*/bin/cuobjdump")), None)
    return found


def rtx_folder() -> Path | None:
    """Folder of TensorRT-RTX's shared libraries, if its two Python packages are installed."""
    spec = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    if spec is None or spec.origin is None or importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        return None
    return Path(spec.origin).parent


def link_rtx(folder: Path) -> dict[str, str]:
    """Puts links under the names that RTX looks for into `folder`; returns the environment of a child process."""
    source = rtx_folder()
    assert source is not None
    for library in ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so", "libcudart.so"):
        target = next(source.glob(f"{library}.*"))
        major = target.name.removeprefix(library).split(".")[1]
        for name in (library, f"{library}.{major}"):
            (folder / name).symlink_to(target)
    return os.environ | {"LD_LIBRARY_PATH": str(folder)}


def run(*command: str | Path, **options: object) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return str(done.stdout)


def _age(folder: Path) -> float:
    return -folder.stat().st_mtime
