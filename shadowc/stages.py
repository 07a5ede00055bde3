# SPDX-License-Identifier: Apache-2.0
"""The stages before emit, each cached by the hash of what decides its result: checkpoint, predictor, graph."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowc._version import __version__
from shadowc.checkpoint.tokenizer import tokenizer_files
from shadowc.emit.target import FIXED
from shadowc.measure.resources import StageMeter
from shadowc.sparsity.calibration import SELF
from shadowc.sparsity.kept import kept_by
from shadowc.spec.errors import InputError
from shadowc.spec.manifest import MODEL_FILE
from shadowc.spec.progress import Progress
from shadowc.stage_cache import StageCache

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shadowc.checkpoint.resolve import Checkpoint
    from shadowc.sparsity.predictor import Predictor
    from shadowc.spec.options import CompileOptions
    from shadowc.spec.program import PassReport, Program, SparsityPlan

TOOLS = (
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnx-graphsurgeon",
    "numpy",
    "safetensors",
    "tokenizers",
)


class Stages:
    """The stages of one compile.

    Args:
        options: what is compiled, and how.
        progress: told about stages.
    """

    def __init__(self, options: CompileOptions, progress: Progress) -> None:
        self.options = options
        self.progress = progress
        self.cache = StageCache()
        self.meter = StageMeter()
        self._found: Checkpoint | None = None
        self.reports: dict[str, list[PassReport]] = {}
        """Graph -> what its passes did, once `programs` has run."""

    def measured(self, name: str) -> MeteredStage:
        """Brackets a stage: reported, and its cost kept."""
        return MeteredStage(self.meter, self.progress, name)

    def checkpoint(self) -> Checkpoint:
        """Resolved, complete, and free of NaN and infinities."""
        from shadowc.checkpoint.finite import check_finite
        from shadowc.checkpoint.resolve import resolve

        options = self.options
        checkpoint = resolve(
            options.model,
            load_format=options.load_format,
            offline=options.offline,
            seed=options.seed,
            advance=lambda done, total: self.progress.advance(done >> 20, total >> 20, "MiB"),
        )
        self._found = checkpoint
        self._cached(
            "finite",
            {"checkpoint": checkpoint.identity},
            lambda _: check_finite(checkpoint, self.progress.advance),
        )
        return checkpoint

    def _cached(self, stage: str, key: Mapping[str, object], make: Callable[[Path], None]) -> tuple[Path, bool]:
        """A stage's result from the cache, or made now; tells if another process is just making it."""

        def unchanged(folder: Path) -> None:
            make(folder)
            if self._found is not None:
                self._found.require_unchanged()

        return self.cache.get_or_make(
            stage,
            key,
            unchanged,
            on_wait=lambda: self.progress.note(f"waits for another process that makes stage {stage}"),
        )

    def predictor(self, checkpoint: Checkpoint) -> Predictor | None:
        """Trained, loaded, or random for dummy weights; None for a dense engine."""
        from shadowc.sparsity.predictor import Predictor

        options = self.options
        if options.predictor == "none":
            return None
        if options.predictor != "train":
            return self._given(Path(options.predictor), checkpoint)
        if checkpoint.dummy:
            train, fill = options.train, options.collect.fill
            return Predictor.dummy(checkpoint.facts, train.neuron_block, train.width, options.seed, train.style, fill)
        return self._trained(checkpoint)

    def _given(self, folder: Path, checkpoint: Checkpoint) -> Predictor:
        """What the user trained; of another checkpoint of this shape it is taken, and that is said."""
        from shadowc.sparsity.predictor import Predictor
        from shadowc.sparsity.trained_on import trained_on_another

        found = Predictor.load(folder, checkpoint.facts)
        another = trained_on_another(found.meta, folder, checkpoint.described, self.options.model)
        if another is not None:
            self.progress.note(f"{another}; what its masks cost here, `shadowc eval` tells of the engine")
        return found

    def _trained(self, checkpoint: Checkpoint) -> Predictor:
        """Collect and train, each from the cache if it was done before."""
        from shadowc.sparsity.predictor import Predictor

        options = self.options
        traced = {
            "checkpoint": checkpoint.identity,
            "options": options.collect.model_dump(mode="json", exclude={"data"}),
            "data": data_hash(options),
            "tools": tool_versions(),
            "code": source_hash("checkpoint", "sparsity"),
        }
        with self.measured("collect") as mark:
            trace_folder, mark.reused = self._cached("collect", traced, lambda to: self._collect(checkpoint, to))
        learned = {**traced, "train": options.train.model_dump(mode="json")}
        with self.measured("train") as mark:
            folder, mark.reused = self._cached("train", learned, lambda to: self._train(checkpoint, trace_folder, to))
        found = Predictor.load(folder / "predictor", checkpoint.facts)
        # The cache may hold what was learned from the same weights, and the same text, under other names.
        model = {**found.meta["model"], "name": checkpoint.facts.name}
        source = options.collect.data if options.collect.data == SELF else Path(options.collect.data).name
        return replace(found, meta={**found.meta, "model": model, "source": source})

    def _collect(self, checkpoint: Checkpoint, to: Path) -> None:
        from shadowc.sparsity.collect import collect

        before = data_hash(self.options)
        collect(checkpoint, self.options.collect, to / "trace", self.progress)
        if data_hash(self.options) != before:  # or its trace would be kept under the hash of the other text
            raise InputError(
                f"{self.options.collect.data}: changed while it was read", hint="run the same command again"
            )

    def _train(self, checkpoint: Checkpoint, trace_folder: Path, to: Path) -> None:
        from shadowc.sparsity.importance import ImportanceTrace
        from shadowc.sparsity.train import train

        trace = ImportanceTrace.load(trace_folder / "trace")
        train(trace, checkpoint.facts, self.options.train, to / "predictor", self.progress)

    def programs(self, checkpoint: Checkpoint, predictor: Predictor | None) -> dict[str, Program]:
        """The graphs of the target after all passes, by name."""
        from shadowc.checkpoint.digest import facts_key
        from shadowc.emit.target import target
        from shadowc.trace.export import trace

        options = self.options
        key = {
            "model": facts_key(checkpoint.facts),
            "tools": tool_versions(),
            "code": source_hash("trace", "checkpoint"),
        }
        with self.measured("trace") as mark:
            folder, mark.reused = self._cached("trace", key, lambda to: trace(checkpoint.facts, to / MODEL_FILE))
        with self.measured("passes"):
            return {
                name: self._program(name, folder / MODEL_FILE, checkpoint, predictor)
                for name in target(options.target).graphs(options)
            }

    def _program(self, name: str, traced: Path, checkpoint: Checkpoint, predictor: Predictor | None) -> Program:
        from shadowc.pipeline import run_passes, schedule
        from shadowc.trace.export import load_program

        options = self.options
        program = load_program(traced, checkpoint.facts)
        program.plan = None if predictor is None else self._plan(predictor)
        passes = schedule(
            target=options.target,
            weights=options.weights,
            skip_zeros=options.skip_zeros,
            sparse=predictor is not None,
            prefill=name == "prefill",
            fixed=("all" if options.refresh else "active") if name == FIXED else None,
        )
        dump = options.dump_passes
        self.reports[name] = run_passes(
            program, passes, dump=dump / name if dump is not None and name != "model" else dump
        )
        return program

    def _plan(self, predictor: Predictor) -> SparsityPlan:
        options, kept = self.options, kept_by(self.options)
        return predictor.plan(
            options.scope,
            kept.predicted(),
            select=options.select,
            min_active_heads=kept.heads,
            min_active_neurons=kept.blocks(predictor.block),
        )


