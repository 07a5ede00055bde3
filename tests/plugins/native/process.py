# SPDX-License-Identifier: Apache-2.0
"""A running kernel_driver behind the interface of tests/plugins/kernels.py: operands in, outputs by name.

One process answers many calls, because an emulator is slow to start.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import IO

import numpy as np

from shadowc.spec.ops import OpSpec
from tests.plugins.native import build


class DriverError(Exception):
    """The driver ended; the message is what it said on standard error."""


class Driver:
    """A running driver; runs one operator at a time. A call behind the one that ended it starts it again.

    Attributes:
        isa: the SIMD level that the kernels run on.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], said: IO[bytes]) -> None:
        """Starts it; `said` is the file of its standard error."""
        self._command, self._environment, self._said = command, environment, said
        self._start()

    def _start(self) -> None:
        self._said.seek(0)
        self._said.truncate()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        self._process = subprocess.Popen(self._command, env=self._environment, **pipes)
        self._to, self._from = self._process.stdin, self._process.stdout
        try:
            self.isa = self._line()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends it."""
        self._process.kill()  # it may be writing what nobody reads
        with contextlib.suppress(BrokenPipeError):
            self._to.close()
        self._from.close()
        self._process.wait()

    def run(self, spec: OpSpec, arrays: Mapping[str, np.ndarray], **attributes: object) -> dict[str, np.ndarray]:
        """Outputs by name.

        Args:
            spec: the operator.
            arrays: its inputs by name.
            attributes: the operator's, and those of driver.cc.

        Raises:
            DriverError: the driver ended, which is how a sanitizer reports.
        """
        if self._process.returncode is not None:
            self.close()
            self._start()
        try:
            self._to.write(_header(spec.name, len(attributes), len(arrays)))
            for name, value in attributes.items():
                self._to.write(_header(name, *(value if isinstance(value, (list, tuple)) else (value,))))
            for name, array in arrays.items():
                self._to.write(_header(name, array.dtype.name, *array.shape) + array.tobytes())
            self._to.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return dict(self._tensor() for _ in range(int(self._line())))

    def _tensor(self) -> tuple[str, np.ndarray]:
        name, dtype, *shape = self._line().split()
        made = np.empty([int(size) for size in shape], np.dtype(dtype))
        data = self._from.read(made.nbytes)
        if len(data) < made.nbytes:
            raise self._ended()
        return name, np.frombuffer(data, made.dtype).reshape(made.shape)

    def _line(self) -> str:
        line = self._from.readline()
        if not line.endswith(b"\n"):
            raise self._ended()
        return line.decode().strip()

    def _ended(self) -> DriverError:
        code = self._process.wait(30)
        self._said.seek(0)
        return DriverError(self._said.read().decode(errors="replace").strip() or f"kernel_driver ended with {code}")


def _header(*words: object) -> bytes:
    return (" ".join(map(str, words)) + "\n").encode()


@contextlib.contextmanager
def started(*command: str, environment: Mapping[str, str]) -> Iterator[Driver]:
    """The driver, until the end of the block."""
    env = {name: value for name, value in os.environ.items() if name != "SHADOWC_ISA"} | environment
    with tempfile.TemporaryFile() as said, contextlib.closing(Driver(command, env, said)) as driver:
        yield driver


def on_arm(cpu: str, isa: str = "native") -> AbstractContextManager[Driver]:
    """The driver for 64-bit Arm.

    Args:
        cpu: a processor of qemu's, such as `cortex-a72` or `max`.
        isa: the SIMD level, or a better one's limit.

    Raises:
        UnavailableError: no cross compiler, or no qemu.
    """
    build.need("qemu-aarch64")
    libraries = "/usr/aarch64-linux-gnu"  # of Debian's cross compiler
    command = ("qemu-aarch64", "-L", libraries, "-cpu", cpu, str(build.driver("aarch64")))
    return started(*command, environment={"SHADOWC_ISA": isa})


def under_tsan() -> AbstractContextManager[Driver]:
    """The driver under ThreadSanitizer: the first race ends it.

    Raises:
        UnavailableError: no compiler.
    """
    command = ["setarch", "-R", str(build.driver("tsan"))]
    # ThreadSanitizer wants the addresses where it expects them. A container may forbid to ask for that.
    if subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False).returncode != 0:
        command = command[2:]
    # The longest history: a race whose first access has been forgotten is not reported.
    return started(*command, environment={"TSAN_OPTIONS": "halt_on_error=1:history_size=7"})


def under_asan() -> AbstractContextManager[Driver]:
    """The driver under AddressSanitizer and UndefinedBehaviorSanitizer: the first finding ends it.

    Raises:
        UnavailableError: no compiler.
    """
    # Leaks are looked for with ptrace, which a container may forbid.
    options = {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"}
    return started(str(build.driver("asan")), environment=options)
