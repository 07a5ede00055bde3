# SPDX-License-Identifier: Apache-2.0
"""The shadowc operators as machine code: finds the libraries that ONNX Runtime and TensorRT load."""

import pathlib

LIBRARY_NAME = "libshadowc_ort.so"

TENSORRT_BUILDS: dict[str, tuple[str, ...]] = {
    "rtx1": ("rtx1", "trt11", "trt10"),
    "trt10": ("trt10",),
    "trt11": ("trt11",),
}
"""Family of a TensorRT library -> families of headers whose plugin it accepts, best first.

"rtx1" is TensorRT for RTX 1.x, "trt10" and "trt11" are TensorRT 10.x and 11.x. RTX has the plugin ABI of 11.x;
a plugin built from 10.x headers works there too, but tells its errors to stderr instead of TensorRT's logger.
"""
_SELF_REGISTERING_BUILDS = TENSORRT_BUILDS | {"rtx1": ("rtx1", "trt11")}


def cpu_library() -> pathlib.Path:
    """Path of the operator library for ONNX Runtime's CPU provider.

    Raises:
        FileNotFoundError: the package was installed without its compiled part.
    """
    found = _find((LIBRARY_NAME,))
    if found is not None:
        return found
    raise FileNotFoundError(
        f"expected {LIBRARY_NAME} in {_places()}, found none: this is a source tree or an incomplete install. "
        f"Install the package with its compiled part (pip install .), or name the library in SHADOWC_ORT_LIBRARY."
    )


def tensorrt_library(family: str, *, self_registering: bool = False) -> pathlib.Path:
    """Path of the plugin library for one family of TensorRT.

    Args:
        family: "rtx1", "trt10" or "trt11": what the library will be loaded into.
        self_registering: the twin that registers itself when it is loaded with dlopen (Triton, trtexec). It must
            never be given to TensorRT's `load_library`.

    Raises:
        FileNotFoundError: no plugin for this family was built; the message says what the build needs.
        ValueError: no such family.
    """
    builds = _SELF_REGISTERING_BUILDS if self_registering else TENSORRT_BUILDS
    if family not in builds:
        raise ValueError(f"family: expected one of {', '.join(builds)}, found {family!r}")
    names = tuple(f"libshadowc_{build}{'_auto' if self_registering else ''}.so" for build in builds[family])
    found = _find(names)
    if found is not None:
        return found
    raise FileNotFoundError(
        f"expected {' or '.join(names)} in {_places()}, found none: the plugin is built where nvcc and TensorRT's "
        f"headers are. Install the CUDA toolkit, set TENSORRT_INCLUDE_DIR to the folder of NvInferRuntime.h, and "
        f"install again (in a checkout: make setup)."
    )


def rtx_name_library() -> pathlib.Path | None:
    """Path of the empty library that gives TensorRT for RTX its name `libtensorrt_rtx.so`, None where it was not built.

    RTX opens that name when it meets a plugin and ends the process if nothing has it; its Python packages carry the
    library under a longer name. Load this one after the real one.
    """
    return _find(("libshadowc_rtx_name.so",))


def _find(names: tuple[str, ...]) -> pathlib.Path | None:
    # An editable install has two folders: this source, and the one where the build puts libraries.
    return next((p for name in names for folder in __path__ if (p := pathlib.Path(folder) / name).is_file()), None)


def _places() -> str:
    return " or ".join(str(folder) for folder in __path__)
