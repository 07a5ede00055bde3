# SPDX-License-Identifier: Apache-2.0
"""Calibration text from tasks: the prompts that eval makes, from the pools alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shadowc.eval.solved_prompts import main, solved_prompts
from shadowc.eval.task import TASKS
from shadowc.eval.task_corpus import questions_of
from shadowc.spec.errors import InputError
from tests.eval.task_files import pools_apart, write_tasks


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return pools_apart(write_tasks(tmp_path / "tasks"))


def test_prompts_are_solved_examples_of_the_pool_with_as_many_in_front_as_there_are_shots(tasks: Path) -> None:
    pool, _ = questions_of(TASKS["piqa"], tasks / "piqa" / "fewshot.jsonl")
    solved = {question.solved.rstrip() for question in pool}
    for shots in (0, 2):
        prompts = solved_prompts(tasks, [TASKS["piqa"]], shots)
        assert len(prompts) == len(pool)
        for prompt in prompts:
            parts = [part.rstrip() for part in prompt.split("\n\n")]
            assert len(parts) == shots + 1
            assert len(set(parts)) == shots + 1
            assert set(parts) <= solved
        assert {prompt.split("\n\n")[-1].rstrip() for prompt in prompts} == solved


def test_nothing_of_what_is_evaluated_is_in_them(tasks: Path) -> None:
    text = "\n".join(solved_prompts(tasks, list(TASKS.values()), 2))
    for name, task in TASKS.items():
        questions, _ = questions_of(task, tasks / name / "eval.jsonl")
        assert not any(question.solved.rstrip() in text for question in questions)


def test_tasks_take_turns_and_the_seed_decides(tasks: Path) -> None:
    both = [TASKS["piqa"], TASKS["rte"]]
    prompts = solved_prompts(tasks, both, 1, 3)
    assert len(prompts) == 6
    assert all("True or False?" in prompt for prompt in prompts[1::2])
    assert not any("True or False?" in prompt for prompt in prompts[::2])
    assert solved_prompts(tasks, both, 1, 3) == prompts
    assert solved_prompts(tasks, both, 1, 3, seed=1) != prompts


def test_a_pool_with_an_evaluated_question_is_refused(tasks: Path) -> None:
    folder = tasks / "rte"
    line = (folder / "eval.jsonl").read_text().splitlines()[1]
    with (folder / "fewshot.jsonl").open("a") as pool:
        pool.write(line + "\n")
    with pytest.raises(InputError, match=r"rte/fewshot.jsonl: 1 of \d+ examples are questions of .*eval.jsonl too"):
        solved_prompts(tasks, [TASKS["piqa"], TASKS["rte"]], 0)
    shutil.copy(folder / "eval.jsonl", folder / "fewshot.jsonl")
    with pytest.raises(InputError, match="what is evaluated cannot calibrate"):
        solved_prompts(tasks, [TASKS["rte"]], 0)


def test_bad_files_are_named(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tasks / "copa" / "fewshot.jsonl"
    path.write_text(path.read_text().replace('"label": 1', '"label": 7', 1))
    out = tmp_path / "prompts.jsonl"
    with pytest.raises(SystemExit):
        main([str(tasks), "--out", str(out)])
    assert "has label 7, expected 0 to 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tasks), "--out", str(out), "--task", "piqa", "--shots", "99"])
    assert "99 shots and a question take 100" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tasks), "--out", str(out), "--task", "nothing"])
    assert "unknown task 'nothing'" in capsys.readouterr().err
    assert not out.exists()


def test_the_file_is_calibration_text_and_replaces_none(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from shadowc.sparsity.calibration import read_text

    out = tmp_path / "prompts.jsonl"
    arguments = [str(tasks), "--out", str(out), "--task", "piqa", "--shots", "1", "--count", "4"]
    assert main(arguments) == 0
    written = out.read_text()
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"{out} cannot be written: File exists" in capsys.readouterr().err
    assert out.read_text() == written
    documents, _ = read_text(out)
    assert documents == [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert len(documents) == 4
