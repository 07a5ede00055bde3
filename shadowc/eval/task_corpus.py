# SPDX-License-Identifier: Apache-2.0
"""A task with its files: questions, solved examples in front of them, and how many are answered rightly.

A folder holds for each task `TASK/eval.jsonl`, the questions, and `TASK/fewshot.jsonl`, the pool of solved examples.
Those are drawn as lm-eval draws them from a split of its own: one generator of the seed, question after question.

The prompt, solved examples included, is dense. Of a continuation the first token is predicted by the prompt's last
one, so without a mask; every later token is predicted by the one before it, computed under its mask. A continuation
of a single token is thus the same under any mask: `masked_share` says how much of a task is measured at all.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowc.eval.corpus import Corpus, Item
from shadowc.eval.metric import Metric
from shadowc.eval.request import Request, fitted
from shadowc.eval.task import Question, RecordError, Task
from shadowc.sparsity.text_files import bad_line, json_lines, read_utf8
from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    from shadowc.eval.model import EvaluatedModel
    from shadowc.eval.request import Outcome

EVAL_FILE = "eval.jsonl"
FEWSHOT_FILE = "fewshot.jsonl"
SEED = 1234
"""Of the draw of solved examples, lm-eval's default."""


class TaskCorpus(Corpus):
    """Questions of a task as requests.

    Args:
        task: its metrics.
        questions: in the order of the file.
        items: the requests of each question's choices.
        shots: solved examples in front of each question.
        sha256: of the file with the questions.
    """

    def __init__(
        self, task: Task, questions: Sequence[Question], items: tuple[Item, ...], shots: int, sha256: str
    ) -> None:
        self.name, self.sha256, self.items = f"{task.name}, {shots} shots", sha256, items
        self.task, self.questions, self.shots = task, questions, shots

    @property
    def facts(self) -> Mapping[str, str | int]:
        """What a report says of it."""
        return {
            "name": self.name,
            "kind": "task",
            "task": self.task.name,
            "shots": self.shots,
            "sha256": self.sha256,
            "examples": len(self.items),
            "tokens": self.tokens,
            "drawn": "examples",
        }

    def metrics(self, outcomes: Sequence[Sequence[Outcome]]) -> tuple[Metric, ...]:
        """Share of the questions whose right choice is the likeliest, and the likeliest per character."""
        columns: dict[str, list[float]] = {name: [] for name in self.task.metrics}
        for question, answers in zip(self.questions, outcomes, strict=True):
            likelihoods = np.array([answer.log_probability for answer in answers])
            lengths = np.array([float(len(choice)) for choice in question.choices])
            chosen = {"acc": likelihoods.argmax(), "acc_norm": (likelihoods / lengths).argmax()}
            for name, column in columns.items():
                column.append(float(chosen[name] == question.right))
        ones = (1.0,) * len(self.questions)
        return tuple(Metric(name, "share", tuple(column), ones) for name, column in columns.items())

    def place(self, index: int) -> str:
        """Say which question it is, for messages."""
        return f"question {index + 1} of {self.name}"


def task_corpus(
    model: EvaluatedModel,
    folder: Path,
    task: Task,
    shots: int = 0,
    limit: int | None = None,
    seed: int = SEED,
) -> TaskCorpus:
    """Read a task from a folder.

    Args:
        model: its tokenizer and context.
        folder: with a folder for each task.
        task: which one.
        shots: solved examples in front of each question.
        limit: first questions only; None: all.
        seed: of the draw of solved examples.

    Raises:
        InputError: a file is missing, holds a bad line or too few examples, or calibrated the predictor.
    """
    questions, content = questions_of(task, folder / task.name / EVAL_FILE)
    model.refuse_calibration_text(content, [question.solved for question in questions])
    questions = questions[:limit]
    fronts = [""] * len(questions)
    if shots:
        pool, _ = questions_of(task, folder / task.name / FEWSHOT_FILE)
        if len(pool) < shots:
            raise InputError(
                f"{folder / task.name / FEWSHOT_FILE} holds {len(pool)} examples, and {shots} shots take {shots}",
                hint=f"--shots {len(pool)}, or more examples",
            )
        generator = random.Random(seed)
        fronts = ["".join(one.solved for one in generator.sample(pool, shots)) for _ in questions]
    items = tuple(
        Item(index, tuple(_request(model, front + prompt, text) for prompt, text in question.pairs))
        for index, (question, front) in enumerate(zip(questions, fronts, strict=True))
    )
    return TaskCorpus(task, questions, items, shots, hashlib.sha256(content).hexdigest())


def questions_of(task: Task, path: Path) -> tuple[list[Question], bytes]:
    """Read a file of a task; returns its bytes too.

    Raises:
        InputError: it is missing, empty, or has a bad line.
    """
    if not path.is_file():
        raise InputError(
            f"there is no file {path}",
            hint=f"a folder of tasks has {task.name}/{EVAL_FILE}, and {task.name}/{FEWSHOT_FILE} for --shots",
        )
    text, content = read_utf8(path, "--tasks")
    wanted = ", ".join(f'"{name}"' for name in task.fields)
    found = []
    for number, record in json_lines(path, text, task.fields):
        try:
            found.append(task.question(record))
        except RecordError as error:
            raise bad_line(path, number, str(error), wanted) from None
    if not found:
        raise InputError(f"{path} holds no examples", hint=f"one JSON object a line, with {wanted}")
    return found, content


def _request(model: EvaluatedModel, prompt: str, continuation: str) -> Request:
    return request_of(*encoded(model.tokenizer, model.start, prompt, continuation), model.context)


def encoded(tokenizer: Any, start: int, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt and of its continuation, tokenised together as in lm-eval.

    Blanks at the end of a prompt go to the continuation. An empty prompt is the start token.
    """
    bare = prompt.rstrip()
    if not bare:
        ids = tokenizer(prompt + continuation, add_special_tokens=False, verbose=False)["input_ids"]
        return [start], list(ids)
    whole = tokenizer(prompt + continuation, verbose=False)["input_ids"]
    first = tokenizer(bare, verbose=False)["input_ids"]
    return list(first), list(whole[len(first) :])


def request_of(prompt: list[int], continuation: list[int], context: int) -> Request:
    """A request that feeds at most `context` tokens; the start of a longer prompt goes."""
    return fitted((*prompt, *continuation), len(continuation), len(prompt), context)
