# SPDX-License-Identifier: Apache-2.0
"""A sweep in a folder: outcomes as they come, then tables and pictures of all commands that were finished in it.

In the folder: `sweep.json` and `outcomes.jsonl` (see `store.py`), `rows.jsonl` (see `measured.py`), `figures.csv` (a
line per figure), `report.json`, `report.md`, and with matplotlib `quality.png` and, of a predictor that says so,
`recall.png`. Of the first corpus on which methods `predictor` and `oracle` were both measured, `heat.json` says how
often either chose each unit, and `heat.png` shows it. A picture of anything but what the folder holds now goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shadowc.eval import heat, measured, report
from shadowc.eval.run import Evaluation, evaluate, gathered
from shadowc.eval.store import Store, check_folder
from shadowc.spec.errors import SetupError

if TYPE_CHECKING:
    from shadowc.eval.corpus import Corpus
    from shadowc.eval.model import EvaluatedModel
    from shadowc.eval.request import Setting
    from shadowc.spec.progress import Progress

ROWS_FILE = "rows.jsonl"
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
    """Evaluate, going on from what the folder knows, and write tables and pictures of all that it knows then.

    Returns:
        What was asked for, and nothing else that the folder knows.

    Raises:
        InputError: the folder holds a sweep of something else or a damaged file, is in use or cannot be written; or see
            `evaluate`.
        UnsupportedError: see `evaluate`.
    """
    store = Store()
    with store.kept_in(folder, {"model": model.name, "identity": model.identity, "seed": seed}):
        kept, own = measured.read(folder / ROWS_FILE), list(corpora)
        evaluation = evaluate(model, own, settings, store=store, seed=seed, progress=progress)
        whole = gathered(model, measured.joined(kept, evaluation.rows), seed) if kept else evaluation
        measured.write(folder / ROWS_FILE, whole.rows)
        contents = {
            FIGURES_FILE: report.as_csv(whole),
            REPORT_FILE: report.as_json(whole),
            TABLE_FILE: report.as_markdown(whole),
        }
        for name, content in contents.items():
            (folder / name).write_text(content, "utf-8")
        for name in (QUALITY_FILE, HEAT_FILE):  # of less than there is now
            (folder / name).unlink(missing_ok=True)
        _draw(folder, whole, _heat(folder, whole, own), progress)
    return evaluation


@dataclass(frozen=True, slots=True)
class _Heat:
    """Maps, and the corpus that they are of."""

    corpus: str
    maps: tuple[heat.HeatMap, ...]


def _heat(folder: Path, whole: Evaluation, own: Sequence[Corpus]) -> _Heat | None:
    """Count on the first corpus that has both how often predictor and truth choose each unit, unless the folder knows.

    Only a corpus of this command can be counted on. What the folder says of anything else goes.
    """
    path = folder / HEAT_DATA_FILE
    for corpus in report.corpora(whole):
        pairs = heat.asked([row.setting for row in whole.rows if row.corpus is corpus])
        if not pairs:
            continue
        key = heat.key_of(corpus, pairs)
        known = heat.read(path, key)
        here = next((one for one in own if one.key == corpus.key), None)
        if known is None and here is not None:
            known = heat.heat_maps(whole.model, here, pairs)
            heat.write(path, key, here, known)
        if known is not None:
            return _Heat(corpus.name, known)
    path.unlink(missing_ok=True)
    return None


def _draw(folder: Path, whole: Evaluation, chosen: _Heat | None, progress: Progress) -> None:
    """Draw what there is to draw; without matplotlib say so, since the figures are there."""
    from shadowc.eval import plots

    try:
        plots.quality(whole, folder / QUALITY_FILE)
        if whole.model.recall:
            plots.recall(whole.model, folder / RECALL_FILE)
        if chosen is not None and chosen.maps:
            plots.heat(chosen.maps, f"{whole.model.name}, {chosen.corpus}", folder / HEAT_FILE)
    except SetupError as error:
        progress.note(f"no pictures: {error.message}; {error.hint}")
