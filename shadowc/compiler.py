# SPDX-License-Identifier: Apache-2.0
"""The stages in order: a name or path goes in, a checked engine folder comes out.

Every stage's result is cached by the hash of what decided it. The engine appears under its final
name only after parity with torch has passed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowc._version import __version__
from shadowc.measure.resources import StageCost, StageMeter
from shadowc.spec.errors import InputError, ShadowcError
from shadowc.spec.manifest import MANIFEST_FILE, MODEL_FILE, EngineManifest, SparsityPart
from shadowc.spec.progress import NullProgress, Progress
from shadowc.stage_cache import StageCache

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from shadowc.checkpoint.resolve import Checkpoint
    from shadowc.measure.parity import ParityReport
    from shadowc.sparsity.predictor import Predictor
    from shadowc.spec.options import CompileOptions
    from shadowc.spec.program import Program, TensorSource

TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnx-graphsurgeon", "numpy")


@dataclass(frozen=True, slots=True)
class CompileSummary:
    """What a compile did."""

    folder: Path
    manifest: EngineManifest
    stages: tuple[StageCost, ...]
    up_to_date: bool
    """True: the folder already held exactly this engine, and nothing was done."""


def compile(options: CompileOptions, progress: Progress | None = None) -> Path:
    """Compiles a checkpoint into an engine folder and returns the folder.

    Args:
        options: everything that decides the engine; `options.out` None means `./<model>.engine`.
        progress: told about stages; nobody is told when None.

    Raises:
        InputError: the model, an option, the calibration text or the output folder cannot be used.
        UnsupportedError: the model or target is of a kind that shadowc does not handle.
        VerificationError: the engine's numbers differ from torch's; no engine is left.
        SetupError: this machine lacks something (network, op library, writable cache).
    """
    return compile_engine(options, progress).folder


def compile_engine(options: CompileOptions, progress: Progress | None = None) -> CompileSummary:
    """As `compile`, and returns what was done, stage by stage."""
    return _Compile(options, progress or NullProgress()).run()


def tool_versions() -> dict[str, str]:
    """Versions of everything that can change the bytes of an engine."""
    return {"shadowc": __version__, **{name: metadata.version(name) for name in TOOLS}}


@dataclass(frozen=True, slots=True)
class JoinedSource:
    """The checkpoint's tensors and the predictor's, whose names begin with `predictor.`, as one source."""

    checkpoint: TensorSource
    predictor: TensorSource

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted((*self.checkpoint.names(), *self.predictor.names())))

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """One tensor of whichever source has it."""
        return (self.predictor if name.startswith("predictor.") else self.checkpoint).tensor(name)


class _Compile:
    """One compile: its options, its cache, its costs."""

    def __init__(self, options: CompileOptions, progress: Progress) -> None:
        self.options = options
        self.progress = progress
        self.cache = StageCache()
        self.meter = StageMeter()
        self.out = options.out or Path(f"{Path(options.model).name}.engine")

    def run(self) -> CompileSummary:
        from shadowc.emit.folder import staged, write_manifest

        self._check_options()
        with self._stage("checkpoint"):
            checkpoint = self._checkpoint()
        key = self._build_key(checkpoint)
        finished = self._finished(key)
        if finished is not None:
            return CompileSummary(self.out, finished, tuple(self.meter.costs), up_to_date=True)
        predictor = self._predictor(checkpoint)
        program = self._graph(checkpoint, predictor)
        source = checkpoint.weights if predictor is None else JoinedSource(checkpoint.weights, predictor.as_source())
        with staged(self.out) as folder:
            manifest = self._emit(checkpoint, program, source, predictor, key, folder)
            parity = self._parity(checkpoint, program, predictor, manifest, folder)
            manifest = manifest.model_copy(update={"parity": parity.as_dict()})
            write_manifest(folder, manifest)
        return CompileSummary(self.out, manifest, tuple(self.meter.costs), up_to_date=False)

    def _stage(self, name: str) -> _MeteredStage:
        return _MeteredStage(self.meter, self.progress, name)

    def _check_options(self) -> None:
        """Everything that can be refused before any work, all at once."""
        from shadowc.emit.folder import check_replaceable
        from shadowc.emit.target import target
        from shadowc.sparsity.criteria import find_criterion

        problems: list[ShadowcError] = []
        for check in (
            lambda: self.options.density,
            lambda: target(self.options.target),
            lambda: find_criterion(self.options.collect.criterion),
            lambda: check_replaceable(self.out),
            self._check_dump,
        ):
            try:
                check()
            except ShadowcError as error:
                problems.append(error)
        if len(problems) == 1:
            raise problems[0]
        if problems:
            texts = [problem.message for problem in problems]
            raise InputError("the options cannot be used: " + "; ".join(texts), hint=problems[0].hint, problems=texts)

    def _check_dump(self) -> None:
        dump = self.options.dump_passes
        if dump is not None and dump.exists() and not dump.is_dir():
            raise InputError(f"--dump-passes {dump} is a file, expected a folder", hint="name another folder")

    def _checkpoint(self) -> Checkpoint:
        from shadowc.checkpoint.finite import check_finite
        from shadowc.checkpoint.resolve import resolve

        options = self.options
        checkpoint = resolve(options.model, load_format=options.load_format, offline=options.offline, seed=options.seed)
        self.cache.get_or_make(
            "finite",
            {"checkpoint": checkpoint.identity},
            lambda _: check_finite(checkpoint, _Advance(self.progress, "tensors")),
        )
        return checkpoint

    def _build_key(self, checkpoint: Checkpoint) -> str:
        """Hash of everything that decides the bytes of the engine."""
        from shadowc.emit.folder import hash_file
        from shadowc.runtime.library import library_path

        options = self.options.model_dump(mode="json", exclude={"model", "out", "offline", "dump_passes"})
        decided = {
            "checkpoint": checkpoint.identity,
            "name": checkpoint.facts.name,
            "options": options,
            "inputs": {name: _content_hash(path) for name, path in self._named_inputs().items()},
            "library": hash_file(library_path()).sha256,
            "tools": tool_versions(),
        }
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()

    def _named_inputs(self) -> dict[str, Path]:
        """Files and folders whose content counts, by option."""
        named = {"data": self.options.collect.data, "predictor": self.options.predictor}
        return {name: Path(value) for name, value in named.items() if value not in ("self", "train", "none")}

    def _finished(self, key: str) -> EngineManifest | None:
        """The manifest of the folder that is already there, if it is this engine and undamaged."""
        from shadowc.runtime.load import verify

        if not (self.out / MANIFEST_FILE).is_file() or self.options.dump_passes is not None:
            return None
        try:
            manifest = EngineManifest.model_validate_json((self.out / MANIFEST_FILE).read_text("utf-8"))
        except ValueError:
            return None
        return manifest if manifest.build_key == key and not verify(self.out).problems else None

    def _predictor(self, checkpoint: Checkpoint) -> Predictor | None:
        from shadowc.sparsity.predictor import Predictor

        options = self.options
        if options.predictor == "none":
            return None
        if options.predictor != "train":
            return Predictor.load(Path(options.predictor), checkpoint.facts)
        if checkpoint.dummy:
            train = options.train
            return Predictor.dummy(checkpoint.facts, train.neuron_block, train.width, options.seed)
        return self._trained(checkpoint)

    def _trained(self, checkpoint: Checkpoint) -> Predictor:
        """Collect and train, each from the cache if it was done before."""
        from shadowc.sparsity.predictor import Predictor

        options = self.options
        traced = {
            "checkpoint": checkpoint.identity,
            "options": options.collect.model_dump(mode="json"),
            "data": _content_hash(Path(options.collect.data)) if options.collect.data != "self" else "self",
            "tools": tool_versions(),
        }
        with self._stage("collect") as mark:
            trace_folder, mark.reused = self.cache.get_or_make(
                "collect", traced, lambda to: self._collect(checkpoint, to)
            )
        learned = {**traced, "train": options.train.model_dump(mode="json")}
        with self._stage("train") as mark:
            folder, mark.reused = self.cache.get_or_make(
                "train", learned, lambda to: self._train(checkpoint, trace_folder, to)
            )
        return Predictor.load(folder / "predictor", checkpoint.facts)

    def _collect(self, checkpoint: Checkpoint, to: Path) -> None:
        from shadowc.sparsity.collect import collect

        collect(checkpoint, self.options.collect, to / "trace", self.progress)

    def _train(self, checkpoint: Checkpoint, trace_folder: Path, to: Path) -> None:
        from shadowc.sparsity.importance import ImportanceTrace
        from shadowc.sparsity.train import train

        trace = ImportanceTrace.load(trace_folder / "trace")
        train(trace, checkpoint.facts, self.options.train, to / "predictor", self.progress)

    def _graph(self, checkpoint: Checkpoint, predictor: Predictor | None) -> Program:
        """The traced graph after all passes."""
        from shadowc.checkpoint.digest import facts_key
        from shadowc.pipeline import run_passes, schedule
        from shadowc.trace.export import load_program, trace

        options = self.options
        key = {"model": facts_key(checkpoint.facts), "tools": tool_versions()}
        with self._stage("trace") as mark:
            folder, mark.reused = self.cache.get_or_make(
                "trace", key, lambda to: trace(checkpoint.facts, to / MODEL_FILE)
            )
        with self._stage("passes"):
            program = load_program(folder / MODEL_FILE, checkpoint.facts)
            program.plan = None if predictor is None else predictor.plan(options.scope)
            passes = schedule(
                target=options.target,
                weights=options.weights,
                skip_zeros=options.skip_zeros,
                sparse=predictor is not None,
            )
            run_passes(program, passes, dump=options.dump_passes)
        return program

    def _emit(
        self,
        checkpoint: Checkpoint,
        program: Program,
        source: TensorSource,
        predictor: Predictor | None,
        key: str,
        folder: Path,
    ) -> EngineManifest:
        """All files but engine.json, whose content is returned with parity still open."""
        from shadowc.emit.folder import add_companions, file_entries, model_part, write_controls
        from shadowc.emit.target import target

        options = self.options
        with self._stage("emit"):
            emitted = target(options.target).emit(
                program, source, folder, density=options.density, progress=self.progress
            )
            model = model_part(checkpoint.facts, checkpoint.identity)
            add_companions(folder, model, checkpoint.tokenizer)
            if predictor is not None and predictor.controls:
                write_controls(folder, predictor.controls)
            files = file_entries(folder, emitted.files)
        return EngineManifest(
            producer=tool_versions(),
            target="cpu",
            weights=options.weights,
            ops=emitted.ops,
            model=model,
            sparsity=None if predictor is None else self._sparsity(predictor),
            bytes_per_token=emitted.bytes_per_token,
            parity={},
            build_key=key,
            files=files,
        )

    def _parity(
        self,
        checkpoint: Checkpoint,
        program: Program,
        predictor: Predictor | None,
        manifest: EngineManifest,
        folder: Path,
    ) -> ParityReport:
        """The gate: raises if the engine's numbers are not torch's."""
        from shadowc.measure.parity import check_parity
        from shadowc.runtime.engine import Engine
        from shadowc.runtime.library import OpLibrary
        from shadowc.runtime.session import Session, usable_cores

        with self._stage("parity"):
            session = Session(folder / MODEL_FILE, usable_cores(), OpLibrary.installed().path)
            report = check_parity(
                Engine(folder, manifest, session).prober(),
                checkpoint.facts,
                checkpoint.weights,
                weights=self.options.weights,
                head_block=next((r.block for r in program.weights.values() if r.sources == ("lm_head.weight",)), 0),
                block=1 if predictor is None else predictor.block,
                orders={} if predictor is None else dict(enumerate(predictor.orders_LF, start=1)),
                sparse=predictor is not None,
                seed=self.options.seed,
                advance=_Advance(self.progress, "layers"),
            )
            report.require()
        return report

    def _sparsity(self, predictor: Predictor) -> SparsityPart:
        options = self.options
        widths = {"heads": predictor.heads.width, "neurons": predictor.neurons.width}
        return SparsityPart(
            mask=options.mask,
            scope=options.scope,
            head_density=options.head_density,
            neuron_density=options.neuron_density,
            neuron_block=predictor.block,
            predictor={**predictor.meta, "widths": widths, "parameters": predictor.parameters},
        )


class _MeteredStage:
    """A stage that is both reported and measured."""

    def __init__(self, meter: StageMeter, progress: Progress, name: str) -> None:
        self._measured = meter.stage(name)
        self._reported = progress.stage(name)

    def __enter__(self) -> Any:
        self._reported.__enter__()
        return self._measured.__enter__()

    def __exit__(self, *problem: Any) -> None:
        self._measured.__exit__(*problem)
        self._reported.__exit__(*problem)


@dataclass(frozen=True, slots=True)
class _Advance:
    """Progress of the innermost stage as a plain function."""

    progress: Progress
    unit: str

    def __call__(self, done: int, total: int) -> None:
        self.progress.advance(done, total, self.unit)


def _content_hash(path: Path) -> str:
    """Hash of a file, or of every file of a folder; of the bare name if there is neither (reported later)."""
    from shadowc.emit.folder import file_entries, hash_file

    if path.is_file():
        return hash_file(path).sha256
    entries = file_entries(path) if path.is_dir() else {}
    return json.dumps({name: entry.sha256 for name, entry in entries.items()} or str(path), sort_keys=True)
