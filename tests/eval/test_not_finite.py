# SPDX-License-Identifier: Apache-2.0
"""Logits that are no numbers are no answers: evaluations end with a sentence that says where they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from shadowc.eval import sweep
from shadowc.eval.likelihood import log_likelihood
from shadowc.eval.request import Outcome, Request, Setting
from shadowc.eval.run import evaluate
from shadowc.eval.store import Store
from shadowc.eval.task import TASKS
from shadowc.eval.task_corpus import task_corpus
from shadowc.eval.texts import corpus_of
from shadowc.eval.torch_model import TorchModel
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from shadowc.spec.progress import NullProgress
from tests.eval.conftest import PROSE
from tests.eval.task_files import write_tasks

HALF = Setting("predictor", Density(0.5, 0.25))


@pytest.fixture(scope="module")
def overflowing(fresh_torch: Callable[[], TorchModel]) -> TorchModel:
    """Finite weights that are too large: the logits are NaN."""
    model = fresh_torch()
    for layer in model._model.model.decoder.layers:
        layer.fc2.weight.data = layer.fc2.weight.data * 1e38
    return model


def test_a_task_has_no_accuracy_where_logits_are_nan(overflowing: TorchModel, tmp_path: Path) -> None:
    corpus = task_corpus(overflowing, write_tasks(tmp_path), TASKS["piqa"])
    with pytest.raises(InputError, match=r"the logits of .* are not finite in question 1 of piqa, 0 shots, without"):
        evaluate(overflowing, [corpus], [])


def test_a_text_has_no_figures_where_logits_are_nan_and_nothing_is_kept(
    overflowing: TorchModel, tmp_path: Path
) -> None:
    corpus = corpus_of(overflowing, "prose", [PROSE], "0", 24)
    with pytest.raises(InputError, match=r"window 1 \(document 1\) of prose, without masks") as caught:
        sweep.run(tmp_path / "out", overflowing, [corpus], [], 0, NullProgress())
    assert caught.value.hint == "check the checkpoint"
    assert (tmp_path / "out" / "outcomes.jsonl").read_text() == ""


class BrokenMasks(TorchModel):
    """Whose predictor breaks the answer to the fourth request."""

    def score(self, requests: Sequence[Request], setting: Setting) -> list[Outcome]:
        found = super().score(requests, setting)
        return found if setting.dense else [*found[:3], Outcome(math.inf, True), *found[4:]]


def test_the_masks_that_break_the_logits_are_named_with_the_question(in_torch: TorchModel, tmp_path: Path) -> None:
    model = BrokenMasks(in_torch._model, in_torch._checkpoint, in_torch._predictor)
    corpus = task_corpus(model, write_tasks(tmp_path), TASKS["piqa"])  # two choices each: the fourth is question 2's
    with pytest.raises(InputError, match=r"question 2 of piqa, .* method predictor at density 0.5/0.25, protocol dec"):
        evaluate(model, [corpus], [HALF])


def test_answers_that_are_no_numbers_in_an_old_store_are_asked_for_again(in_torch: TorchModel) -> None:
    corpus, store = corpus_of(in_torch, "prose", [PROSE], "0", 24), Store()
    store.put((corpus.key, "dense"), {index: [Outcome(math.nan, False)] for index in range(len(corpus.items))})
    (row,) = evaluate(in_torch, [corpus], [], store=store).rows
    assert math.isfinite(row.metrics[0].value)


def test_the_likelihood_of_finite_logits_is_finite() -> None:
    logits_SV = np.array([[3e38, -3e38, 0.0]], np.float32)
    assert math.isfinite(log_likelihood(logits_SV, np.array([1]))[0])
