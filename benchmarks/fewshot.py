# SPDX-License-Identifier: Apache-2.0
"""Does it pay to calibrate on the prompts of tasks? Predictors of few-shot prompts against those of plain text.

    python -m benchmarks.fewshot --model MODEL --tasks FOLDER --data PLAIN --text PLAIN_TEST --out FOLDER

calibrates on plain text and on solved prompts of 0, 3 and 5 shots (from the tasks' pools), as many tokens of each, and
evaluates all predictors on plain text, on solved questions of the tasks as running text, and on the right answers
behind dense prompts. It writes `figures.csv`, `report.json` and `report.md`; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.screen.learned import Learned
from benchmarks.screen.measured import Line, Measured
from benchmarks.screen.plan import Plan, densities_named, epochs_named, styles_named
from shadowc.checkpoint.finite import check_finite
from shadowc.checkpoint.models import resolve_model
from shadowc.eval.corpus import Corpus, Item
from shadowc.eval.metric import Metric, difference
from shadowc.eval.request import Outcome, Setting
from shadowc.eval.solved_prompts import solved_prompts
from shadowc.eval.task import Question, Task, tasks_named
from shadowc.eval.task_corpus import EVAL_FILE, encoded, questions_of, request_of
from shadowc.eval.texts import TextCorpus, corpus_of, text_corpus
from shadowc.eval.torch_model import TorchModel
from shadowc.sparsity.calibration import read_text
from shadowc.sparsity.fingerprint import fingerprint, refuse_if_calibrated
from shadowc.sparsity.importance import Origin
from shadowc.sparsity.reference import load_torch_model
from shadowc.spec.density import Density
from shadowc.spec.errors import ShadowcError
from shadowc.spec.progress import NullProgress

if TYPE_CHECKING:
    from shadowc.sparsity.predictor import Predictor

PLAIN = "plain text"
METHODS = {"shadow": ("predictor", "static"), "dejavu": ("predictor",), "shadow+": ("predictor", "normalised")}
"""Style -> methods that are measured with its predictor, at its own scope; the calibration text makes rankings too."""


class AnswerCorpus(Corpus):
    """The right answers of questions, each behind its dense prompt: bits per byte of the answers."""

    def __init__(self, model: TorchModel, questions: Sequence[Question], sha256: str) -> None:
        self.name, self.sha256 = "right answers", sha256
        pairs = [question.pairs[question.right] for question in questions]
        requests = [
            request_of(*encoded(model.tokenizer, model.start, prompt, text), model.context) for prompt, text in pairs
        ]
        self.items = tuple(Item(index, (request,)) for index, request in enumerate(requests))
        self._bytes = tuple(float(len(text.encode())) for _, text in pairs)

    @property
    def facts(self) -> Mapping[str, str | int]:
        """What a report says of it."""
        return {"name": self.name, "kind": "answers", "sha256": self.sha256, "tokens": self.tokens}

    def metrics(self, outcomes: Sequence[Sequence[Outcome]]) -> tuple[Metric, ...]:
        """Bits per byte, drawn by question."""
        bits = tuple(-answers[0].log_probability / math.log(2) for answers in outcomes)
        return (Metric("bits_per_byte", "bits", bits, self._bytes),)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """One figure: what was calibrated on, and what was measured on which text."""

    calibration: str
    corpus: Corpus
    line: Line

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for figures that differ in their calibration alone."""
        return self.corpus.name, self.line.row.setting.density, self.line.column


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate, train, evaluate, write; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        text = compared(given)
    except ShadowcError as error:
        parser.error(f"{error}: {error.hint}" if error.hint else str(error))
    sys.stdout.write(text)
    return 0