class MeteredStage:
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


def tool_versions() -> dict[str, str]:
    """Versions of everything that can change the bytes of an engine."""
    return {"shadowc": __version__, **{name: metadata.version(name) for name in TOOLS}}


def data_hash(options: CompileOptions) -> str:
    """Hash of the calibration text, wherever it lies, and how it is read; "self" for text that the model writes."""
    if options.collect.data == SELF:
        return SELF
    path = Path(options.collect.data)
    return f"{path.suffix} {content_hash(path)}"


def tokenizer_hash(checkpoint: Checkpoint) -> str:
    """Hash of the tokenizer's files; empty without them."""
    if checkpoint.tokenizer is None:
        return ""
    return json.dumps({path.name: content_hash(path) for path in tokenizer_files(checkpoint.tokenizer)}, sort_keys=True)


def source_hash(*parts: str) -> str:
    """Hash of the Python sources of these parts of the package: a changed stage must not find its old results."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for part in sorted(parts):
        folder = package / part if (package / part).is_dir() else package.parent / part
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def content_hash(path: Path) -> str:
    """Hash of a file, or of every file of a folder; of the bare name if there is neither (reported later).

    Raises:
        InputError: it may not be read.
    """
    from shadowc.emit.folder import file_entries, hash_file

    try:
        if path.is_file():
            return hash_file(path).sha256
        entries = file_entries(path) if path.is_dir() else {}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}", hint="check its permissions") from error
    return json.dumps({name: entry.sha256 for name, entry in entries.items()} or str(path), sort_keys=True)
