# SPDX-License-Identifier: Apache-2.0
"""From a folder to an engine: every check comes before the first run, and each failure names the next command."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from shadowc.runtime.causal import CausalEngine
from shadowc.runtime.cores import usable_cores
from shadowc.runtime.engine import Engine
from shadowc.runtime.library import OpLibrary
from shadowc.runtime.session import Session, check_ort
from shadowc.runtime.verification import RECOMPILE, file_problems, read_manifest
from shadowc.spec.errors import InputError, ShadowcError, UnsupportedError, VerificationError
from shadowc.spec.manifest import MANIFEST_FILE, MODEL_FILE, REFERENCE_FILE, WEIGHTS_FILE, EngineManifest

__all__ = ["VerifyReport", "load", "load_cpu", "read_manifest", "verify"]


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
) -> CausalEngine:
    """Load an engine folder of any target.

    Args:
        folder: what `shadowc compile` wrote.
        threads: threads of the operators; None: one per usable core. For target cpu, as the next two.
        verify: compare all files with the hashes in engine.json first (False: only their sizes).
        reference: run reference.onnx in stock ONNX Runtime, without the op library: slow, the judge.
        skip_zeros: override the compiled setting; None keeps it.

    Raises:
        InputError: no engine is there, or an argument is out of range.
        UnsupportedError: an argument that the engine's target does not have.
        IncompatibleEngineError: another version of shadowc wrote it, or it was built for another library or GPU.
        VerificationError: a file is missing or has changed.
        SetupError: what runs it is missing here or too old: ONNX Runtime, the op library, TensorRT, a GPU.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    if manifest.tensorrt is None:
        return load_cpu(path, threads=threads, verify=verify, reference=reference, skip_zeros=skip_zeros)
    arguments = (("threads", threads is not None), ("reference", reference), ("skip_zeros", skip_zeros is not None))
    given = [name for name, there in arguments if there]
    if given:
        raise UnsupportedError(
            f"{' and '.join(given)}: for engines of target cpu; {path} is for {manifest.target}",
            hint=f"leave {' and '.join(given)} out",
        )
    _require_files(path, manifest, verify)
    from shadowc.runtime.tensorrt.load import load_tensorrt

    return load_tensorrt(path, manifest)


def load_cpu(
    folder: str | PathLike[str],
    *,
    threads: int | None = None,
    verify: bool = True,
    reference: bool = False,
    skip_zeros: bool | None = None,
) -> Engine:
    """As `load`, for what works on the graph of a cpu engine only.

    Raises:
        UnsupportedError: the engine is of another target.
    """
    path = Path(folder)
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}, expected at least 1", hint="leave threads out: one per core")
    manifest = read_manifest(path)
    if manifest.tensorrt is not None:
        raise UnsupportedError(
            f"this works on engines of target cpu; {path} is for {manifest.target}",
            hint=f"shadowc compile --model {manifest.model.name} --target cpu",
        )
    _require_files(path, manifest, verify)
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
    problems += _cpu_problems() if manifest.tensorrt is None else _tensorrt_problems(path, manifest)
    size = sum(entry.size for entry in manifest.files.values())
    return VerifyReport(path, len(manifest.files), size, tuple(problems))


def _require_files(path: Path, manifest: EngineManifest, verify: bool) -> None:
    problems = tuple(file_problems(path, manifest, hashes=verify))
    VerifyReport(path, len(manifest.files), 0, problems).require()


def _cpu_problems() -> list[str]:
    problems = []
    for check in (check_ort, OpLibrary.installed):
        try:
            check()
        except ShadowcError as error:
            problems.append(error.message)
    return problems


def _tensorrt_problems(path: Path, manifest: EngineManifest) -> list[str]:
    """What engine.json contradicts, and why the engine does not fit this machine's GPU, if there is one."""
    from shadowc.runtime.tensorrt import layout, machine

    part, weights = manifest.tensorrt, manifest.files.get(WEIGHTS_FILE)
    if part is None or weights is None:
        return []
    problems = [f"{MANIFEST_FILE}: {text}" for text in layout.contradictions(part, weights.size)]
    seen = machine.here(part.family)
    if isinstance(seen.gpu, ShadowcError):  # engines are built on machines that cannot run them
        return problems
    return problems + [str(problem) for problem in machine.problems(manifest, seen, path)]
