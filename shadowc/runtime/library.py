# SPDX-License-Identifier: Apache-2.0
"""The installed op library. Engines are always run with it, never with the copy in their folder."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shadowc._version import __version__
from shadowc.spec.errors import IncompatibleEngineError, SetupError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

VARIABLE = "SHADOWC_ORT_LIBRARY"
"""Environment variable with the path of another build of the library."""
_MEASURES = ("shadowc_stream_read", "shadowc_stream_over", "shadowc_round_trip")
"""A build of before may lack one."""
_ROUND_TRIPS = 8
"""Series, of which the shortest counts."""
REINSTALL = "in a checkout: make setup; elsewhere: pip install --force-reinstall FILE.whl"


def library_path() -> Path:
    """Where the op library is.

    Raises:
        SetupError: it was not built or not installed.
    """
    from shadowc.plugins import cpu_library

    chosen = os.environ.get(VARIABLE)
    if chosen and not Path(chosen).is_file():
        raise SetupError(f"{VARIABLE} names {chosen}, which is no file", hint=f"unset {VARIABLE}")
    try:
        return Path(chosen) if chosen else Path(cpu_library())
    except FileNotFoundError as error:
        raise SetupError(
            "the op library libshadowc_ort.so is not installed",
            hint=REINSTALL,
        ) from error


@dataclass(frozen=True)
class OpLibrary:
    """The library, loaded."""

    path: Path
    version: str
    isa: str
    """Instruction set that the kernels chose on this machine."""
    _handle: ctypes.CDLL

    @staticmethod
    def installed() -> OpLibrary:
        """Load the installed library and check that it belongs to this package.

        Raises:
            SetupError: it is missing or cannot be loaded.
            IncompatibleEngineError: it was built from another version of shadowc.
        """
        return OpLibrary.at(library_path())

    @staticmethod
    def at(path: Path) -> OpLibrary:
        """Load the library at `path`; raises as `installed`."""
        try:
            handle = ctypes.CDLL(str(path))
            version = _text(handle, "shadowc_ort_version")
            isa = _text(handle, "shadowc_ort_isa")
            for name in _MEASURES:
                getattr(handle, name)
        except (OSError, AttributeError) as error:
            raise SetupError(f"the op library {path} cannot be loaded: {error}", hint=REINSTALL) from error
        if version != __version__:
            raise IncompatibleEngineError(
                f"the op library {path} is of version {version}, shadowc of version {__version__}", hint=REINSTALL
            )
        if not isa:
            raise SetupError(
                f"SHADOWC_ISA={os.environ.get('SHADOWC_ISA', '')} is no level of this machine", hint="unset SHADOWC_ISA"
            )
        return OpLibrary(path, version, isa, handle)

    def stream_read(self, size: int, threads: int, repeats: int) -> float:
        """Best bytes per second of `repeats` sequential reads of `size` bytes of memory.

        Raises:
            SetupError: there is no memory for them, or the machine grants fewer threads.
        """
        function = self._handle.shadowc_stream_read
        function.argtypes = (ctypes.c_size_t, ctypes.c_int, ctypes.c_int)
        function.restype = ctypes.c_double
        speed = float(function(size, threads, repeats))
        if speed == 0:
            raise SetupError(
                f"how fast memory is read could not be measured: that takes {size / 1e6:,.0f} MB and {threads} threads",
                hint="free some, or raise the limits of the process (ulimit -v, ulimit -u)",
            )
        return speed

    def round_trip(self) -> float | None:
        """Nanoseconds in which two threads hand a cache line back and forth; None where only one can run."""
        function = self._handle.shadowc_round_trip
        function.argtypes, function.restype = (ctypes.c_int,), ctypes.c_double
        return float(function(_ROUND_TRIPS)) or None

    def stream_over(self, memory: npt.NDArray[np.uint8], threads: int, repeats: int) -> float:
        """The same of memory that is there already.

        Args:
            memory: uint8 [size], contiguous, from the start of a page. What is behind the last whole page of a thread's
                share is not read; of less than a page for each thread nothing is, and the result is 0.
            threads: they share the bytes evenly.
            repeats: of which the best counts.
        """
        function = self._handle.shadowc_stream_over
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int)
        function.restype = ctypes.c_double
        return float(function(memory.ctypes.data, memory.size, threads, repeats))


def _text(handle: ctypes.CDLL, name: str) -> str:
    function = getattr(handle, name)
    function.argtypes, function.restype = (), ctypes.c_char_p
    return bytes(function()).decode()
