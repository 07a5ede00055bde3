# SPDX-License-Identifier: Apache-2.0
"""What the note below a picture says is what was done; no matplotlib is needed."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest

from shadowc.eval import plots
from shadowc.eval.request import Setting
from shadowc.eval.run import evaluate
from shadowc.eval.task import TASKS
from shadowc.eval.task_corpus import task_corpus
from shadowc.eval.texts import corpus_of
from shadowc.eval.torch_model import TorchModel
from shadowc.spec.density import Density
from tests.eval.conftest import PROSE
from tests.eval.task_files import write_tasks


def test_the_note_names_what_was_drawn(in_torch: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(plots, "figure", lambda rows, columns, scale: (None, [MagicMock() for _ in range(columns)]))
    monkeypatch.setattr(plots, "save", lambda drawn, note, path: notes.append(note))
    few = corpus_of(in_torch, "few", [PROSE] * 3, "0", 24)
    many = corpus_of(in_torch, "many", [f"{n} {PROSE}" for n in range(12)], "0", 24)
    task = task_corpus(in_torch, write_tasks(tmp_path), TASKS["piqa"])
    for corpora in ([few], [many], [few, task]):
        plots.quality(evaluate(in_torch, corpora, [Setting("random", Density(0.5, 0.5))]), tmp_path / "quality.png")
    shown = [note.partition("draws over ")[2] for note in notes]
    assert shown == ["windows, seed 0", "documents, seed 0", "windows or examples, seed 0"]
