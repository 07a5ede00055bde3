# SPDX-License-Identifier: Apache-2.0
"""Calibration text from tasks: `python -m shadowc.eval.solved_prompts TASKS --shots 3 --out calibration.jsonl`.

Every document is a prompt as `shadowc eval --tasks` makes it, solved examples in front of a question, with the right
answer behind it. Questions and examples come from the pools (`TASK/fewshot.jsonl`) alone, never from the questions that
are evaluated; a pool that shares one with them is refused. `shadowc collect --data` takes the file.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from shadowc.eval.task import Question, Task, tasks_named
from shadowc.eval.task_corpus import EVAL_FILE, FEWSHOT_FILE, SEED, questions_of
from shadowc.spec.errors import InputError, ShadowcError

COUNT = 50


def solved_prompts(folder: Path, tasks: Sequence[Task], shots: int, count: int = COUNT, seed: int = SEED) -> list[str]:
    """Return prompts with their answers; tasks take turns, so that any stretch of the text has all of them.

    Args:
        folder: with a folder for each task.
        tasks: which ones.
        shots: solved examples in front of each question.
        count: prompts of every task, at most; a pool gives as many as it has questions.
        seed: of the draw of questions and examples.

    Raises:
        InputError: a pool is missing, has a bad line or too few examples, or holds a question that is evaluated.
    """
    by_task = [_of_task(folder, task, shots, count, random.Random(seed)) for task in tasks]
    longest = max(map(len, by_task))
    return [prompts[turn] for turn in range(longest) for prompts in by_task if turn < len(prompts)]


def _of_task(folder: Path, task: Task, shots: int, count: int, generator: random.Random) -> list[str]:
    path = folder / task.name / FEWSHOT_FILE
    pool, _ = questions_of(task, path)
    if len(pool) <= shots:
        raise InputError(
            f"{path} holds {len(pool)} examples; {shots} shots and a question take {shots + 1}",
            hint=f"--shots {len(pool) - 1}, or more examples",
        )
    _refuse_evaluated(folder, task, pool)
    prompts = []
    for index in generator.sample(range(len(pool)), min(count, len(pool))):
        others = pool[:index] + pool[index + 1 :]
        front = "".join(one.solved for one in generator.sample(others, shots))
        prompts.append((front + pool[index].solved).rstrip())
    return prompts


def _refuse_evaluated(folder: Path, task: Task, pool: Sequence[Question]) -> None:
    """Refuse a pool that holds a question of the file that is evaluated, whatever its fields beside it say."""
    path = folder / task.name / EVAL_FILE
    if not path.is_file():
        return
    evaluated, _ = questions_of(task, path)
    asked = {(one.prompts, one.continuations) for one in evaluated}
    both = [number for number, one in enumerate(pool, start=1) if (one.prompts, one.continuations) in asked]
    if both:
        raise InputError(
            f"{folder / task.name / FEWSHOT_FILE}: {len(both)} of {len(pool)} examples are questions of {path} too, "
            f"the first is example {both[0]}; what is evaluated cannot calibrate",
            hint=f"take them out of {FEWSHOT_FILE}",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the text; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m shadowc.eval.solved_prompts", description=__doc__)
    parser.add_argument("tasks", type=Path, help="folder with TASK/fewshot.jsonl for every task")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--task", default="all", help="by commas (%(default)s)")
    parser.add_argument("--shots", type=int, default=0, help="solved examples in front of a question (%(default)s)")
    parser.add_argument("--count", type=int, default=COUNT, help="prompts of every task, at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the draw (%(default)s)")
    given = parser.parse_args(arguments)
    if given.shots < 0 or given.count < 1 or given.out.suffix != ".jsonl":
        parser.error("--shots is 0 or more, --count 1 or more, and --out a .jsonl file")
    try:
        prompts = solved_prompts(given.tasks, tasks_named(given.task), given.shots, given.count, given.seed)
        with given.out.open("x", encoding="utf-8") as file:  # nobody's file is replaced
            file.writelines(json.dumps({"text": text}) + "\n" for text in prompts)
    except ShadowcError as error:
        parser.error(f"{error}: {error.hint}" if error.hint else str(error))
    except OSError as error:
        parser.error(f"{given.out} cannot be written: {error.strerror}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
