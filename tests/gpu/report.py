# SPDX-License-Identifier: Apache-2.0
"""What a run of the tests did and did not do, and the exit code that says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from tests.gpu.goals import Goal

NOT_RUN, MISSED = 10, 11
"""Exit codes beside pytest's own (1 to 5): nothing failed, but something was not run; all ran, but a goal is missed."""


class Outcomes:
    """A pytest plugin that counts outcomes, and skips by their reason."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._skips: Counter[str] = Counter()
        self._modules: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._counts["failed"] += 1
        elif report.skipped and not hasattr(report, "wasxfail"):
            self._skips[_reason(report.longrepr)] += 1
        elif report.passed and report.when == "call":
            self._counts["passed"] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._counts["failed"] += 1
        elif report.skipped:
            self._modules.append(f"{_reason(report.longrepr)} ({report.nodeid})")

    @property
    def summary(self) -> str:
        """One line of counts; a skipped module counts as one."""
        not_run = self._skips.total() + len(self._modules)
        return f"{self._counts['passed']} passed, {self._counts['failed']} failed, {not_run} not run"

    @property
    def not_run(self) -> list[str]:
        """One line per reason, the most frequent first, then modules without their number of tests."""
        tests = [f"{count} test{'s' * (count > 1)}: {reason}" for reason, count in self._skips.most_common()]
        return tests + [f"1 module: {reason}" for reason in self._modules]


def exit_code(
    failed: int, not_run: Sequence[str], goals: Sequence[Goal], *, allow_skips: bool, allow_missed: bool
) -> int:
    """0 only if everything ran, passed and met its goal, or what did not is allowed.

    Args:
        failed: pytest's exit code.
        not_run: what was not run.
        goals: those that were judged.
        allow_skips: what was not run does not count.
        allow_missed: missed goals do not count.
    """
    if failed:
        return failed
    if not_run and not allow_skips:
        return NOT_RUN
    if not allow_missed and not all(goal.met for goal in goals):
        return MISSED
    return 0


def _reason(longrepr: object) -> str:
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return " ".join(str(text).removeprefix("Skipped: ").split())
