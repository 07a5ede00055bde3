# SPDX-License-Identifier: Apache-2.0
"""The CUDA runtime through ctypes: the functions that the runtime needs, every status checked.

libcudart alone is enough, so that a torch built for CPUs can stay. Streams and addresses belong to the driver, and
may be shared with TensorRT whatever copy of the CUDA runtime that uses.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shadowc.runtime.tensorrt.bindings import libraries_folder
from shadowc.spec.errors import InternalError, SetupError

Address = int
"""Of device memory, or of pinned host memory."""

VARIABLE = "SHADOWC_CUDART"
"""Environment variable with the path of a libcudart."""
_INSUFFICIENT_DRIVER, _NO_DEVICE, _OUT_OF_MEMORY = 35, 100, 2
_MAJOR, _MINOR = 75, 76
"""cudaDevAttrComputeCapabilityMajor and Minor."""
_NAME_BYTES, _PROPERTIES_BYTES = 256, 1 << 14
"""cudaDeviceProp begins with the name; its size differs between versions, and is far below this."""
_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3
_NON_BLOCKING = 1
_THREAD_LOCAL = 1
_p, _size, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_SIGNATURES: dict[str, tuple[object, ...]] = {
    "cudaGetDeviceCount": (ctypes.POINTER(_int),),
    "cudaSetDevice": (_int,),
    "cudaDeviceGetAttribute": (ctypes.POINTER(_int), _int, _int),
    "cudaGetDeviceProperties": (_p, _int),
    "cudaDriverGetVersion": (ctypes.POINTER(_int),),
    "cudaRuntimeGetVersion": (ctypes.POINTER(_int),),
    "cudaMemGetInfo": (ctypes.POINTER(_size), ctypes.POINTER(_size)),
    "cudaMalloc": (ctypes.POINTER(_p), _size),
    "cudaFree": (_p,),
    "cudaHostAlloc": (ctypes.POINTER(_p), _size, ctypes.c_uint),
    "cudaFreeHost": (_p,),
    "cudaMemcpyAsync": (_p, _p, _size, _int, _p),
    "cudaMemcpy2DAsync": (_p, _size, _p, _size, _size, _size, _int, _p),
    "cudaStreamCreateWithFlags": (ctypes.POINTER(_p), ctypes.c_uint),
    "cudaStreamSynchronize": (_p,),
    "cudaStreamDestroy": (_p,),
    "cudaStreamBeginCapture": (_p, _int),
    "cudaStreamEndCapture": (_p, ctypes.POINTER(_p)),
    "cudaGraphInstantiateWithFlags": (ctypes.POINTER(_p), _p, ctypes.c_ulonglong),
    "cudaGraphLaunch": (_p, _p),
    "cudaGraphExecDestroy": (_p,),
    "cudaGraphDestroy": (_p,),
    "cudaEventCreateWithFlags": (ctypes.POINTER(_p), ctypes.c_uint),
    "cudaEventRecord": (_p, _p),
    "cudaEventSynchronize": (_p,),
    "cudaEventElapsedTime": (ctypes.POINTER(ctypes.c_float), _p, _p),
}
NO_GPU_HINT = (
    "run it on a machine with an NVIDIA GPU, or compile for this one: shadowc compile --model NAME --target cpu"
)
BROKEN_GPU_HINT = (
    "nvidia-smi shows whether the driver, and what else uses the GPU, are well; CUDA_VISIBLE_DEVICES picks another GPU"
)


@dataclass(frozen=True)
class Gpu:
    """The device that is used."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


