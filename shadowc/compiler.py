# SPDX-License-Identifier: Apache-2.0
"""The stages in order: a name or path goes in, a checked engine folder comes out.

Every stage's result is cached by the hash of what decided it. The engine appears under its final
name only after parity with torch has passed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shadowc.compile_checks import check_options
from shadowc.measure.resources import StageCost
from shadowc.output import clear_leftovers
from shadowc.sparsity.kept import kept_by
from shadowc.spec.errors import ShadowcError
from shadowc.spec.manifest import MANIFEST_FILE, WEIGHTS_FILE, EngineManifest, PassPart, SparsityPart
from shadowc.spec.progress import NullProgress, Progress
from shadowc.stages import Stages, content_hash, data_hash, source_hash, tokenizer_hash, tool_versions

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from shadowc.checkpoint.resolve import Checkpoint
    from shadowc.emit.tensorrt.builder import BuildResult
    from shadowc.runtime.stats import RunStats
    from shadowc.sparsity.predictor import Predictor
    from shadowc.spec.options import CompileOptions
    from shadowc.spec.program import Program, TensorSource


SAMPLE_PROMPT, SAMPLE_TOKENS = 8, 9


@dataclass(frozen=True, slots=True)
class CompileSummary:
    """What a compile did."""

    folder: Path
    manifest: EngineManifest
    stages: tuple[StageCost, ...]
    up_to_date: bool
    """True: the folder already held exactly this engine, and nothing was done."""
    sample: RunStats | None = None
    """What a short generation at the engine's default density computed and read; None if it was up to date, or if
    the engine needs a GPU."""
    build: Mapping[str, BuildResult] = field(default_factory=dict)
    """Plan -> what its builder took; empty for targets without plans."""
    left_out: tuple[str, ...] = ()
    """Tensors of the checkpoint that are not part of the language model, and so not of the engine."""


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
        self.stages = Stages(options, progress)
        self.out = options.out or Path(f"{_base_name(options.model)}.engine")

    def run(self) -> CompileSummary:
        from shadowc.emit.target import target

        check_options(self.options, self.out)
        with self.stages.measured("checkpoint"):
            checkpoint = self.stages.checkpoint()
            kept_by(self.options).check(checkpoint.facts)
            target(self.options.target).check_model(self.options, checkpoint.facts)
        key = self._build_key(checkpoint)
        finished = self._finished(key)
        if finished is not None:
            return self._up_to_date(finished, checkpoint)
        predictor = self.stages.predictor(checkpoint)
        programs = self.stages.programs(checkpoint, predictor)
        source = checkpoint.weights if predictor is None else JoinedSource(checkpoint.weights, predictor.as_source())
        with self.stages.cache.alone(str(self.out.resolve()), self._tell_waiting):
            finished = self._finished(key)  # another process may have written it since the look above
            if finished is not None:
                return self._up_to_date(finished, checkpoint)
            return self._write(checkpoint, programs, source, predictor, key)

    def _write(
        self,
        checkpoint: Checkpoint,
        programs: Mapping[str, Program],
        source: TensorSource,
        predictor: Predictor | None,
        key: str,
    ) -> CompileSummary:
        """Write the engine beside its place, check it, and put it there."""
        from shadowc.emit.folder import staged, write_manifest

        with staged(self.out, _least_bytes(programs)) as folder:
            manifest, build = self._emit(checkpoint, programs, source, predictor, key, folder)
            with self.stages.measured("parity"):
                parity = self._parity(checkpoint, programs, predictor, manifest, folder)
            manifest = manifest.model_copy(update={"parity": parity})
            checkpoint.require_unchanged()
            write_manifest(folder, manifest)
            sample = None
            if manifest.tensorrt is None:  # a plan needs a GPU
                with self.stages.measured("sample"):
                    sample = self._sample(manifest, folder)
        costs = tuple(self.stages.meter.costs)
        return CompileSummary(
            self.out, manifest, costs, up_to_date=False, sample=sample, build=build, left_out=checkpoint.unused
        )

    def _up_to_date(self, manifest: EngineManifest, checkpoint: Checkpoint) -> CompileSummary:
        clear_leftovers(self.out)
        costs = tuple(self.stages.meter.costs)
        return CompileSummary(self.out, manifest, costs, up_to_date=True, left_out=checkpoint.unused)

    def _tell_waiting(self) -> None:
        self.stages.progress.note(f"waits for another process that writes {self.out}")

    def _build_key(self, checkpoint: Checkpoint) -> str:
        """Hash of everything that decides the bytes of the engine."""
        from shadowc.emit.target import target

        options = self.options
        unused = dict.fromkeys(("model", "out", "offline", "dump_passes", "predictor"), True)
        if options.predictor != "train":
            unused |= {"collect": True, "train": True}
        elif options.load_format == "dummy":
            unused |= {"collect": True}
        where = {} if "collect" in unused else {"collect": {"data"}}  # the text's hash decides, not its place
        decided = {
            "checkpoint": checkpoint.identity,
            "name": checkpoint.facts.name,
            "tokenizer": tokenizer_hash(checkpoint),  # dummy weights have an identity without it
            "options": options.model_dump(mode="json", exclude={**unused, **where}),
            "fill": None if "train" in unused else options.collect.fill,  # random predictors have one too
            "data": None if "collect" in unused else data_hash(options),
            "predictor": content_hash(Path(options.predictor)) if self._predictor_folder() else options.predictor,
            **target(options.target).libraries(options),
            "tools": tool_versions(),
            "code": source_hash(".", "passes", "plugins"),
        }
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()

    def _predictor_folder(self) -> bool:
        return self.options.predictor not in ("train", "none")

    def _finished(self, key: str) -> EngineManifest | None:
        """The manifest of the folder that is already there, if it is this engine and undamaged."""
        from shadowc.runtime.tensorrt.layout import contradictions
        from shadowc.runtime.verification import file_problems, read_manifest

        if not (self.out / MANIFEST_FILE).is_file() or self.options.dump_passes is not None:
            return None
        try:
            manifest = read_manifest(self.out)
        except ShadowcError:
            return None
        if manifest.build_key != key or file_problems(self.out, manifest, remember=False):
            return None
        part = manifest.tensorrt  # whether this machine's GPU fits is no matter: it may be built for another one
        return None if part and contradictions(part, manifest.files[WEIGHTS_FILE].size) else manifest

    def _emit(
        self,
        checkpoint: Checkpoint,
        programs: Mapping[str, Program],
        source: TensorSource,
        predictor: Predictor | None,
        key: str,
        folder: Path,
    ) -> tuple[EngineManifest, Mapping[str, BuildResult]]:
        """All files but engine.json, whose content is returned with parity still open."""
        from shadowc.emit.folder import (
            add_companions,
            add_tokenizer,
            file_entries,
            model_part,
            write_controls,
            write_means,
            write_orders,
        )
        from shadowc.emit.target import target

        options = self.options
        with self.stages.measured("emit"):
            emitted = target(options.target).emit(
                programs, source, folder, options=options, progress=self.stages.progress
            )
            model = model_part(checkpoint.facts, checkpoint.identity)
            if emitted.tensorrt is None:
                add_companions(folder, model, checkpoint.tokenizer)
            else:
                add_tokenizer(folder, checkpoint.tokenizer)
            if predictor is not None and predictor.controls:
                write_controls(folder, predictor.controls)
            if predictor is not None:
                write_orders(folder, {f"order.{i}": order_F for i, order_F in enumerate(predictor.orders_LF, start=1)})
            if predictor is not None and predictor.means:
                write_means(folder, predictor.means)
            files = file_entries(folder, emitted.files)
        manifest = EngineManifest(
            producer=tool_versions(),
            target=options.target,  # type: ignore[arg-type]  # target() knows no others
            weights=options.weights,
            ops=emitted.ops,
            model=model,
            sparsity=None if predictor is None else self._sparsity(predictor),
            bytes_per_token=emitted.bytes_per_token,
            exact_prompts=options.exact_prompts,
            parity={},
            build_key=key,
            files=files,
            tensorrt=emitted.tensorrt,
            passes={
                name: tuple(PassPart(**asdict(report)) for report in reports)
                for name, reports in self.stages.reports.items()
            },
        )
        return manifest, emitted.build

    def _parity(
        self,
        checkpoint: Checkpoint,
        programs: Mapping[str, Program],
        predictor: Predictor | None,
        manifest: EngineManifest,
        folder: Path,
    ) -> dict[str, object]:
        """The gate: raises if the engine's numbers are not torch's; what it found."""
        from shadowc.measure.gate import Subject, check_engine, check_graphs

        subject = Subject(checkpoint, predictor, programs, self.options.seed)
        check = check_engine if manifest.tensorrt is None else check_graphs
        return check(subject, manifest, folder, self.stages.progress.advance)

    def _sample(self, manifest: EngineManifest, folder: Path) -> RunStats:
        """Generates a few tokens at the default density, to say what is really computed and read."""
        from shadowc.runtime.load import load_cpu
        from shadowc.runtime.weights_memory import WeightsMemory

        ids_BS = np.random.default_rng(self.options.seed).integers(4, manifest.model.vocab, (1, SAMPLE_PROMPT))
        weights = WeightsMemory.open(folder / WEIGHTS_FILE, ahead=False)
        with weights.passing():
            engine = load_cpu(folder, verify=False, memory=weights)
            engine.generate(ids_BS, max_new_tokens=SAMPLE_TOKENS, min_new_tokens=SAMPLE_TOKENS)
        return engine.last_stats

    def _sparsity(self, predictor: Predictor) -> SparsityPart:
        options = self.options
        kept = kept_by(options)
        widths = {"heads": predictor.heads.width, "neurons": predictor.neurons.width}
        return SparsityPart(
            style=predictor.style,
            mask=options.mask,
            refresh=options.refresh,
            scope=predictor.scope(options.scope, options.select),
            select=options.select,
            exempt=kept.predicted(),
            min_active_heads=kept.heads,
            min_active_neurons=kept.blocks(predictor.block),
            head_density=options.head_density,
            neuron_density=options.neuron_density,
            neuron_block=predictor.block,
            fill=predictor.fill,
            predictor={**predictor.meta, "widths": widths, "parameters": predictor.parameters},
        )


def _least_bytes(programs: Mapping[str, Program]) -> int:
    """Bytes that an engine of these graphs takes on disk at least: those of its weights."""
    from shadowc.emit.weights import nbytes

    recipes = {name: recipe for program in programs.values() for name, recipe in program.weights.items()}
    return sum(map(nbytes, recipes.values()))


def _base_name(model: str) -> str:
    """The last part of a name, or of the folder that a path such as `.` stands for."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else path.name
