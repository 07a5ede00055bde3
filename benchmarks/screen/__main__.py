# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.screen`, from the repository root: which criterion, which style, at which density, on a model.

    python -m benchmarks.screen --model opt-mini --data CALIBRATION --text TEST --out FOLDER
        [--grid [N]] [--parts [N]] [--dealt-out [N]]

Every criterion is recorded once, every predictor trained once, and everything is evaluated under protocol decode (each
token under the mask that its own step would use) beside rankings that know no context, the true scores, random masks
and the mask of the prompt. All is kept in FOLDER as it is found: a run that was stopped goes on where it was, and
further criteria, styles, densities, --grid, --parts and --dealt-out cost only themselves. There: `figures.csv`,
`report.json`, `report.md` and, with matplotlib, `quality.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.screen import context, drawing, plan, table
from benchmarks.screen.learned import Learned, lacking, with_rankings
from benchmarks.screen.measured import Line, Measured
from shadowc.checkpoint.finite import check_finite
from shadowc.checkpoint.models import resolve_model
from shadowc.eval.texts import TextCorpus, text_corpus
from shadowc.eval.torch_model import TorchModel
from shadowc.sparsity.calibration import read_text
from shadowc.sparsity.fingerprint import fingerprint, refuse_if_calibrated
from shadowc.sparsity.importance import Origin
from shadowc.sparsity.reference import load_torch_model
from shadowc.spec.errors import InputError, SetupError, ShadowcError
from shadowc.spec.options import STYLES
from shadowc.spec.progress import NullProgress

if TYPE_CHECKING:
    from shadowc.checkpoint.resolve import ModelCheckpoint
    from shadowc.sparsity.importance import ImportanceTrace
    from shadowc.sparsity.predictor import Predictor
    from shadowc.spec.density import Density
    from shadowc.spec.options import Style

Say = Callable[[str], None]
SCHEMA = 1
ABOUT_FILE = "screen.json"
LOCK_FILE = ".lock"
TOKENS = 20_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Screen, write the tables; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        text = screen(_plan(given), Origin(given.model, "auto", given.seed), given)
    except ShadowcError as error:
        parser.error(f"{error}: {error.hint}" if error.hint else str(error))
    sys.stdout.write(text)
    return 0


def screen(asked: plan.Plan, origin: Origin, given: argparse.Namespace) -> str:
    """Record, train, evaluate, write everything to the folder; returns the tables in Markdown.

    Raises:
        InputError: the model, a text or the folder cannot be used; before anything long where that can be told.
    """
    progress, started = NullProgress(), time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - started:7.0f} s  {text}\n")
        sys.stderr.flush()

    checkpoint = resolve_model(origin.model, offline=False, seed=origin.seed)
    _, calibration = read_text(Path(asked.data))
    check_finite(checkpoint)
    model = load_torch_model(checkpoint)
    corpus = _corpus(TorchModel(model, checkpoint), given)
    content = given.text.read_bytes()
    refuse_if_calibrated(
        fingerprint(content, [document.text for document in corpus.documents]), {"text": calibration.to_meta()}
    )
    about = _about(asked, checkpoint, corpus, calibration.sha256)
    with _alone_in(given.out, about):
        learned = Learned(given.out, asked, checkpoint, model, origin, progress, say)
        measured = Measured(given.out, model, checkpoint, corpus, asked.seed, progress)
        work = _Work(asked, learned, measured, say)
        found = work.done(about, grid=given.grid, seeds=given.seeds, parts=given.parts, dealt=given.dealt_out)
        return _write(found, given.out, say)


class _Work:
    """What is measured, in which order.

    Args:
        asked: what is compared.
        learned: gives traces and predictors.
        measured: evaluates.
        say: told about what is begun.
    """

    def __init__(self, asked: plan.Plan, learned: Learned, measured: Measured, say: Say) -> None:
        self._asked, self._learned, self._measured, self._say = asked, learned, measured, say
        self._traces: dict[str, ImportanceTrace] = {}
        self._hashes: dict[str, str] = {}
        self._known: dict[str, dict[str, Any]] = {}

    def done(self, about: Mapping[str, Any], *, grid: int, seeds: int, parts: int, dealt: int) -> table.Found:
        """Do everything; the grid, the parts and the predictors of inputs dealt out of so many of the best criteria."""
        asked = self._asked
        self._traces = self._learned.traces()
        if asked.host not in self._traces:
            raise InputError(f"criterion {asked.host} cannot score this text: {self._learned.left_out[asked.host]}")
        densities = asked.both(asked.densities)
        dense, *found = self._bare(densities)
        for criterion in self._traces:
            found += self._of_criterion(criterion, densities, [asked.seed])
        best = table.best_criteria(found, max(grid, parts, dealt))
        every: list[Line] = []
        if grid:
            for criterion in best[:grid]:
                drawn = range(asked.seed, asked.seed + seeds)
                every += self._of_criterion(criterion, asked.both(plan.GRID), drawn)
        alone = self._bare(asked.parts())[1:] if parts else []
        for criterion in best[:parts]:
            alone += self._of_criterion(criterion, asked.parts(), [asked.seed])
        controls: list[Line] = []
        for criterion in best[:dealt]:
            controls += self._dealt_out(criterion, [*densities, *(asked.parts() if criterion in best[:parts] else ())])
        facts = {
            **about,
            "host": asked.host,
            "left_out": self._learned.left_out,
            "borrowed": {name: lacking(trace) for name, trace in self._traces.items() if lacking(trace)},
            "traces": {name: trace.meta["key"] for name, trace in self._traces.items()},
            "predictors": self._hashes,
            "context": self._known,
        }
        return table.Found(facts, dense, found, best, every, alone, controls)

    def _bare(self, densities: Sequence[Density]) -> list[Line]:
        """The dense model, random masks, and those of the prompt, which need a predictor's units."""
        asked = self._asked
        self._say("dense model and random masks")
        found = self._measured.model(asked.of_random(densities))
        if "shadow" in asked.styles:
            host = self._predictor(asked.host, "shadow")  # others make no mask of a prompt
            found += self._measured.predictor("prompt", "", host, "", asked.of_prompt(densities))
        return found

    def _of_criterion(self, criterion: str, densities: Sequence[Density], seeds: Sequence[int]) -> Iterator[Line]:
        """Predictors of a criterion, and its references in their units."""
        asked, trace = self._asked, self._traces[criterion]
        key = str(trace.meta["key"])
        if criterion in asked.learnable:
            host = self._predictor(criterion, asked.styles[0])
        else:
            host = with_rankings(self._predictor(asked.host, asked.styles[0]), trace)
        self._say(f"{criterion}: rankings{' and true scores' if criterion in asked.learnable else ''}")
        settings = asked.of_rankings(criterion, densities)
        yield from self._measured.predictor(f"{criterion}-references", criterion, host, key, settings)
        if criterion not in asked.learnable:
            return
        for seed in seeds:
            for style in asked.styles:
                yield from self._of_style(trace, style, seed, densities)

    def _dealt_out(self, criterion: str, densities: Sequence[Density]) -> Iterator[Line]:
        """Predictors of a criterion that learned from inputs of other tokens, where one learned from its own."""
        seed, dealt = self._asked.seed, context.DEALT
        other = context.dealt_out(self._traces[criterion], seed)
        for style in self._asked.styles:
            lines = self._of_style(other, style, seed, densities, dealt)
            if lines:
                own, made = self._predictor(criterion, style), self._learned.predictor(other, style, seed, dealt)
                both = {"own": context.known(own), dealt: context.known(made)}
                self._known.setdefault(criterion, {})[style] = both
                yield from (replace(line, style=f"{style} {dealt}") for line in lines)

    def _of_style(
        self, trace: ImportanceTrace, style: Style, seed: int, densities: Sequence[Density], of: str = ""
    ) -> list[Line]:
        """One predictor of a trace; `of` tells traces of one criterion apart."""
        settings = self._asked.of_predictor(style, densities)
        if not settings:
            return []
        criterion = str(trace.meta["criterion"])
        made = self._learned.predictor(trace, style, seed, of)
        name = f"{criterion}-{style}-{seed} {of}".strip()
        self._say(f"{name}: {len(settings)} settings")
        lines = self._measured.predictor(name, criterion, made, str(trace.meta["key"]), settings)
        self._hashes[name] = lines[0].predictor.rpartition(" ")[2]
        return lines

    def _predictor(self, criterion: str, style: Style) -> Predictor:
        return self._learned.predictor(self._traces[criterion], style, self._asked.seed)


def _write(found: table.Found, folder: Path, say: Say) -> str:
    text = table.as_markdown(found) + context.as_markdown(found)
    for name, content in (
        ("figures.csv", table.as_csv(found)), ("report.json", table.as_json(found)), ("report.md", text),
    ):  # fmt: skip
        (folder / name).write_text(content, "utf-8")
    try:
        drawing.bits_against_bytes(found, folder / "quality.png")
    except SetupError as error:
        say(f"no picture: {error.message}; {error.hint}")
    return text


def _corpus(bare: TorchModel, given: argparse.Namespace) -> TextCorpus:
    """The first windows of the text that hold the tokens asked for, or all of it."""
    whole = text_corpus(bare, given.text, given.window)
    tokens = 0
    for count, item in enumerate(whole.items, start=1):
        tokens += item.requests[0].scored
        if tokens >= given.tokens:
            return text_corpus(bare, given.text, given.window, count)
    return whole


def _about(asked: plan.Plan, checkpoint: ModelCheckpoint, corpus: TextCorpus, calibration: str) -> dict[str, Any]:
    """What decides every figure of a screen, whatever of it was asked for so far."""
    return {
        "schema": SCHEMA,
        "model": checkpoint.facts.name,
        "identity": checkpoint.identity,
        "seed": asked.seed,
        "calibration": {"sha256": calibration, "positions": asked.positions, "length": asked.length},
        "training": {"epochs": dict(asked.epochs), "neuron_block": asked.block},
        "text": {**corpus.facts, "key": corpus.key},
    }


@contextmanager
def _alone_in(folder: Path, about: Mapping[str, Any]) -> Iterator[None]:
    """Hold a screen's folder, which is of the same model, texts and options, or new.

    Raises:
        InputError: it holds something else, or another process writes to it.
    """
    import filelock

    path = folder / ABOUT_FILE
    if folder.exists() and not path.is_file() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something else than a screen", hint="--out with an empty folder")
    if path.is_file():
        known, wanted = json.loads(path.read_text("utf-8")), json.loads(json.dumps(about))
        differing = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
        if differing:
            problems = [f"{name} is {known.get(name)}, now {wanted.get(name)}" for name in differing]
            raise InputError(
                f"{folder} holds a screen of something else: {'; '.join(problems)}",
                hint="--out with another folder",
                problems=problems,
            )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / LOCK_FILE, timeout=0):
            if not path.is_file():
                unfinished = path.with_suffix(".unfinished")
                unfinished.write_text(json.dumps(about, indent=1) + "\n", "utf-8")
                unfinished.replace(path)
            yield
    except filelock.Timeout:
        raise InputError(f"another process writes to {folder}", hint="wait for it, or --out OTHER") from None


def _plan(given: argparse.Namespace) -> plan.Plan:
    return plan.Plan(
        data=str(given.data),
        criteria=plan.criteria_named(given.criteria),
        styles=plan.styles_named(given.styles),
        scopes=plan.scopes_named(given.scopes),
        densities=plan.densities_named(given.densities),
        epochs=plan.epochs_named(given.epochs),
        positions=given.positions,
        length=given.length,
        block=given.neuron_block,
        seed=given.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.screen", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="as `shadowc collect` takes it")
    add("--data", type=Path, required=True, help="calibration text, .txt or .jsonl")
    add("--text", type=Path, required=True, help="evaluation text; .jsonl has a document a line")
    add("--out", type=Path, required=True, help="folder of the screen; goes on where it was")
    add("--criteria", default="all", help="by commas (%(default)s)")
    add("--styles", default=",".join(STYLES), help="of predictors, by commas (%(default)s)")
    add("--scopes", default=",".join(plan.SCOPES), help="by commas (%(default)s)")
    add("--densities", default=",".join(map(str, plan.DENSITIES)), help="of heads and neurons alike (%(default)s)")
    best: Any = {"type": int, "nargs": "?", "default": 0, "const": plan.BEST, "metavar": "N"}
    add("--grid", help=f"{len(plan.GRID)} densities and several seeds, of N best criteria ({plan.BEST})", **best)
    add("--seeds", type=int, default=plan.GRID_SEEDS, help="of the grid's predictors (%(default)s)")
    add("--parts", help=f"heads alone and neurons alone too, of N best criteria ({plan.BEST})", **best)
    add("--dealt-out", help=f"predictors of N best criteria that read other tokens' inputs ({plan.BEST})", **best)
    add("--tokens", type=int, default=TOKENS, help="evaluated at least, where the text has them (%(default)s)")
    add("--window", type=int, help="tokens of a window; default: the model's context")
    add("--positions", type=int, default=4096, help="recorded of the calibration text (%(default)s)")
    add("--length", type=int, default=256, help="tokens of a calibration sequence (%(default)s)")
    add("--epochs", default="20", help="of training, or STYLE=N,... (%(default)s)")
    add("--neuron-block", type=int, default=1, help="neurons of a unit, for all styles (%(default)s)")
    add("--seed", type=int, default=0, help="of everything (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
