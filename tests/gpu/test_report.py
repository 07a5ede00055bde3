# SPDX-License-Identifier: Apache-2.0
"""`make gpu-test` succeeds only if everything ran, and says what did not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.gpu import __main__ as gpu_test
from tests.gpu import build, table
from tests.gpu.goals import Goal
from tests.gpu.report import MISSED, NOT_RUN, Outcomes, exit_code

MET, SHORT = Goal(True, "fast: met"), Goal(False, "faster: MISSED")
TESTS = """
import pytest
def test_passes(): pass
@pytest.mark.parametrize("tool", "ab")
def test_lacks_a_tool(tool): pytest.skip("no tool")
@pytest.fixture
def card(): pytest.skip("no engine for this card")
def test_needs_a_card(card): pass
@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""


def run_pytest(folder: Path, **files: str) -> tuple[int, Outcomes]:
    """In this process, so every call needs file names of its own."""
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    outcomes = Outcomes()
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--import-mode=importlib", "-c", folder / "pytest.ini"]
    return int(pytest.main([*map(str, options), str(folder)], plugins=[outcomes])), outcomes


def test_skips_are_counted_by_reason_wherever_they_come_from(tmp_path: Path) -> None:
    whole = "import pytest\npytest.skip('no GPU', allow_module_level=True)\n"
    code, outcomes = run_pytest(tmp_path, some_skipped=TESTS, all_skipped=whole)
    assert code == 0, "pytest is content with skips"
    assert outcomes.summary == "1 passed, 0 failed, 4 not run"
    assert outcomes.not_run[0] == "2 tests: no tool"
    assert sorted(outcomes.not_run[1:]) == [
        "1 module: no GPU (test_all_skipped.py)", "1 test: no engine for this card",
    ]  # fmt: skip


def test_failures_are_counted_wherever_they_happen(tmp_path: Path) -> None:
    broken = (
        "import pytest\n@pytest.fixture\ndef card(): raise OSError\ndef test_a(card): pass\ndef test_b(): assert 0\n"
    )
    code, outcomes = run_pytest(tmp_path, broken=broken)
    assert code == 1
    assert outcomes.summary == "0 passed, 2 failed, 0 not run"


@pytest.mark.parametrize(("not_run", "goals", "expected"), [
    ([], [MET], 0), (["4 tests: no tool"], [MET], NOT_RUN), ([], [MET, SHORT], MISSED), (["x"], [SHORT], NOT_RUN),
])  # fmt: skip
def test_the_exit_code_tells_apart_what_was_not_run_and_what_was_missed(
    not_run: list[str], goals: list[Goal], expected: int
) -> None:
    assert exit_code(0, not_run, goals, allow_skips=False, allow_missed=False) == expected
    assert exit_code(0, not_run, goals, allow_skips=True, allow_missed=True) == 0
    assert exit_code(0, not_run, goals, allow_skips=True, allow_missed=False) == (MISSED if SHORT in goals else 0)
    assert exit_code(0, not_run, goals, allow_skips=False, allow_missed=True) == (NOT_RUN if not_run else 0)
    assert exit_code(1, not_run, goals, allow_skips=True, allow_missed=True) == 1


Machine = Callable[..., dict]


def report(outcome: str, reason: str = "") -> SimpleNamespace:
    skip = ("test_x.py", 1, f"Skipped: {reason}")
    return SimpleNamespace(
        passed=outcome == "passed", failed=outcome == "failed", skipped=outcome == "skipped", when="call", longrepr=skip
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A pretended GPU, pretended tests and measurements; gives back what the card's file is told."""

    def pretend(*reports: SimpleNamespace, goals: tuple[Goal, ...] = (MET,), missing: tuple[str, ...] = ()) -> dict:
        told: dict = {}

        def measure(folder: Path, **words: object) -> table.Outcome:
            told.update(words)
            return table.Outcome(folder / "x.md", goals, missing)

        def run(arguments: list[str], plugins: list[Outcomes]) -> int:
            for one in reports:
                plugins[0].pytest_runtest_logreport(one)
            return int(any(one.failed for one in reports))

        monkeypatch.setattr(gpu_test, "open_cuda", lambda: SimpleNamespace(gpu="NVIDIA X"))
        monkeypatch.setattr(build, "nvcc", lambda: "nvcc")
        monkeypatch.setattr(table, "main", measure)
        monkeypatch.setattr(gpu_test, "pytest", SimpleNamespace(main=run))
        return told

    return pretend


def test_gpu_test_fails_and_lists_at_the_end_what_was_not_run(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    skips = report("skipped", "no engine for this card"), report("skipped", "no tool"), report("skipped", "no tool")
    told = machine(report("passed"), *skips, missing=("the comparison with cuBLAS: no cuBLAS",))
    assert gpu_test.main([]) == NOT_RUN
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "tests: 1 passed, 0 failed, 3 not run",
        "not run: 2 tests: no tool",
        "not run: 1 test: no engine for this card",
        "not run: the comparison with cuBLAS: no cuBLAS",
    ]
    assert told["tests"] == "1 passed, 0 failed, 3 not run"
    assert told["not_run"] == ["2 tests: no tool", "1 test: no engine for this card"]
    assert gpu_test.main(["--allow-skips"]) == 0


def test_gpu_test_fails_for_a_missed_goal_and_names_it_last(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(report("passed"), goals=(MET, SHORT))
    assert gpu_test.main([]) == MISSED
    assert capsys.readouterr().out.splitlines()[-1] == "goal missed: faster: MISSED"
    assert gpu_test.main(["--allow-missed"]) == 0
    assert gpu_test.main(["--allow-skips"]) == MISSED


def test_gpu_test_fails_for_a_failure_whatever_is_allowed(machine: Machine) -> None:
    machine(report("passed"), report("failed"))
    assert gpu_test.main(["--allow-skips", "--allow-missed"]) == 1


def test_gpu_test_fails_if_nothing_could_be_measured(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    machine(report("passed"))
    monkeypatch.setattr(table, "main", measure)
    assert gpu_test.main(["--allow-skips", "--allow-missed"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "not run: the table of times: an illegal memory access was encountered"


def test_gpu_test_succeeds_if_all_ran_and_every_goal_is_met(machine: Machine) -> None:
    machine(report("passed"))
    assert gpu_test.main([]) == 0
