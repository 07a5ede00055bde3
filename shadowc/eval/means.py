# SPDX-License-Identifier: Apache-2.0
"""The mean of the main figure over tasks: every task counts alike, and questions are drawn again within each task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shadowc.eval.metric import Interval, mean_difference

if TYPE_CHECKING:
    from shadowc.eval.corpus import Corpus
    from shadowc.eval.request import Setting
    from shadowc.eval.run import Row


@dataclass(frozen=True, slots=True)
class Mean:
    """One setting on all tasks with as many solved examples."""

    tasks: tuple[str, ...]
    shots: int
    setting: Setting
    value: float
    standard_error: float
    """Of the tasks' own, as of independent samples."""
    above_dense: Interval
    """Paired by question."""
    masked_share: float
    """Mean over the tasks of the share of the scored tokens that were predicted under a mask."""

    @property
    def name(self) -> str:
        """As a corpus has one."""
        return f"mean of {len(self.tasks)} tasks, {self.shots} shots"


def means(rows: Sequence[Row], seed: int) -> Iterator[Mean]:
    """Give a mean for every setting, where there are two tasks or more; the dense one comes first."""
    by_shots: dict[int, list[Corpus]] = {}
    for corpus in {id(row.corpus): row.corpus for row in rows}.values():
        if corpus.facts["kind"] == "task":
            by_shots.setdefault(int(corpus.facts["shots"]), []).append(corpus)
    for shots, tasks in by_shots.items():
        if len(tasks) < 2:
            continue
        of_task = [[row for row in rows if row.corpus is corpus] for corpus in tasks]
        base = [found[0].metrics[0] for found in of_task]
        for same in zip(*of_task, strict=True):
            mine = [row.metrics[0] for row in same]
            yield Mean(
                tasks=tuple(str(corpus.facts["task"]) for corpus in tasks),
                shots=shots,
                setting=same[0].setting,
                value=math.fsum(one.value for one in mine) / len(mine),
                standard_error=math.sqrt(math.fsum(one.standard_error**2 for one in mine)) / len(mine),
                above_dense=mean_difference(mine, base, seed),
                masked_share=math.fsum(row.masked_share for row in same) / len(mine),
            )