def compared(given: argparse.Namespace) -> str:
    """Do everything; returns the tables in Markdown.

    Raises:
        InputError: the model, a text, a task, a density or the folder cannot be used.
    """
    tasks, densities = tasks_named(given.task), _densities(given)
    given.out.mkdir(parents=True, exist_ok=True)
    texts = {PLAIN: given.data} | {
        f"{shots} shots": _prompts(given, tasks, shots) for shots in map(int, given.shots.split(","))
    }
    checkpoint = resolve_model(given.model, offline=False, seed=given.seed)
    check_finite(checkpoint)
    model = load_torch_model(checkpoint)
    corpora = _corpora(TorchModel(model, checkpoint), tasks, given)
    for name, path in texts.items():
        _refuse_common(path, corpora)
        _say(f"{name}: {path}")
    progress = NullProgress()
    grounds = [
        (corpus, Measured(given.out / "on" / _folder(corpus.name), model, checkpoint, corpus, given.seed, progress))
        for corpus in corpora
    ]
    found = [Calibrated("", corpus, line) for corpus, ground in grounds for line in ground.model([])]
    keys = {}
    for name, path in texts.items():
        place, plan = given.out / _folder(name), _plan(given, path)
        learned = Learned(place, plan, checkpoint, model, Origin(given.model, "auto", given.seed), progress, _say)
        trace = learned.trace(given.criterion)
        meta = trace.meta
        keys[name] = {
            "text": meta["text"]["sha256"],
            "trace": meta["key"],
            "tokens": meta["sequences"] * meta["length"],
        }
        for style in plan.styles:
            predictor = learned.predictor(trace, style, given.seed)
            found += _of_predictor(name, predictor, meta["key"], densities, grounds)
    about = {
        "model": checkpoint.facts.name,
        "identity": checkpoint.identity,
        "criterion": given.criterion,
        "seed": given.seed,
        "positions": given.positions,
        "epochs": given.epochs,
        "calibrations": keys,
        "texts": [dict(corpus.facts) for corpus in corpora],
    }
    return _write(given.out, about, found)


def _of_predictor(
    name: str,
    predictor: Predictor,
    trace: str,
    densities: Sequence[Density],
    grounds: Sequence[tuple[Corpus, Measured]],
) -> Iterator[Calibrated]:
    """Evaluate one predictor, and the ranking of its calibration text, on every text."""
    scope = predictor.scope(None)
    settings = [Setting(method, density, scope=scope) for density in densities for method in METHODS[predictor.style]]
    for corpus, ground in grounds:
        _say(f"{name}, {predictor.style}, on {corpus.name}")
        label = _folder(f"{name} {predictor.style}")
        for line in ground.predictor(label, str(predictor.meta["criterion"]), predictor, trace, settings):
            yield Calibrated(name, corpus, line)


def _densities(given: argparse.Namespace) -> list[Density]:
    neurons = densities_named(given.densities)
    return [Density(share if given.heads is None else given.heads, share) for share in neurons]


def _folder(name: str) -> str:
    return name.replace(" ", "-")


def _prompts(given: argparse.Namespace, tasks: Sequence[Task], shots: int) -> Path:
    """Write the calibration text of so many shots."""
    path: Path = given.out / f"prompts-{shots}.jsonl"
    lines = [json.dumps({"text": text}) + "\n" for text in solved_prompts(given.tasks, tasks, shots, given.prompts)]
    path.write_text("".join(lines), "utf-8")
    return path


def _corpora(bare: TorchModel, tasks: Sequence[Task], given: argparse.Namespace) -> list[Corpus]:
    """Plain text, solved questions as running text, and their answers alone."""
    plain = text_corpus(bare, given.text, given.window, given.windows)
    chosen: list[Question] = []
    state = hashlib.sha256()
    for task in tasks:
        questions, content = questions_of(task, given.tasks / task.name / EVAL_FILE)
        chosen += questions[: given.questions]
        state.update(content)
    solved = [question.solved.rstrip() for question in chosen]
    running = corpus_of(bare, "solved questions", solved, state.hexdigest())
    return [plain, running, AnswerCorpus(bare, chosen, state.hexdigest())]


def _refuse_common(path: Path, corpora: Sequence[Corpus]) -> None:
    """Refuse a calibration text that shares paragraphs with what is evaluated."""
    _, known = read_text(path)
    for corpus in corpora:
        documents = [document.text for document in corpus.documents] if isinstance(corpus, TextCorpus) else []
        mine = replace(fingerprint(b"", documents), sha256=corpus.sha256)
        refuse_if_calibrated(mine, {"text": known.to_meta()})


def _plan(given: argparse.Namespace, data: Path) -> Plan:
    return Plan(
        data=str(data),
        criteria=(given.criterion,),
        styles=styles_named(given.styles),
        scopes=("local", "global"),
        densities=densities_named(given.densities),
        epochs=epochs_named(given.epochs),
        positions=given.positions,
        length=given.length,
        block=given.neuron_block,
        seed=given.seed,
    )


