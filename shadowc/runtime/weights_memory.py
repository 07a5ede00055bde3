# SPDX-License-Identifier: Apache-2.0
"""weights.bin in memory, once per process, and in large pages where the system grants them.

Decoding reads every active weight once per token from all over a gigabyte. With pages of 4 KiB every record is also a
miss of the address translation: on a virtual machine that has been measured to cost a fifth to a third of the memory's
bandwidth. A mapping of the file is shared by all processes, and its pages are large if the page cache holds the file
in large pieces: it does when a mapping had it read, not when it was copied, and of what was written if memory was at
hand (`renew_pages`). A private copy always has large pages, and belongs to one process.

A compile reads its engine a few times only, and the engine may be larger than the machine's memory: it maps the file
without reading it ahead, and gives pages back while it runs (`passing`).
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shadowc.spec.errors import VerificationError
from shadowc.spec.manifest import WEIGHTS_FILE

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx
    import onnxruntime

Kind = Literal["shared", "renewed", "private"]
KINDS: tuple[Kind, ...] = ("shared", "renewed", "private")
LARGE_PAGE = 1 << 21
_PIECE = 1 << 24
_RENEWED = 1 << 26
"""Bytes that are read anew at a time: enough to see whether it helps."""
ENOUGH_LARGE_PAGES = 0.9
"""Share of a file from which it counts as lying in large pages."""
_POPULATE_READ = 22
"""madvise's MADV_POPULATE_READ (Linux 5.14), which Python has no name for."""
_RELEASE_SECONDS = 0.02
"""Between two times that pages are given back: at 10 GB/s of mapping, 200 MB."""
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")


class WeightsMemory:
    """The bytes of one file.

    Args:
        content: uint8 [size], read only.
        kind: how they came here.
        file: an open file whose content is mapped, which belongs to this object; None: nobody can change the bytes.
        mapping: of a mapped file, what `content` is a view of.
    """

    def __init__(
        self,
        content: npt.NDArray[np.uint8],
        kind: Kind,
        file: int | None = None,
        mapping: mmap.mmap | None = None,
    ) -> None:
        self.content = content
        self.kind = kind
        self._mapping = mapping
        self._lent: list[Any] = []
        self._file = file
        self._modified = 0 if file is None else os.fstat(file).st_mtime_ns
        if file is not None:
            weakref.finalize(self, os.close, file)

    @classmethod
    def open(cls, path: Path, kind: Kind = "shared", *, ahead: bool = True) -> WeightsMemory:
        """Map a file, or copy it.

        Args:
            path: the file.
            kind: "shared" or "renewed": map it; "private": copy it.
            ahead: of a mapped file, read all of it now; False: what is needed, when it is needed.

        Raises:
            OSError: the file cannot be read.
        """
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return cls(np.zeros(0, np.uint8), kind)
            if kind == "private":
                return cls(_copied(file, size), kind)
            mapping = _mapped(file.fileno(), size, ahead)
            return cls(np.frombuffer(mapping, np.uint8), kind, os.dup(file.fileno()), mapping)

    def require_unchanged(self) -> None:
        """Refuse to go on with bytes that are no longer those that were checked.

        What is cut off a mapped file cannot be read: the system would end the process (SIGBUS). Moving, removing or
        replacing the file is no change, its bytes stay where they are.

        Raises:
            VerificationError: the mapped file was cut or written to.
        """
        if self._file is None:
            return
        found = os.fstat(self._file)
        if found.st_size != self.content.size:
            change = f"has {found.st_size} bytes, expected {self.content.size}"
        elif found.st_mtime_ns != self._modified:
            change = "was written to"
        else:
            return
        raise VerificationError(
            f"{WEIGHTS_FILE} {change}: it changed after it was loaded", hint="restore the folder, then load it again"
        )

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Inside, what was read of a mapped file does not stay in this process's resident memory.

        Pages are unmapped again and again; the system's page cache still has them, as far as there is room.
        """
        done = Event()

        def release() -> None:
            while not done.wait(_RELEASE_SECONDS):
                self._release()

        worker = Thread(target=release, name="shadowc-release", daemon=True)
        worker.start()
        try:
            yield
        finally:
            done.set()
            worker.join()
            self._release()

    def _release(self) -> None:
        if self._mapping is not None:
            _advise(self._mapping, getattr(mmap, "MADV_DONTNEED", None))  # clean pages of a file: they can come again

    def lend(self, options: onnxruntime.SessionOptions, model: onnx.ModelProto) -> None:
        """Let a session take its initialisers from here instead of reading the file.

        The session borrows the memory: this object has to outlive it.
        """
        import onnx
        import onnxruntime as ort

        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            # Unsigned words, for numpy has no bfloat16: only their size has to fit.
            array = self._bytes_of(tensor).view(f"u{size}").reshape(tuple(tensor.dims))
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.data_type)
            options.add_initializer(tensor.name, value)
            self._lent += [array, value]

    def floats(self, tensor: onnx.TensorProto) -> npt.NDArray[np.float32]:
        """A copy of an initialiser of float32.

        Raises:
            VerificationError: as `require_unchanged`.
        """
        from onnx import TensorProto, numpy_helper

        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor).copy()
        self.require_unchanged()
        return self._bytes_of(tensor).view(np.float32).reshape(tuple(tensor.dims)).copy()

    def _bytes_of(self, tensor: onnx.TensorProto) -> npt.NDArray[np.uint8]:
        """Where an initialiser lies that is stored in the file."""
        _, start, end = place_of(tensor)
        return self.content[start:end]

    @property
    def large_pages(self) -> float | None:
        """Share of the bytes that lie in large pages; None where the system does not tell."""
        return _large_share(self.content)


def place_of(tensor: onnx.TensorProto) -> tuple[str, int, int]:
    """In which file an initialiser lies, its first byte there, and that behind its last one."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    start = int(place.get("offset", 0))
    return place["location"], start, start + int(place["length"])


