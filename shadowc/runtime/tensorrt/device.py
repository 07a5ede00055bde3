# SPDX-License-Identifier: Apache-2.0
"""What the runtime asks of a device and of a plan. `cuda.Cudart` and `plans.TrtPlan` are the real ones.

Addresses are plain numbers. Copies and runs are put on one stream, in order; only `synchronize` waits.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from shadowc.spec.errors import SetupError

if TYPE_CHECKING:
    from shadowc.runtime.tensorrt.cuda import Gpu

Address = int
Sizes = tuple[int, ...]
Bytes = npt.NDArray[np.uint8]
_Made = TypeVar("_Made")


class Device(Protocol):
    """Memory and one stream of a GPU; `cuda.Cudart` says what each function does."""

    @property
    def gpu(self) -> Gpu: ...  # noqa: D102
    def allocate(self, size: int) -> Address: ...  # noqa: D102
    def release(self, address: Address) -> None: ...  # noqa: D102
    def allocate_pinned(self, size: int) -> Address: ...  # noqa: D102
    def release_pinned(self, address: Address) -> None: ...  # noqa: D102
    def upload(self, to: Address, host: Address, size: int) -> None: ...  # noqa: D102
    def download(self, host: Address, source: Address, size: int) -> None: ...  # noqa: D102
    def copy_rows(  # noqa: D102
        self, to: Address, to_pitch: int, source: Address, source_pitch: int, width: int, rows: int
    ) -> None: ...
    def synchronize(self) -> None: ...  # noqa: D102
    def begin_capture(self) -> None: ...  # noqa: D102
    def end_capture(self) -> Address: ...  # noqa: D102
    def launch(self, graph: Address) -> None: ...  # noqa: D102
    def release_graph(self, graph: Address) -> None: ...  # noqa: D102


class Execution(Protocol):
    """One plan with addresses and sizes of its own."""

    def bind(self, name: str, address: Address, sizes: Sizes | None = None) -> None:
        """Set where a tensor lies; `sizes` for inputs whose shape is not fixed."""

    def enqueue(self) -> None:
        """Put one run on the stream."""

    def capturable(self) -> bool:
        """Whether the run may be recorded into a graph now."""

    def keep(self) -> None:
        """After a run that has ended well: what was compiled for it is worth keeping. Later calls cost nothing."""


class Plan(Protocol):
    """A plan, ready to run on its device."""

    def execution(self, *, steady: bool) -> Execution:
        """A new execution; all executions of an engine run one after the other.

        Args:
            steady: it will be run often, at one size: worth preparing for exactly that size.
        """

    def keep(self) -> None:
        """Keep what was compiled until now for the next start."""

    def close(self) -> None:
        """Give back what the plan has on the device; it makes no executions any more."""


class Arena:
    """Memory that is given back together: by `close`, or when the arena is forgotten."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._held: list[tuple[Any, Address]] = []
        self._close = weakref.finalize(self, _give_back, self._held)
        self._close.atexit = False  # the process takes it back, and the driver may be gone by then

    def allocate(self, size: int) -> Address:
        """Device memory, not initialised."""
        address = self._device.allocate(size)
        self._held.append((self._device.release, address))
        return address

    def pinned(self, size: int) -> tuple[Address, Bytes]:
        """Pinned host memory, and a view of it; zeros."""
        address = self._device.allocate_pinned(size)
        self._held.append((self._device.release_pinned, address))
        view = bytes_at(address, size)
        view[:] = 0
        return address, view

    def graph(self, graph: Address) -> Address:
        """Take care of a graph."""
        self._held.append((self._device.release_graph, graph))
        return graph

    def close(self) -> None:
        """Give everything back."""
        self._close()


def bytes_at(address: Address, size: int) -> Bytes:
    """A view of host memory; nothing keeps that memory alive."""
    view: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    return view


def with_room(make: Callable[[], _Made], make_room: Callable[[], bool]) -> _Made:
    """What `make` gives; where memory is too short for it, again each time that `make_room` has freed some.

    Args:
        make: gives back by itself what it had taken when it fails.
        make_room: False: there is nothing left to free.

    Raises:
        SetupError: the memory is too short even so.
    """
    while True:  # the next try comes behind the except clause, whose traceback would keep what the last one made
        try:
            return make()
        except SetupError:
            if not make_room():
                raise


def _give_back(held: list[tuple[Any, Address]]) -> None:
    """Release everything, the youngest first; one that fails keeps no other from it, and is told at the end."""
    with ExitStack() as stack:
        while held:
            release, address = held.pop(0)
            stack.callback(release, address)
