# SPDX-License-Identifier: Apache-2.0
"""From a folder to an engine: every check comes before the first run, and each failure names the next command."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from shadowc.runtime.cores import usable_cores
from shadowc.runtime.engine import Engine
from shadowc.runtime.library import OpLibrary
from shadowc.runtime.session import Session, check_ort
from shadowc.runtime.verification import RECOMPILE, file_problems, read_manifest
from shadowc.spec.errors import InputError, ShadowcError, VerificationError
from shadowc.spec.manifest import MODEL_FILE, REFERENCE_FILE

__all__ = ["VerifyReport", "load", "read_manifest", "verify"]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """All findings about a folder."""

    folder: Path
    files: int
    """Files that were checked."""
    size: int
    """Their bytes, as the manifest has them."""
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def require(self) -> None:
        """Raise VerificationError with all problems, if there are any."""
        if self.problems:
            raise VerificationError(
                f"{self.folder}: {'; '.join(self.problems)}", hint=RECOMPILE, problems=self.problems
            )

    def __str__(self) -> str:
        if self.passed:
            return f"{self.folder}: {self.files} files, {self.size / 1e6:.1f} MB, all as compiled"
        return "\n".join([f"{self.folder}: {len(self.problems)} problems", *self.problems])


def load(
    folder: str | PathLike[str],
    *,
    threads: int | None = None,
    verify: bool = True,
    reference: bool = False,
    skip_zeros: bool | None = None,
) -> Engine:
    """Load an engine folder.

    Args:
        folder: what `shadowc compile` wrote.
        threads: threads of the operators; None: one per usable core.
        verify: compare all files with the hashes in engine.json first (False: only their sizes).
        reference: run reference.onnx in stock ONNX Runtime, without the op library: slow, the judge.
        skip_zeros: override the compiled setting; None keeps it.

    Raises:
        InputError: no engine is there, or an argument is out of range.
        IncompatibleEngineError: another version of shadowc wrote it, or the op library is of another version.
        VerificationError: a file is missing or has changed.
        SetupError: ONNX Runtime or the op library is missing or too old.
    """
    path = Path(folder)
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}, expected at least 1", hint="leave threads out: one per core")
    manifest = read_manifest(path)
    problems = tuple(file_problems(path, manifest, hashes=verify))
    VerifyReport(path, len(manifest.files), 0, problems).require()
    check_ort()
    session = Session(
        path=path.resolve() / (REFERENCE_FILE if reference else MODEL_FILE),
        threads=threads or usable_cores(),
        library=None if reference else OpLibrary.installed().path,
    )
    engine = Engine(path, manifest, session, in_place=not reference)
    if skip_zeros is not None and not reference:
        engine = engine.with_skip_zeros(skip_zeros)
    engine.prepare()
    return engine


def verify(folder: str | PathLike[str], *, deep: bool = True) -> VerifyReport:
    """Check a folder and this installation, and report everything that is wrong at once.

    Args:
        folder: the engine folder.
        deep: hash every file again (False: compare sizes only).

    Raises:
        InputError: no engine is there.
        IncompatibleEngineError, VerificationError: engine.json itself cannot be used.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    problems = file_problems(path, manifest, hashes=deep, remember=False)
    for check in (check_ort, OpLibrary.installed):
        try:
            check()
        except ShadowcError as error:
            problems.append(error.message)
    size = sum(entry.size for entry in manifest.files.values())
    return VerifyReport(path, len(manifest.files), size, tuple(problems))