def renew_pages(path: Path) -> None:
    """Let the page cache have a file in large pages, which it never has of a copy, nor of what it wrote in a hurry.

    Small ones are dropped and the file is read anew, until that does not make them large: some file systems have none.
    What is not on the disk yet is brought there first. Where others have the file mapped, or the system has no such
    calls or does not tell, it stays as it is.

    Raises:
        OSError: the file cannot be read, or what was written cannot be brought to the disk.
    """
    if not hasattr(os, "posix_fadvise") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        whole = size - size % LARGE_PAGE
        pieces = [(start, min(_RENEWED, whole - start)) for start in range(0, whole, _RENEWED)]
        small = [piece for piece in pieces if not _is_large(file.fileno(), *piece)]
        if small:
            _bring_to_disk(file.fileno())
        for piece in small:
            try:
                os.posix_fadvise(file.fileno(), *piece, os.POSIX_FADV_DONTNEED)
            except OSError:  # slower, not wrong
                return
            if not _is_large(file.fileno(), *piece):
                return


def _bring_to_disk(file: int) -> None:
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EINVAL):  # such files have nothing to bring there
            raise


def _is_large(file: int, start: int, length: int) -> bool:
    """Whether a piece of a file is mapped in large pages; also where that cannot be told, so that it is left alone."""
    try:
        mapping = _mapped(file, length, ahead=True, offset=start)
    except ValueError:  # cut meanwhile: who opens the file will say so
        return True
    share = _large_share(np.frombuffer(mapping, np.uint8))
    return share is None or share >= ENOUGH_LARGE_PAGES


def _large_share(content: npt.NDArray[np.uint8]) -> float | None:
    smaps = Path("/proc/self/smaps")
    if not smaps.is_file() or content.size == 0:
        return None
    first = content.ctypes.data
    inside, large = False, 0
    for line in smaps.read_text(encoding="utf-8", errors="replace").splitlines():
        if found := _MAPPING.match(line):
            inside = int(found[1], 16) < first + content.size and int(found[2], 16) > first
        elif inside and line.startswith(("AnonHugePages:", "FilePmdMapped:", "ShmemPmdMapped:")):
            large += int(line.split()[1]) << 10
    return min(large / content.size, 1.0)


def _mapped(file: int, size: int, ahead: bool, offset: int = 0) -> mmap.mmap:
    mapping = mmap.mmap(file, size, access=mmap.ACCESS_READ, offset=offset)
    # A file that is not in the page cache yet comes in as large pieces, if the file system can.
    _advise(mapping, getattr(mmap, "MADV_HUGEPAGE", None))
    _advise(mapping, _POPULATE_READ if ahead and hasattr(mmap, "MADV_HUGEPAGE") else None)
    return mapping


def private_memory(size: int, large: bool = True) -> npt.NDArray[np.uint8]:
    """Zeros [size] of this process from the start of a large page on, in large pages where the system has some.

    Not `large`: of small pages, each of which takes memory when it is first written.
    """
    # Private: shared anonymous memory is a file to the system, and files rarely get large pages.
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    page = LARGE_PAGE if large else 1
    memory = mmap.mmap(-1, size + page, **flags)
    _advise(memory, getattr(mmap, "MADV_HUGEPAGE" if large else "MADV_NOHUGEPAGE", None))
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % page
    return whole[start : start + size]


def _copied(file: Any, size: int) -> npt.NDArray[np.uint8]:
    copy = private_memory(size)
    view, done = copy.data, 0
    while done < size:
        read = file.readinto(view[done : done + _PIECE])
        if not read:
            raise OSError(f"the file ended after {done} of {size} bytes")
        done += read
    copy.flags.writeable = False
    return copy


def _advise(mapping: mmap.mmap, advice: int | None) -> None:
    if advice is None:
        return
    try:
        mapping.madvise(advice)
    except OSError:  # an older kernel, or a file system without large pages: slower, not wrong
        return
