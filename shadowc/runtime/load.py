# SPDX-License-Identifier: Apache-2.0
"""From a folder to an engine: every check comes before the first run, and each failure names the next command."""

from __future__ import annotations

import errno
import warnings
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from shadowc.output import megabytes, require_utf8
from shadowc.runtime import variants
from shadowc.runtime.causal import SEQUENCE_FLAGS, CausalEngine
from shadowc.runtime.cores import MOST_THREADS, usable_cores
from shadowc.runtime.engine import Engine, rewritten
from shadowc.runtime.file_system import file_system
from shadowc.runtime.graph_file import read_graph
from shadowc.runtime.library import OpLibrary
from shadowc.runtime.session import Session, check_ort
from shadowc.runtime.verification import RECOMPILE, file_problems, read_manifest
from shadowc.runtime.weights_memory import KINDS, Kind, WeightsMemory, renew_pages
from shadowc.spec.errors import (
    InputError,
    SetupError,
    ShadowcError,
    SlowPlaceWarning,
    UnsupportedError,
    VerificationError,
)
from shadowc.spec.manifest import FIXED_FILE, MANIFEST_FILE, MODEL_FILE, REFERENCE_FILE, WEIGHTS_FILE, EngineManifest
from shadowc.spec.options import Mask
from shadowc.spec.whole import require_whole

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
    mask: Mask | None = None,
    refresh: int | None = None,
    memory: Kind | None = None,
    exact_prompts: bool = False,
) -> CausalEngine:
    """Load an engine folder of any target.

    Args:
        folder: what `shadowc compile` wrote.
        threads: threads of the operators; None: one per usable core. For target cpu, as all but `verify`.
        verify: compare all files with the hashes in engine.json first (False: only their sizes).
        reference: run reference.onnx in stock ONNX Runtime, without the op library: slow, the judge.
        skip_zeros: override the compiled setting; None keeps it.
        mask: "token" runs an engine with a mask per sequence as one with a mask per token; None: as it was compiled.
        refresh: override after how many tokens a mask of a sequence is made anew, 0 for never; None keeps it.
        memory: where the weights lie. "shared" (None): the file is mapped, processes share it. "renewed": the same, but
            if the page cache holds the file in small pages, as it does what was copied, it reads it anew into large
            ones, which are faster (`shadowc bench` tells). "private": a copy in large pages.
        exact_prompts: activations are not rounded, whatever the engine was compiled for: prompts meet int8 weights with
            24 bits or floats, others row by row, and tokens meet int4 weights with 20 to 24 bits. False: as it was
            compiled, by default int8 and int4 with 8 bits, or 16 in a row with outliers (12 with AVX2), int4 with one
            scale a row, bf16 with activations of bf16 where the CPU multiplies those. Masks are the same; where every
            layer makes masks of its own (styles dejavu, shadow+) the first layers take 16 bits in int8 (12 with AVX2)
            and leave int4 and bf16 as they are, and hardly a unit differs (docs/decisions.md). Where they do not,
            tokens meet int4 weights with 8 bits too, in steps of every 64 values.

    Raises:
        InputError: no engine is there, or an argument is out of range.
        UnsupportedError: an argument that the engine's target does not have, or a mask that it was not compiled for.
        IncompatibleEngineError: another version of shadowc wrote it, or it was built for another library or GPU.
        VerificationError: a file is missing or has changed.
        SetupError: what runs it is missing here or too old: ONNX Runtime, the op library, TensorRT, a GPU.
    """
    path = _folder(folder)
    manifest = read_manifest(path)
    if manifest.tensorrt is None:
        return load_cpu(
            path, threads=threads, verify=verify, reference=reference, skip_zeros=skip_zeros, mask=mask,
            refresh=refresh, memory=memory, exact_prompts=exact_prompts,
        )  # fmt: skip
    arguments = (
        ("threads", threads is not None),
        ("reference", reference),
        ("skip_zeros", skip_zeros is not None),
        ("mask", mask is not None),
        ("refresh", refresh is not None),
        ("memory", memory is not None),
        ("exact_prompts", exact_prompts),
    )
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
    mask: Mask | None = None,
    refresh: int | None = None,
    memory: Kind | WeightsMemory | None = None,
    exact_prompts: bool = False,
) -> Engine:
    """As `load`, for what works on the graph of a cpu engine only; engines of one folder can share a `memory`.

    Raises:
        UnsupportedError: the engine is of another target.
    """
    path = _folder(folder)
    require_utf8(path.resolve(), "rename the folder, or move it")
    require_whole(**{name: value for name, value in (("threads", threads), ("refresh", refresh)) if value is not None})
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise InputError(f"threads is {threads}, expected 1 to {MOST_THREADS}", hint="leave threads out: one per core")
    if mask not in (None, "token", "sequence"):
        raise InputError(f"mask is {mask!r}, expected token or sequence", hint="leave mask out: as it was compiled")
    if not isinstance(memory, WeightsMemory) and memory not in (None, *KINDS):
        expected = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
        raise InputError(f"memory is {memory!r}, expected {expected}", hint="leave memory out: shared")
    if reference and skip_zeros is not None:
        raise InputError(
            "skip_zeros has no effect with reference: stock ONNX Runtime computes every neuron",
            hint="leave one of them out",
        )
    manifest = read_manifest(path)
    if manifest.tensorrt is not None:
        raise UnsupportedError(
            f"this works on engines of target cpu; {path} is for {manifest.target}",
            hint=f"shadowc compile --model {manifest.model.name} --target cpu",
        )
    per_sequence = _per_sequence(path, manifest, mask, refresh)
    if memory == "renewed":
        _renew(path / WEIGHTS_FILE)
    _require_files(path, manifest, verify)
    check_ort()
    session = Session(
        path=path.resolve() / (REFERENCE_FILE if reference else MODEL_FILE),
        threads=threads or usable_cores(),
        library=None if reference else OpLibrary.installed().path,
        weights=memory if isinstance(memory, WeightsMemory) else _weights(path / WEIGHTS_FILE, memory or "shared"),
    )
    if exact_prompts and not reference:
        session = rewritten(session, variants.with_exact_prompts)
    engine = Engine(path, manifest, session, in_place=not reference)
    if per_sequence:
        engine = _with_fixed_masks(engine, session, refresh, exact_prompts)
    if skip_zeros is not None:
        engine = engine.with_skip_zeros(skip_zeros)
    engine.prepare()
    return engine


