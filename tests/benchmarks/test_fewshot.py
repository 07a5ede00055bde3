# SPDX-License-Identifier: Apache-2.0
"""Calibration on solved prompts against plain text: equal tokens, every text, and nothing of what is evaluated."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks import fewshot
from tests.benchmarks.test_screen import write
from tests.eval.task_files import pools_apart, write_tasks
from tests.sparsity.conftest import _one_thread

__all__ = ["_one_thread"]

FLAGS = ("--task", "piqa,rte", "--questions", "3", "--shots", "0,2", "--densities", "0.5", "--window", "16")
SMALL = ("--windows", "3", "--positions", "64", "--length", "32", "--epochs", "1", "--neuron-block", "16")


@pytest.fixture(scope="module")
def places(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base = tmp_path_factory.mktemp("fewshot")
    plain, test = write(base / "calibration.jsonl", 0, 40), write(base / "test.jsonl", 100, 12)
    tasks = pools_apart(write_tasks(base / "tasks"))
    return ["--model", str(tiny_checkpoint), "--tasks", str(tasks), "--data", str(plain), "--text", str(test)]


def test_every_calibration_meets_every_text_and_goes_on_to_the_same_figures(places: list[str], tmp_path: Path) -> None:
    command = [*places, "--out", str(tmp_path / "out"), *FLAGS, *SMALL]
    assert fewshot.main(command) == 0
    content = (tmp_path / "out" / "figures.csv").read_text()
    lines = [line for line in csv.DictReader(content.splitlines()) if line["calibration"]]
    keys = {(x["calibration"], x["corpus"], x["style"]) for x in lines}
    names = ("plain text", "0 shots", "2 shots")
    texts = ("test.jsonl", "solved questions", "right answers")
    styles = ("shadow", "static", "shadow+", "normalised")
    assert keys == {(name, text, style) for name in names for text in texts for style in styles}
    assert len(lines) == len(keys)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len({one["tokens"] for one in report["calibrations"].values()}) == 1
    assert len({one["text"] for one in report["calibrations"].values()}) == 3
    static = {x["calibration"]: x["bits_per_byte"] for x in lines if (x["corpus"], x["style"]) == (texts[1], "static")}
    assert len(set(static.values())) == 3
    assert fewshot.main(command) == 0
    assert (tmp_path / "out" / "figures.csv").read_text() == content


def test_heads_can_be_kept_while_neurons_are_not(places: list[str], tmp_path: Path) -> None:
    few = ("--styles", "shadow+", "--shots", "0", "--heads", "1")
    assert fewshot.main([*places, "--out", str(tmp_path / "out"), *FLAGS, *SMALL, *few]) == 0
    lines = csv.DictReader((tmp_path / "out" / "figures.csv").read_text().splitlines())
    masked = [line for line in lines if line["calibration"]]
    assert {(x["heads"], x["neurons"]) for x in masked} == {("1.0", "0.5")}
    assert all(0 < float(x["effective_sparsity"]) < 0.5 for x in masked)
    assert "| 1 / 0.5 |" in (tmp_path / "out" / "report.md").read_text()


def test_plain_text_that_holds_evaluated_questions_is_refused(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = list(places)
    again[again.index("--data") + 1] = again[again.index("--text") + 1]
    with pytest.raises(SystemExit):
        fewshot.main([*again, "--out", str(tmp_path / "out"), *FLAGS, *SMALL])
    assert "calibrated on" in capsys.readouterr().err
