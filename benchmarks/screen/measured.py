# SPDX-License-Identifier: Apache-2.0
"""Evaluates everything of a screen through `shadowc.eval`, each predictor's outcomes in a folder of its own.

A killed screen goes on behind the last piece of work. The dense model and random masks are computed once and serve
all; outcomes of another text, model, predictor or trace are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowc.eval.model import dense_setting
from shadowc.eval.run import Row, evaluate
from shadowc.eval.store import Key, Store
from shadowc.eval.torch_model import TorchModel
from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    from shadowc.checkpoint.resolve import ModelCheckpoint
    from shadowc.eval.corpus import Corpus
    from shadowc.eval.request import Setting
    from shadowc.sparsity.predictor import Predictor
    from shadowc.spec.progress import Progress


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of the screen: whose masks they were."""

    criterion: str
    """Empty: none decides."""
    style: str
    """Of the predictor, or the method that takes its place."""
    seed: int | None
    """Of the predictor; None where nothing was trained."""
    row: Row
    predictor: str = ""
    """Identity of the model with its predictor."""

    @property
    def learned(self) -> bool:
        """Whether a predictor made the masks."""
        return self.seed is not None

    @property
    def above_dense(self) -> float:
        """Bits per byte."""
        return self.row.above_dense[0].value

    @property
    def column(self) -> str:
        """Style and scope, as tables name them."""
        return f"{self.style} {self.row.setting.scope}".strip()


class Measured:
    """Evaluates on one text.

    Args:
        folder: of the screen.
        model: torch model that all share.
        checkpoint: where it comes from.
        corpus: the text.
        seed: of random masks and of the bootstrap.
        progress: told about items.
    """

    def __init__(
        self, folder: Path, model: Any, checkpoint: ModelCheckpoint, corpus: Corpus, seed: int, progress: Progress
    ) -> None:
        self._folder, self._model, self._checkpoint = folder, model, checkpoint
        self._corpus, self._seed, self._progress = corpus, seed, progress
        self._dense: Store = Store()

    def model(self, settings: Sequence[Setting]) -> list[Line]:
        """Evaluate the dense model, the first line, and random masks."""
        bare = TorchModel(self._model, self._checkpoint, seed=self._seed)
        rows = self._rows("model", bare, settings, "", self._dense)
        return [Line("", row.setting.method, None, row) for row in rows]

    def predictor(
        self, name: str, criterion: str, predictor: Predictor, trace: str, settings: Sequence[Setting]
    ) -> list[Line]:
        """Evaluate a predictor, or what takes its place, in a folder of this name; `model` went first.

        Args:
            name: of the folder.
            criterion: of the scores; empty: none.
            predictor: whose masks, controls and units they are.
            trace: key of the trace that controls come from.
            settings: at least one.

        Raises:
            InputError: the folder holds outcomes of something else.
        """
        model = TorchModel(self._model, self._checkpoint, predictor, seed=self._seed)
        rows = self._rows(name, model, settings, trace, Store())[1:]
        seed = int(predictor.meta["seed"])
        return [
            Line(criterion, predictor.style, seed, row, model.identity)
            if row.setting.method == "predictor"
            else Line(criterion, row.setting.method, None, row)
            for row in rows
        ]

    def _rows(
        self, name: str, model: TorchModel, settings: Sequence[Setting], trace: str, store: Store
    ) -> tuple[Row, ...]:
        about = {"model": model.name, "identity": model.identity, "seed": self._seed, "trace": trace}
        about["text"] = self._corpus.key
        with store.kept_in(self._folder / "outcomes" / name, about):
            if store is not self._dense:
                self._share_dense(name, store, (self._corpus.key, dense_setting(model).key))
            return evaluate(model, [self._corpus], settings, store=store, seed=self._seed, progress=self._progress).rows

    def _share_dense(self, name: str, store: Store, key: Key) -> None:
        """Give the dense model's outcomes to another store, which must not know others."""
        dense, known = self._dense.of(key), store.of(key)
        other = [index for index in known if known[index] != dense[index]]
        if other:
            raise InputError(
                f"{self._folder / 'outcomes' / name}: the dense model answers item {other[0]} otherwise than in "
                "outcomes/model; these are outcomes of another model or text",
                hint=f"rm -r {self._folder / 'outcomes' / name}",
            )
        missing = {index: answers for index, answers in dense.items() if index not in known}
        if missing:
            store.put(key, missing)