def _renew(path: Path) -> None:
    try:
        renew_pages(path)
    except FileNotFoundError:  # told with all other files that are missing
        return
    except OSError as error:
        raise VerificationError(f"{path} cannot be read: {error.strerror or error}", hint=RECOMPILE) from error


def _weights(path: Path, kind: Kind) -> WeightsMemory:
    """The weights in memory; warns where their pages come over a network.

    Raises:
        SetupError: there is no memory for them.
        VerificationError: they cannot be read.
    """
    try:
        memory = WeightsMemory.open(path, kind)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            size = megabytes(path.stat().st_size)
            raise SetupError(
                f"no memory for the {size} of {path}", hint="free some, or leave memory out (shared)"
            ) from error
        raise VerificationError(f"{path} cannot be read: {error.strerror or error}", hint=RECOMPILE) from error
    place = file_system(path) if kind != "private" else None
    if place is not None and place.is_remote:
        warnings.warn(
            f"{path} lies on a network file system ({place}): tokens wait for it whenever memory is short. "
            'memory="private" (--memory private) keeps a copy; or copy the folder to a local disk',
            SlowPlaceWarning,
            stacklevel=4,
        )
    return memory


def _per_sequence(path: Path, manifest: EngineManifest, mask: Mask | None, refresh: int | None) -> bool:
    """Whether masks are to hold for a sequence."""
    compiled = "token" if manifest.sparsity is None else manifest.sparsity.mask
    if compiled == "token" and (mask == "sequence" or refresh):
        how = "with --mask token" if manifest.sparsity else "without a predictor"
        raise UnsupportedError(
            f"{path} was compiled {how}; a mask that holds for a sequence needs another graph",
            hint=f"shadowc compile --model {manifest.model.name} {SEQUENCE_FLAGS} --out FOLDER",
        )
    if mask == "token" and refresh:
        raise InputError(
            f"refresh is {refresh}, but with a mask per token every token makes its own", hint="leave refresh out"
        )
    return compiled == "sequence" and mask != "token"


def _with_fixed_masks(engine: Engine, session: Session, refresh: int | None, exact_prompts: bool) -> Engine:
    from shadowc.runtime.sequence_engine import SequenceEngine
    from shadowc.spec import oracle

    sparsity, path = engine.manifest.sparsity, session.path.parent / FIXED_FILE
    compiled = 0 if sparsity is None else sparsity.refresh
    reference = session.library is None
    graph = oracle.attach(read_graph(path)) if reference else None
    fixed = replace(session, path=path, model=graph)
    if exact_prompts and not reference:
        fixed = rewritten(fixed, variants.with_exact_prompts)
    made = SequenceEngine(engine.folder, engine.manifest, session, fixed, refresh=compiled, in_place=not reference)
    return made if refresh in (None, compiled) else made.with_refresh(refresh)


def verify(folder: str | PathLike[str], *, deep: bool = True) -> VerifyReport:
    """Check a folder and this installation, and report everything that is wrong at once.

    Args:
        folder: the engine folder.
        deep: hash every file again (False: compare sizes only).

    Raises:
        InputError: no engine is there.
        IncompatibleEngineError, VerificationError: engine.json itself cannot be used.
    """
    path = _folder(folder)
    manifest = read_manifest(path)
    problems = file_problems(path, manifest, hashes=deep, remember=False)
    problems += _cpu_problems() if manifest.tensorrt is None else _tensorrt_problems(path, manifest)
    size = sum(entry.size for entry in manifest.files.values())
    return VerifyReport(path, len(manifest.files), size, tuple(problems))


def _folder(given: str | PathLike[str]) -> Path:
    """An engine folder as a path; anything else, such as the None of a variable that was not set, is refused."""
    try:
        return Path(given)
    except TypeError:
        raise InputError(
            f"an engine folder was expected, found {given!r}", hint="the folder that shadowc compile wrote"
        ) from None


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