class Cudart:
    """A loaded libcudart, and its first visible device.

    Args:
        path: file or soname of the library.

    Raises:
        OSError, AttributeError: it cannot be loaded, or lacks a function.
        SetupError: there is no device to work with, no driver, or CUDA fails while it is opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, _int
        self._library.cudaGetErrorName.restype = self._library.cudaGetErrorString.restype = ctypes.c_char_p
        stream = _p()
        try:
            self._require_device()
            self._call("cudaSetDevice", 0)
            self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
            self.gpu = self._describe()
            """Name and compute capability."""
        except InternalError as error:  # no step of ours has run yet: the machine is at fault
            raise SetupError(f"the GPU cannot be used: {error.message}", hint=BROKEN_GPU_HINT) from error
        self.stream = _address(stream)
        """The one stream that everything runs on."""

    def _describe(self) -> Gpu:
        major, minor, properties = _int(), _int(), ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self._call("cudaDeviceGetAttribute", ctypes.byref(major), _MAJOR, 0)
        self._call("cudaDeviceGetAttribute", ctypes.byref(minor), _MINOR, 0)
        self._call("cudaGetDeviceProperties", properties, 0)
        return Gpu(properties.raw[:_NAME_BYTES].split(b"\0")[0].decode(errors="replace"), (major.value, minor.value))

    def memory(self) -> tuple[int, int]:
        """Free bytes, and all bytes."""
        free, total = _size(), _size()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> Address:
        """Device memory, not initialised, aligned to 256 bytes.

        Raises:
            SetupError: there is not so much, stating what is there.
        """
        pointer = _p()
        status = self._library.cudaMalloc(ctypes.byref(pointer), max(size, 1))
        if status == _OUT_OF_MEMORY:
            self._library.cudaGetLastError()
            free, total = self.memory()
            raise SetupError(
                f"{size / 1e6:,.0f} MB more are needed on {self.gpu.name}, "
                f"of whose {total / 1e6:,.0f} MB {free / 1e6:,.0f} are free",
                hint="use fewer rows or a shorter context, free memory of other programs, or a smaller weight type",
            )
        self._check(status, "cudaMalloc")
        return _address(pointer)

    def release(self, address: Address) -> None:
        """Give device memory back."""
        self._call("cudaFree", address)

    def allocate_pinned(self, size: int) -> Address:
        """Host memory that copies can use while the host goes on.

        Raises:
            SetupError: the system does not give so much.
        """
        pointer = _p()
        status = self._library.cudaHostAlloc(ctypes.byref(pointer), max(size, 1), 0)
        if status == _OUT_OF_MEMORY:
            self._library.cudaGetLastError()
            raise SetupError(
                f"{size / 1e6:,.0f} MB more of pinned host memory are needed, and the system does not give them",
                hint="use fewer rows or a shorter context, or free memory of other programs",
            )
        self._check(status, "cudaHostAlloc")
        return _address(pointer)

    def release_pinned(self, address: Address) -> None:
        """Give pinned memory back."""
        self._call("cudaFreeHost", address)

    def upload(self, to: Address, host: Address, size: int) -> None:
        """Copy to the device, on the stream."""
        self._call("cudaMemcpyAsync", to, host, size, _TO_DEVICE, self.stream)

    def download(self, host: Address, source: Address, size: int) -> None:
        """Copy to the host, on the stream."""
        self._call("cudaMemcpyAsync", host, source, size, _TO_HOST, self.stream)

    def copy_rows(self, to: Address, to_pitch: int, source: Address, source_pitch: int, width: int, rows: int) -> None:
        """Copy rows of `width` bytes on the device; a pitch is the distance of two rows."""
        self._call("cudaMemcpy2DAsync", to, to_pitch, source, source_pitch, width, rows, _ON_DEVICE, self.stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cudaStreamSynchronize", self.stream)

    def begin_capture(self) -> None:
        """From here on the stream records instead of running."""
        self._call("cudaStreamBeginCapture", self.stream, _THREAD_LOCAL)

    def end_capture(self) -> Address:
        """Stop recording; returns an executable graph."""
        graph, executable = _p(), _p()
        self._call("cudaStreamEndCapture", self.stream, ctypes.byref(graph))
        try:
            self._call("cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)
        return _address(executable)

    def launch(self, graph: Address) -> None:
        """Run a graph on the stream."""
        self._call("cudaGraphLaunch", graph, self.stream)

    def release_graph(self, graph: Address) -> None:
        """Give a graph back."""
        self._call("cudaGraphExecDestroy", graph)

    def event(self) -> Address:
        """A point in time on the stream."""
        event = _p()
        self._call("cudaEventCreateWithFlags", ctypes.byref(event), 0)
        self._call("cudaEventRecord", event, self.stream)
        return _address(event)

    def milliseconds(self, first: Address, second: Address) -> float:
        """Time between two events; waits for the second."""
        elapsed = ctypes.c_float()
        self._call("cudaEventSynchronize", second)
        self._call("cudaEventElapsedTime", ctypes.byref(elapsed), first, second)
        return elapsed.value

    def _require_device(self) -> None:
        count = _int()
        status = self._library.cudaGetDeviceCount(ctypes.byref(count))
        if status == 0 and count.value > 0:
            return
        if status in (0, _NO_DEVICE):
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            where = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
            raise SetupError(f"the NVIDIA driver sees no GPU{where}", hint=NO_GPU_HINT)
        if status == _INSUFFICIENT_DRIVER:
            driver, runtime = _int(), _int()
            self._library.cudaDriverGetVersion(ctypes.byref(driver))
            self._library.cudaRuntimeGetVersion(ctypes.byref(runtime))
            if driver.value == 0:
                raise SetupError("this machine has no NVIDIA driver, and so no usable GPU", hint=NO_GPU_HINT)
            raise SetupError(
                f"the NVIDIA driver is too old: it supports CUDA {_version(driver.value)}, running needs "
                f"{_version(runtime.value)}",
                hint="update the NVIDIA driver",
            )
        self._check(status, "cudaGetDeviceCount")

    def _call(self, name: str, *arguments: object) -> None:
        self._check(getattr(self._library, name)(*arguments), name)

    def _check(self, status: int, name: str) -> None:
        if status:
            label = bytes(self._library.cudaGetErrorName(status)).decode()
            text = bytes(self._library.cudaGetErrorString(status)).decode()
            raise InternalError(f"{name} failed: {label} ({status}), {text}")


@functools.cache
def open_cuda() -> Cudart:
    """Load a libcudart and take the first visible GPU.

    Raises:
        SetupError: no library, no driver, no GPU, or one that fails; the sentence says which.
    """
    failed: list[str] = []
    driver: SetupError | None = None
    for path in _candidates():
        try:
            return Cudart(path)
        except SetupError as error:  # another, older runtime may go with this driver
            driver = driver or error
        except (OSError, AttributeError) as error:
            failed.append(f"{path}: {error}")
    if driver is not None:
        raise driver
    if _loadable("libcuda.so.1"):
        raise SetupError(
            f"no CUDA runtime was found ({len(failed)} places looked at)",
            hint=f"pip install 'shadowc[rtx]', or name a libcudart in {VARIABLE}",
            problems=failed,
        )
    raise SetupError("this machine has no NVIDIA driver, and so no usable GPU", hint=NO_GPU_HINT)


def _candidates() -> Iterator[str]:
    """Files and sonames, the most deliberate choice first."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        yield chosen
        return
    folders = [folder for folder in (libraries_folder(),) if folder is not None]
    spec = importlib.util.find_spec("nvidia")  # the runtime's wheels share this package
    for root in spec.submodule_search_locations or () if spec is not None else ():
        folders += [Path(root) / "cu13" / "lib", Path(root) / "cuda_runtime" / "lib"]
    folders.append(Path("/usr/local/cuda/lib64"))
    for folder in folders:
        yield from map(str, sorted(folder.glob("libcudart.so.*"), reverse=True))
    yield from ("libcudart.so.13", "libcudart.so.12", "libcudart.so")


def _loadable(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _address(pointer: ctypes.c_void_p) -> Address:
    return pointer.value or 0


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
