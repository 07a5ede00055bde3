# SPDX-License-Identifier: Apache-2.0
"""A sweep in a folder: outcomes as they come, then tables and pictures of all of them.

In the folder: `sweep.json` and `outcomes.jsonl` (see `store.py`), `figures.csv` (a line per figure), `report.json`,
`report.md`, and with matplotlib `quality.png` and, of a predictor that says so, `recall.png`. Where methods `predictor`
and `oracle` were both measured, `heat.json` says how often either chose each unit, and `heat.png` shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shadowc.eval import heat, report
from shadowc.eval.run import Evaluation, evaluate
from shadowc.eval.store import Store, check_folder
from shadowc.spec.errors import SetupError

if TYPE_CHECKING:
    from shadowc.eval.corpus import Corpus
    from shadowc.eval.model import EvaluatedModel
    from shadowc.eval.request import Setting
    from shadowc.spec.progress import Progress

FIGURES_FILE = "figures.csv"
REPORT_FILE = "report.json"
TABLE_FILE = "report.md"
QUALITY_FILE = "quality.png"
RECALL_FILE = "recall.png"
HEAT_FILE = "heat.png"
HEAT_DATA_FILE = "heat.json"


def check(folder: Path) -> None:
    """Refuse a folder that holds anything but a sweep, before anything is loaded.

    Raises:
        InputError: it does, or it is a file.
    """
    check_folder(folder)


def run(
    folder: Path,
    model: EvaluatedModel,
    corpora: Iterable[Corpus],
    settings: Sequence[Setting],
    seed: int,
    progress: Progress,
) -> Evaluation:
    """Evaluate, going on from what the folder knows, and write tables and pictures.

    Raises:
        InputError: the folder holds a sweep of something else, is in use or cannot be written; or see `evaluate`.
        UnsupportedError: see `evaluate`.
    """
    store = Store()
    with store.kept_in(folder, {"model": model.name, "identity": model.identity, "seed": seed}):
        evaluation = evaluate(model, list(corpora), settings, store=store, seed=seed, progress=progress)
        contents = {
            FIGURES_FILE: report.as_csv(evaluation),
            REPORT_FILE: report.as_json(evaluation),
            TABLE_FILE: report.as_markdown(evaluation),
        }
        for name, content in contents.items():
            (folder / name).write_text(content, "utf-8")
        _draw(folder, evaluation, _heat(folder, evaluation, settings), progress)
    return evaluation


def _heat(folder: Path, evaluation: Evaluation, settings: Sequence[Setting]) -> tuple[heat.HeatMap, ...]:
    """Count on the first corpus how often predictor and truth choose each unit, unless the folder knows."""
    pairs, corpus = heat.asked(settings), report.corpora(evaluation)[0]
    if not pairs:
        return ()
    key, path = heat.key_of(corpus, pairs), folder / HEAT_DATA_FILE
    known = heat.read(path, key)
    if known is None:
        known = heat.heat_maps(evaluation.model, corpus, pairs)
        heat.write(path, key, corpus, known)
    return known


def _draw(folder: Path, evaluation: Evaluation, maps: Sequence[heat.HeatMap], progress: Progress) -> None:
    """Draw what there is to draw; without matplotlib say so, since the figures are there."""
    from shadowc.eval import plots

    try:
        plots.quality(evaluation, folder / QUALITY_FILE)
        if evaluation.model.recall:
            plots.recall(evaluation.model, folder / RECALL_FILE)
        if maps:
            name = f"{evaluation.model.name}, {report.corpora(evaluation)[0].name}"
            plots.heat(maps, name, folder / HEAT_FILE)
    except SetupError as error:
        progress.note(f"no pictures: {error.message}; {error.hint}")
