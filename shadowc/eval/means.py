# SPDX-License-Identifier: Apache-2.0
"""The mean of the main figure over tasks: every task counts alike, and questions are drawn again within each task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shadowc.eval.metric import Interval, mean_difference

if TYPE_CHECKING:
    from shadowc.eval.corpus import Described
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
    """Give a mean for every setting, where there are two tasks or more; the dense one comes first.

    Rows of several commands may have settings that were not measured on all tasks: each set of tasks on which one was
    measured has means of its own. A task that was measured at several limits counts with the most examples.
    """
    for shots, tasks in _largest(rows).items():
        by_setting: dict[Setting, dict[str, Row]] = {}
        for row in rows:
            task = str(row.corpus.facts.get("task"))
            if tasks.get(task) is row.corpus:
                by_setting.setdefault(row.setting, {})[task] = row
        for names in dict.fromkeys(tuple(name for name in tasks if name in found) for found in by_setting.values()):
            if len(names) > 1:
                here = [[found[name] for name in names] for found in by_setting.values() if found.keys() >= {*names}]
                yield from (_mean(names, shots, same, here[0], seed) for same in here)


def _largest(rows: Sequence[Row]) -> dict[int, dict[str, Described]]:
    """Return the tasks among the corpora, by shots and name."""
    by_shots: dict[int, dict[str, Described]] = {}
    for corpus in {id(row.corpus): row.corpus for row in rows}.values():
        facts = corpus.facts
        if facts["kind"] == "task":
            tasks = by_shots.setdefault(int(facts["shots"]), {})
            known = tasks.setdefault(str(facts["task"]), corpus)
            if int(facts["examples"]) >= int(known.facts["examples"]):
                tasks[str(facts["task"])] = corpus
    return by_shots


def _mean(names: tuple[str, ...], shots: int, same: Sequence[Row], dense: Sequence[Row], seed: int) -> Mean:
    """Return the mean of one setting's rows, a row for each task, beside those of the dense model."""
    mine, base = ([row.metrics[0] for row in one] for one in (same, dense))
    return Mean(
        tasks=names,
        shots=shots,
        setting=same[0].setting,
        value=math.fsum(one.value for one in mine) / len(mine),
        standard_error=math.sqrt(math.fsum(one.standard_error**2 for one in mine)) / len(mine),
        above_dense=mean_difference(mine, base, seed),
        masked_share=math.fsum(row.masked_share for row in same) / len(mine),
    )
