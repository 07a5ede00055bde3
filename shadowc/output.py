# SPDX-License-Identifier: Apache-2.0
"""Folders that shadowc writes: checked before any work, made beside their place, put there when complete.

In: where the user wants a folder, and what may be replaced there. A folder that holds anything that shadowc did not
write itself is never replaced.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from shadowc.spec.errors import InputError, SetupError

Listed = Callable[[Mapping[str, object]], Collection[str] | None]
"""From the content of a folder's describing file to the names of its other files; None: not written by shadowc."""

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""A full disk, an exhausted quota, a file larger than its file system or this process may write."""
_OVERTAKEN = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT})
"""What a rename meets where another process renames to the same place."""
_TRIES = 5
_ELSEWHERE = "choose another folder with --out"
_NAMED = 5
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_LONGEST_LABEL = 200
"""Bytes of a name that may be repeated in the name of a temporary folder; file systems take 255 in all."""
_LONGEST_FILE = "x" * 64
"""Stands for the longest name of a file that shadowc writes."""
_being_written: set[Path] = set()
"""Temporary folders of this process."""


class NoSpaceError(SetupError):
    """A disk, quota or limit without room for `needed` bytes (0: unknown)."""

    needed = 0


def check_output(out: Path, what: str, marker: str, listed: Listed) -> None:
    """Refuse a place that holds anything but an older output of the same kind; nothing is touched.

    Args:
        out: where a folder is to be written. Free places, empty folders and damaged outputs pass.
        what: the kind of output, with its article.
        marker: the JSON file that describes such a folder.
        listed: the files that this description accounts for.

    Raises:
        InputError: it is a file, a folder with other content, or in a place where nothing can be written.
    """
    require_utf8(out)
    try:
        _check_length(out)
        if out.is_dir():
            _check_folder(out, what, marker, listed)
        elif os.path.lexists(out):
            raise InputError(f"{out} exists and is not a folder; nothing was written", hint=_ELSEWHERE)
        else:
            out.stat()
    except FileNotFoundError:
        _check_parent(out)
    except (OSError, ValueError) as error:
        raise InputError(f"{_shown(out)} cannot be used: {_reason(error)}", hint=_ELSEWHERE) from error


@contextmanager
def staged(out: Path, check: Callable[[Path], None], what: str, needed: int = 0) -> Iterator[Path]:
    """Give a temporary sibling of `out` to write to, and put it in `out`'s place when the block ends well.

    What is already there stays usable until it is replaced. If the block raises, nothing is left.

    Args:
        out: the folder's place.
        check: refuses what may not be replaced; asked before and after the block.
        what: the kind of output, for messages.
        needed: bytes that it takes at least; 0: unknown.

    Raises:
        InputError: `out` holds something else, or its parent cannot be written.
        SetupError: the disk has no room.
    """
    check(out)
    out = out.resolve()
    result = f"no {what} was written"
    with writing(out.parent, needed):
        out.parent.mkdir(parents=True, exist_ok=True)
        _recover(out)
        if needed > free_space(out.parent):
            raise no_space(out.parent, needed=needed, result=result)
        staging = _sibling(out, "tmp")
        _being_written.add(staging)
        staging.mkdir()
        held = _lock(staging)
    try:
        yield staging
        replace_folder(staging, out, check)
    except OSError as error:
        needed = max(needed, bytes_in(staging))
        shutil.rmtree(staging, ignore_errors=True)  # before the free space is looked at
        if error.errno in NO_SPACE:
            raise no_space(out.parent, error, needed=needed, result=result) from error
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{_shown(out)}: its files' paths are too long; {result}", hint=_ELSEWHERE) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _being_written.discard(staging)
        if held is not None:
            os.close(held)


def clear_leftovers(out: Path) -> None:
    """Remove what killed runs left beside `out`, as far as that is possible."""
    with suppress(OSError):
        _recover(out.resolve())


@contextmanager
def writing(folder: Path, needed: int = 0, hint: str = _ELSEWHERE) -> Iterator[None]:
    """Turn the operating system's refusal to write into one sentence.

    Args:
        folder: where is written, for messages.
        needed: bytes that are written; 0: unknown.
        hint: what to type where the folder cannot be written to.

    Raises:
        SetupError: the disk is full.
        InputError: the folder cannot be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise no_space(folder, error, needed=needed) from error
        raise InputError(f"cannot write to {_shown(folder)}: {_reason(error)}", hint=hint) from error


def free_space(folder: Path) -> float:
    """Bytes that this user can still write on the disk of a folder; infinity where its file system does not tell."""
    try:
        disk = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.is_dir()))
    except OSError:
        return math.inf
    return disk.free if disk.total else math.inf


def no_space(folder: Path, error: OSError | None = None, *, needed: int = 0, result: str = "") -> NoSpaceError:
    """The error of a disk without room, an exhausted quota, or a limit on the size of a file.

    Args:
        folder: where was written.
        error: what the operating system said; None: nobody has tried yet.
        needed: bytes that it takes at least; 0: unknown.
        result: what is left on disk, as the end of a sentence.
    """
    free = free_space(folder)
    if error is not None and error.errno == errno.EFBIG:
        message, hint = f"a file in {folder} would be larger than {_file_limit()}", "raise the limit"
    else:
        message, hint = f"no space left on the disk of {folder}", "free some space"
        if error is not None and error.errno == errno.EDQUOT:
            message = f"no space left in your quota on the disk of {folder}"
    figures = [f"at least {megabytes(needed)} needed"] if needed else []
    figures += [f"{megabytes(free)} free"] if math.isfinite(free) else []
    figures += ["no inodes free"] if _inodes_gone(folder) else []
    message += f": {', '.join(figures)}" if figures else ""
    found = NoSpaceError(f"{message}; {result}" if result else message, hint=f"{hint}, or use another disk")
    found.needed = needed
    return found