def _write(folder: Path, about: Mapping[str, Any], found: Sequence[Calibrated]) -> str:
    records = [_record(one) for one in found]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    markdown = "\n".join(_tables(found))
    (folder / "figures.csv").write_text(text.getvalue(), "utf-8")
    (folder / "report.json").write_text(json.dumps({**about, "rows": records}, indent=1) + "\n", "utf-8")
    (folder / "report.md").write_text(markdown, "utf-8")
    return markdown


def _record(one: Calibrated) -> dict[str, object]:
    row, setting = one.line.row, one.line.row.setting
    at, above = row.intervals[0], row.above_dense[0]
    return {
        "calibration": one.calibration,
        "corpus": one.corpus.name,
        "style": one.line.style,
        "scope": setting.scope,
        "heads": setting.density.heads,
        "neurons": setting.density.neurons,
        "bits_per_byte": at.value,
        "low": at.low,
        "high": at.high,
        "above_dense": above.value,
        "above_dense_low": above.low,
        "above_dense_high": above.high,
        "effective_sparsity": row.sparsity,
        "masked_share": row.masked_share,
        "predictor": one.line.predictor.rpartition(" ")[2],
    }


def _tables(found: Sequence[Calibrated]) -> Iterator[str]:
    """A table for every text: masks down, calibrations across, each beside its paired difference to plain text."""
    names = list(dict.fromkeys(one.calibration for one in found if one.calibration))
    for corpus in {one.corpus.name: one.corpus for one in found}.values():
        here = [one for one in found if one.corpus.name == corpus.name]
        dense = next(one for one in here if not one.calibration).line.row
        yield f"## {corpus.name}: {corpus.tokens:,} tokens, dense {dense.metrics[0].value:.4f} bits per byte\n"
        others = [name for name in names if name != PLAIN]
        columns = " | ".join(f"{name}, above plain | 95 %" for name in others)
        yield f"| masks | kept | {PLAIN}, above dense | {columns} |"
        yield f"|{' --- |' * (3 + 2 * len(others))}"
        for key in dict.fromkeys(one.key for one in here if one.calibration):
            by_name = {one.calibration: one.line.row for one in here if one.key == key and one.calibration}
            base = by_name[PLAIN]
            cells = [str(key[2]), _kept(base.setting.density), f"{base.above_dense[0].value:+.4f}"]
            for name in others:
                gap = difference(by_name[name].metrics[0], base.metrics[0])
                cells += [f"{gap.value:+.4f}", f"[{gap.low:+.4f}, {gap.high:+.4f}]"]
            yield f"| {' | '.join(cells)} |"
        yield ""


def _kept(density: Density) -> str:
    return f"{density.heads:g}" if density.heads == density.neurons else f"{density.heads:g} / {density.neurons:g}"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fewshot", description=__doc__)
    add = parser.add_argument
    add("--model", required=True)
    add("--tasks", type=Path, required=True, help="folder with TASK/eval.jsonl and TASK/fewshot.jsonl")
    add("--data", type=Path, required=True, help="plain calibration text")
    add("--text", type=Path, required=True, help="plain evaluation text")
    add("--out", type=Path, required=True, help="folder; goes on where it was")
    add("--task", default="all", help="by commas (%(default)s)")
    add("--shots", default="0,3,5", help="by commas (%(default)s)")
    add("--prompts", type=int, default=50, help="of every task, at most (%(default)s)")
    add("--questions", type=int, default=20, help="evaluated of every task (%(default)s)")
    add("--criterion", default="plainact", help="(%(default)s)")
    add("--styles", default="shadow,shadow+", help="by commas (%(default)s)")
    add("--densities", default="0.5,0.2", help="of neurons, and of heads unless --heads is given (%(default)s)")
    add("--heads", type=float, help="density of heads throughout")
    add("--positions", type=int, default=4096, help="recorded (%(default)s)")
    add("--length", type=int, default=256, help="tokens of a calibration sequence (%(default)s)")
    add("--window", type=int, help="of plain text; default: the model's context")
    add("--windows", type=int, help="of plain text; default: all")
    add("--epochs", default="20", help="of training, or STYLE=N,... (%(default)s)")
    add("--neuron-block", type=int, default=1, help="neurons of a unit (%(default)s)")
    add("--seed", type=int, default=0, help="of everything (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
