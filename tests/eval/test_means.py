# SPDX-License-Identifier: Apache-2.0
"""The mean over tasks: each counts alike, questions are paired with the dense model's and drawn task by task."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from shadowc.eval import metric, report
from shadowc.eval.metric import Metric, difference, mean_difference
from shadowc.eval.request import Setting
from shadowc.eval.run import evaluate
from shadowc.eval.task import TASKS
from shadowc.eval.task_corpus import task_corpus
from shadowc.eval.texts import corpus_of
from shadowc.eval.torch_model import TorchModel
from shadowc.spec.density import Density
from tests.eval.conftest import PROSE
from tests.eval.task_files import write_tasks


def answers(seed: int, count: int, share: float) -> Metric:
    right = np.random.default_rng(seed).random(count) < share
    return Metric("acc", "share", tuple(right.astype(float)), (1.0,) * count)


def test_a_small_task_counts_as_much_as_a_large_one() -> None:
    ones = [Metric("acc", "share", (1.0, 0.0), (1.0, 1.0)), Metric("acc", "share", (1.0,) * 50, (1.0,) * 50)]
    none = [Metric("acc", "share", (0.0,) * count, (1.0,) * count) for count in (2, 50)]
    assert mean_difference(ones, none).value == 0.75


def test_tasks_narrow_the_interval_as_independent_samples_do() -> None:
    ones, others = ([answers(seed + 50 * side, 100, 0.6) for seed in range(9)] for side in range(2))
    found = mean_difference(ones, others)
    single = [difference(one, other) for one, other in zip(ones, others, strict=True)]
    width = math.sqrt(sum((one.high - one.low) ** 2 for one in single)) / 9
    assert found.high - found.low == pytest.approx(width, rel=0.1)


def test_drawing_all_tasks_alike_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted defect: the same questions, by number, in every task; here they are equally hard in each."""
    ones, others = [answers(1, 100, 0.6)] * 9, [answers(51, 100, 0.6)] * 9
    found = mean_difference(ones, others)
    monkeypatch.setattr(metric, "_NEXT_PAIR", 0)
    planted = mean_difference(ones, others)
    assert planted.high - planted.low > 2 * (found.high - found.low)


def test_pairs_share_their_questions() -> None:
    ones = [answers(seed, 100, 0.6) for seed in range(3)]
    found = mean_difference(ones, ones)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_an_evaluation_has_a_mean_for_every_setting_and_number_of_shots(in_torch: TorchModel, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path)
    names = ("copa", "hellaswag", "piqa")
    corpora = [
        corpus_of(in_torch, "prose", [PROSE], "0", 24),
        *(task_corpus(in_torch, folder, TASKS[name]) for name in names),
        task_corpus(in_torch, folder, TASKS["copa"], 2),
    ]
    evaluation = evaluate(in_torch, corpora, [Setting("predictor", Density(0.5, 0.25))])
    dense, masked = evaluation.means  # copa alone has 2 shots, and prose is no task
    assert dense.name == masked.name == "mean of 3 tasks, 0 shots"
    assert dense.setting.dense
    assert (dense.above_dense.value, dense.above_dense.low) == (0.0, 0.0)
    rows = [row for row in evaluation.rows if row.setting == masked.setting and row.corpus in corpora[1:4]]
    assert masked.value == pytest.approx(np.mean([row.metrics[0].value for row in rows]))
    assert masked.standard_error == pytest.approx(
        math.sqrt(sum(row.metrics[0].standard_error ** 2 for row in rows)) / 3
    )
    assert masked.above_dense.value == pytest.approx(masked.value - dense.value)
    text = report.as_markdown(evaluation)
    assert f"## {masked.name}" in text
    assert f"| predictor | 0.5 | 0.25 | decode |  | {masked.value:.4f} |" in text
    assert '"name": "mean of 3 tasks, 0 shots"' in report.as_json(evaluation)
