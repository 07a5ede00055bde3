# SPDX-License-Identifier: Apache-2.0
"""Results of the stages on disk, found again by the content of everything that decided them.

In: a stage's name, its key (plain JSON values), and a function that fills a folder. Out: the finished folder,
made at most once. Layout: `<root>/<stage>/<hash of the key>/`, with the key itself in `key.json`.

A folder is made beside its place and renamed when it is complete, under a lock of its own, so a killed run
leaves nothing but a `.tmp-` folder, which the next run of that stage removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from shadowc._version import __version__
from shadowc.output import NO_SPACE, NoSpaceError, bytes_in, no_space
from shadowc.spec.errors import InternalError, SetupError

SCHEMA: Final = 1
"""Raise it when a stage writes other files, or other content for the same key, within one version of shadowc."""
ROOT_VARIABLE: Final = "SHADOWC_CACHE"

_KEY_FILE = "key.json"
_TEMPORARY = ".tmp-"
_LOCKS = ".locks"
_REFUSALS = NO_SPACE | {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}
"""Errors of a maker that are about the place it writes to."""
_HINT = f"set {ROOT_VARIABLE} to a folder that you may write to"


def default_root() -> Path:
    """The folder named by SHADOWC_CACHE, else the user's cache folder.

    Raises:
        SetupError: neither is known, because the user has no home folder.
    """
    named = os.environ.get(ROOT_VARIABLE)
    if named:
        return Path(named).absolute()
    from platformdirs import user_cache_dir

    try:
        root = Path(user_cache_dir("shadowc"))
    except RuntimeError:  # newer platformdirs; older ones return a path that starts with ~
        root = Path("~")
    if not root.is_absolute():
        raise SetupError("no home folder is known, so there is no place for cached stages", hint=_HINT)
    return root


class StageCache:
    """One cache folder.

    Args:
        root: where it lies; None: the default place.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = root

    @property
    def root(self) -> Path:
        """The cache folder; it need not exist yet."""
        if self._root is None:
            self._root = default_root()
        return self._root

    def entry(self, stage: str, key: Mapping[str, object]) -> Path | None:
        """The finished folder for this key, or None if there is none or it is damaged."""
        text = _canonical(stage, key)
        folder = self._place(stage, text)
        return folder if _is_complete(folder, text) else None

    def get_or_make(
        self,
        stage: str,
        key: Mapping[str, object],
        make: Callable[[Path], None],
        *,
        on_wait: Callable[[], None] | None = None,
    ) -> tuple[Path, bool]:
        """The finished folder for this key, made now if it is not there yet.

        Args:
            stage: name of the stage; lower-case words joined by hyphens.
            key: everything that decides the content, as plain JSON values.
            make: fills the empty folder that it is given; if it raises, nothing is left.
            on_wait: called once if another process is making the same entry right now.

        Returns:
            The folder, and True if it was found, False if it was made by this call.

        Raises:
            SetupError: the cache folder cannot be written to, or its disk is full.
        """
        text = _canonical(stage, key)
        folder = self._place(stage, text)
        if _is_complete(folder, text):
            return folder, True
        with _explained(self.root):
            (folder.parent / _LOCKS).mkdir(parents=True, exist_ok=True)
            self._clean(folder.parent)
        with self._locked(folder, on_wait):
            if _is_complete(folder, text):
                return folder, True
            self._make(stage, folder, text, make)
        return folder, False

    @contextmanager
    def alone(self, name: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Let one process after the other, of all that share this cache, do what `name` stands for.

        Where the cache cannot be written to nobody waits.

        Args:
            name: what is to be done by one at a time, and where.
            on_wait: called once if another process is at it right now.
        """
        with ExitStack() as held:
            try:
                place = self.root / _LOCKS / hashlib.sha256(os.fsencode(name)).hexdigest()
                with _explained(self.root):
                    (place.parent / _LOCKS).mkdir(parents=True, exist_ok=True)
                held.enter_context(self._locked(place, on_wait))
            except SetupError:
                pass
            yield

    def _make(self, stage: str, folder: Path, text: str, make: Callable[[Path], None]) -> None:
        """Fill a temporary folder and give it its name, under the entry's lock."""
        temporary = folder.parent / f"{_TEMPORARY}{folder.name}"
        with _explained(self.root):
            _remove(folder)
            _remove(temporary)
            temporary.mkdir()
        try:
            with _refusals_explained(self.root):
                make(temporary)
            with _explained(self.root):
                _seal(temporary, text)
                temporary.rename(folder)
        except NoSpaceError as error:
            needed = max(error.needed, bytes_in(temporary))
            shutil.rmtree(temporary, ignore_errors=True)  # before the free space is looked at
            raise _full(self.root, error.__cause__, needed, f"stage {stage} was not kept") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _place(self, stage: str, text: str) -> Path:
        return self.root / stage / hashlib.sha256(text.encode()).hexdigest()

    @contextmanager
    def _locked(self, folder: Path, on_wait: Callable[[], None] | None) -> Iterator[None]:
        from filelock import FileLock, Timeout

        lock = FileLock(folder.parent / _LOCKS / folder.name)
        with _explained(self.root):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if on_wait is not None:
                    on_wait()
                lock.acquire()
            except NotImplementedError as error:  # filelock's word for a file system without locks
                raise SetupError(
                    f"the file system of the cache folder {self.root} has no locks (flock)", hint=_HINT
                ) from error
        try:
            yield
        finally:
            lock.release()

    def _clean(self, stage_folder: Path) -> None:
        """Remove what killed runs left; a temporary folder whose lock is held belongs to a run that is alive."""
        from filelock import FileLock, Timeout

        for leftover in sorted(stage_folder.glob(f"{_TEMPORARY}*")):
            lock = FileLock(stage_folder / _LOCKS / leftover.name.removeprefix(_TEMPORARY))
            try:
                with lock.acquire(timeout=0):
                    shutil.rmtree(leftover, ignore_errors=True)
            except Timeout:
                continue


def _canonical(stage: str, key: Mapping[str, object]) -> str:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", stage):
        raise InternalError(f"{stage!r} is not a name for a stage: expected lower-case words joined by hyphens")
    whole = {"stage": stage, "schema": SCHEMA, "shadowc": __version__, "key": dict(key)}
    try:
        return json.dumps(whole, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InternalError(f"the key of stage {stage} holds something that is not plain JSON: {error}") from error


def _seal(folder: Path, text: str) -> None:
    """Write key.json: the key, and the size of every file for the check on reading."""
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }
    content = json.dumps({"of": json.loads(text), "files": files}, sort_keys=True, indent=1)
    (folder / _KEY_FILE).write_text(content + "\n", encoding="utf-8")


def _is_complete(folder: Path, text: str) -> bool:
    """Whether key.json is there, says the same key, and every file has the size that it had when it was made."""
    try:
        content = json.loads((folder / _KEY_FILE).read_bytes())
        files = content["files"].items()
        return bool(content["of"] == json.loads(text)) and all(
            (folder / name).stat().st_size == size for name, size in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _explained(root: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one sentence about the cache folder."""
    try:
        yield
    except OSError as error:
        raise _refused(root, error) from error


@contextmanager
def _refusals_explained(root: Path) -> Iterator[None]:
    """As `_explained` for a maker, whose other errors are its own."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise _refused(root, error) from error


def _refused(root: Path, error: OSError) -> SetupError:
    if error.errno in NO_SPACE:
        return _full(root, error)
    place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else root
    if root in (place, *place.parents) or place in root.parents or not place.is_absolute():
        return SetupError(f"the cache folder {root} cannot be written to: {error.strerror or error}", hint=_HINT)
    return SetupError(f"{place} cannot be used: {error.strerror or error}", hint="check its permissions")


def _full(root: Path, error: BaseException | None, needed: int = 0, result: str = "") -> NoSpaceError:
    found = no_space(root, error if isinstance(error, OSError) else None, needed=needed, result=result)
    found.hint = f"{found.hint}, or set {ROOT_VARIABLE} to a folder on another one"
    return found