def bytes_in(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def megabytes(count: float) -> str:
    """A size on disk, for messages."""
    return f"{count / 1e6:,.1f} MB"


def replace_folder(staging: Path, out: Path, check: Callable[[Path], None]) -> None:
    """Rename `staging` to `out`; whatever was there is exchanged in one step where the system can do that.

    Of two processes that do this at once the later one's folder stays.

    Raises:
        InputError: something appeared at `out` that may not be replaced.
    """
    for left in reversed(range(_TRIES)):
        try:
            _replace(staging, out, check)
        except OSError as error:
            if error.errno not in _OVERTAKEN or not left or not staging.exists():
                raise
        else:
            return


def label(out: Path) -> str:
    """What the names of temporary folders beside `out` have of its name: all of it, unless it is very long."""
    name = os.fsencode(out.name)
    return out.name if len(name) <= _LONGEST_LABEL else hashlib.sha256(name).hexdigest()


def _replace(staging: Path, out: Path, check: Callable[[Path], None]) -> None:
    if not out.exists():
        staging.rename(out)
        return
    check(out)
    if _exchange(staging, out):
        shutil.rmtree(staging, ignore_errors=True)  # the older folder
        return
    old = _sibling(out, "old")
    out.rename(old)
    try:
        staging.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _inodes_gone(folder: Path) -> bool:
    """Whether the file system has room for bytes but for no further file."""
    try:
        found = os.statvfs(folder)
    except (OSError, AttributeError):
        return False
    return found.f_files > 0 and found.f_favail == 0


def _file_limit() -> str:
    """What limits the size of a file here."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    except (ImportError, OSError):
        return "its file system takes"
    return "its file system takes" if limit < 0 else f"this process may write (ulimit -f: {megabytes(limit)})"


def require_utf8(path: Path, hint: str = _ELSEWHERE) -> None:
    """Refuse a path that is no text: libraries in other languages take paths as UTF-8.

    Raises:
        InputError: it has bytes that are not.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{_shown(path)} cannot be used: the name is not UTF-8", hint=hint) from error


def _check_length(out: Path) -> None:
    """Raise OSError if the temporary folder's files would have longer paths than the system takes."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(_sibling(out.absolute(), "tmp") / _LONGEST_FILE)


def _check_parent(out: Path) -> None:
    """The folder in which the first missing folder would be made must be writable."""
    parent = next(place for place in out.absolute().parents if place.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {parent}", hint=_ELSEWHERE)


def _check_folder(out: Path, what: str, marker: str, listed: Listed) -> None:
    found = _files(out)
    if not found:
        return
    known = listed(_description(out / marker)) if marker in found else None
    if known is None:
        reason = f"its {marker} is something else" if marker in found else f"it has no {marker}"
        raise InputError(f"{out} exists and is not {what} ({reason}); nothing was written", hint=_ELSEWHERE)
    foreign = [name for name in found if name != marker and name not in known]
    if foreign:
        more = f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        raise InputError(
            f"{out} holds files that do not belong to {what}: {', '.join(foreign[:_NAMED])}{more}; nothing was written",
            hint="move them away, or choose another folder with --out",
            problems=foreign[:_NAMED],
        )


def _files(folder: Path) -> list[str]:
    """Everything below a folder but the folders; links count, wherever they lead."""

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        found += [(Path(place) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def _description(marker: Path) -> Mapping[str, object]:
    try:
        content = json.loads(marker.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _shown(path: Path) -> str:
    """A path short enough for a sentence."""
    text = repr(str(path))[1:-1]
    return text if len(text) <= 200 else f"{text[:100]}…{text[-20:]}"


def _sibling(out: Path, kind: str) -> Path:
    return out.parent / f".{label(out)}.{os.getpid()}.{os.urandom(4).hex()}.{kind}"


def _recover(out: Path) -> None:
    """Clear what killed runs left beside `out`, and put a folder back that was caught between two renames."""
    pattern = re.compile(rf"\.{re.escape(label(out))}\.(\d+)\.[0-9a-f]+\.(tmp|old)")
    for path in sorted(out.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or path in _being_written or _alive(int(match[1])) or _locked(path):
            continue
        if match[2] == "old" and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    """Whether another process has this number; in a container the one that was killed may have had ours."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _lock(folder: Path) -> int | None:
    """Hold a folder for as long as this process lives, or the number that is returned is open; None: not here.

    Numbers of processes say nothing about those of another container, or another machine, that write to the same disk.
    """
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    with suppress(OSError, ImportError):  # some network file systems lock no folders
        import fcntl

        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return held


def _locked(folder: Path) -> bool:
    """Whether another process holds it, wherever that runs."""
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        import fcntl

        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, ImportError):
        return False
    finally:
        os.close(held)
    return False


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically (Linux renameat2); False where that does not exist."""
    with suppress(OSError, AttributeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        done = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
        return int(done) == 0
    return False
