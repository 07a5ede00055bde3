# SPDX-License-Identifier: Apache-2.0
"""Folders that shadowc writes: checked before any work, made beside their place, put there when complete.

In: where the user wants a folder, and what may be replaced there. A folder that holds anything that shadowc did not
write itself is never replaced.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from shadowc.spec.errors import InputError, SetupError, ShadowcError

Listed = Callable[[Mapping[str, object]], Collection[str] | None]
"""From the content of a folder's describing file to the names of its other files; None: not written by shadowc."""

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_ELSEWHERE = "choose another folder with --out"
_NAMED = 5
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


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
    try:
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
def staged(out: Path, check: Callable[[Path], None], what: str) -> Iterator[Path]:
    """Give a temporary sibling of `out` to write to, and put it in `out`'s place when the block ends well.

    What is already there stays usable until it is replaced. If the block raises, nothing is left.

    Args:
        out: the folder's place.
        check: refuses what may not be replaced; asked before and after the block.
        what: the kind of output, for messages.

    Raises:
        InputError: `out` holds something else, or its parent cannot be written.
        SetupError: the disk is full.
    """
    check(out)
    out = out.resolve()
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        _recover(out)
        staging = _sibling(out, "tmp")
        staging.mkdir()
    try:
        yield staging
        replace_folder(staging, out, check)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise no_space(out.parent, f"no {what} was written") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into one sentence.

    Raises:
        SetupError: the disk is full.
        InputError: the folder cannot be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise no_space(folder) from error
        raise InputError(f"cannot write to {_shown(folder)}: {_reason(error)}", hint=_ELSEWHERE) from error


def no_space(folder: Path, result: str = "") -> ShadowcError:
    """The error of a full disk or an exhausted quota."""
    message = f"no space left on the disk of {folder}"
    return SetupError(f"{message}; {result}" if result else message, hint="free some space, or use another disk")


def replace_folder(staging: Path, out: Path, check: Callable[[Path], None]) -> None:
    """Rename `staging` to `out`; whatever was there is exchanged in one step where the system can do that.

    Raises:
        InputError: something appeared at `out` that may not be replaced.
    """
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
    return out.parent / f".{out.name}.{os.getpid()}.{os.urandom(4).hex()}.{kind}"


def _recover(out: Path) -> None:
    """Clear what killed runs left beside `out`, and put a folder back that was caught between two renames."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.(\d+)\.[0-9a-f]+\.(tmp|old)")
    for path in sorted(out.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or _alive(int(match[1])):
            continue
        if match[2] == "old" and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically (Linux renameat2); False where that does not exist."""
    with suppress(OSError, AttributeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        done = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
        return int(done) == 0
    return False
