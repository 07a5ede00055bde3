# SPDX-License-Identifier: Apache-2.0
"""Pictures that a command writes where the user says: refused before any work if the place cannot take a file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shadowc.spec.errors import InputError


def require_place(path: Path) -> None:
    """Refuse a place that cannot take a file; nothing is touched.

    Raises:
        InputError: it is a folder, lies in none, or may not be written to.
    """
    folder = path.absolute().parent
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not folder.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {path.parent}", hint="name a folder that exists")
        place, needed = (path, os.W_OK) if path.exists() else (folder, os.W_OK | os.X_OK)
    except OSError as error:  # a name that is too long, too
        raise _refused(path, error) from error
    if not os.access(place, needed):
        raise _refused(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def write(path: Path, content: bytes) -> None:
    """Write a picture.

    Raises:
        InputError: the file cannot be written.
    """
    with told(path):
        path.write_bytes(content)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Around what writes a picture.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write {path}: {error.strerror}", hint="name a file in a folder that exists and can be written"
    )
