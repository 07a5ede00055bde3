# SPDX-License-Identifier: Apache-2.0
"""Seven tasks with choices: the fields of their files, their prompts, and what counts as right, all as in lm-eval.

A task turns one line of its file into a `Question`. A model answers with the choice of the highest log-likelihood
(acc), or of the highest per character (acc_norm). Prompt and continuation are joined with one blank; an example
that is solved ends in two line breaks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from shadowc.sparsity.text_files import half_pair
from shadowc.spec.errors import InputError

JOINT = " "
"""Between a prompt and its continuation."""
BETWEEN_EXAMPLES = "\n\n"
Record = Mapping[str, Any]


class RecordError(ValueError):
    """A line whose fields are there, but do not fit together; the message ends a sentence that names the line."""


@dataclass(frozen=True, slots=True)
class Question:
    """One example of a task."""

    prompts: tuple[str, ...]
    """One for all continuations, or one for each."""
    continuations: tuple[str, ...]
    """One for each prompt, or the same for all of them."""
    choices: tuple[str, ...]
    """What acc_norm takes the length of."""
    right: int

    def __post_init__(self) -> None:
        """Refuse what no tokenizer reads.

        Raises:
            RecordError: a text has half of a surrogate pair.
        """
        for text in (*self.prompts, *self.continuations):
            if half := half_pair(text):
                raise RecordError(f"has half of a surrogate pair in a text: {half}")

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Prompt and continuation of every choice; the blank between them belongs to the continuation."""
        count = len(self.choices)
        prompts = self.prompts * count if len(self.prompts) == 1 else self.prompts
        continuations = self.continuations * count if len(self.continuations) == 1 else self.continuations
        return tuple((prompt, JOINT + text) for prompt, text in zip(prompts, continuations, strict=True))

    @property
    def solved(self) -> str:
        """The example with its right answer, as it stands before a question."""
        prompt, continuation = self.pairs[self.right]
        return prompt + continuation + BETWEEN_EXAMPLES


@dataclass(frozen=True, slots=True)
class Task:
    """One of the tasks."""

    name: str
    fields: Mapping[str, type]
    """That every line of its file has."""
    question: Callable[[Record], Question]
    """Raises RecordError where a line's fields do not fit together."""
    metrics: tuple[str, ...]


def _labelled(record: Record, count: int) -> int:
    label = record["label"]
    if not 0 <= label < count:
        raise RecordError(f"has label {label}, expected 0 to {count - 1}")
    return int(label)


def _lettered(record: Record) -> tuple[tuple[str, ...], int]:
    """Texts of the choices, and which one answerKey names."""
    choices, key = record["choices"], record["answerKey"].strip()
    texts, letters = choices.get("text"), choices.get("label")
    if not isinstance(texts, list) or not isinstance(letters, list) or len(texts) != len(letters) or len(texts) < 2:
        raise RecordError('has choices without lists "text" and "label" of one length')
    if key not in letters:
        raise RecordError(f"has answerKey {key!r}, expected one of {', '.join(map(str, letters))}")
    return tuple(map(str, texts)), letters.index(key)


def _asked(question: str, choices: tuple[str, ...], right: int) -> Question:
    return Question((question,), choices, choices, right)


def _piqa(record: Record) -> Question:
    choices = record["sol1"], record["sol2"]
    return _asked(f"Question: {record['goal']}\nAnswer:", choices, _labelled(record, 2))


def _copa(record: Record) -> Question:
    """The premise without its full stop, and a connector; choices bring a blank of their own, so there are two."""
    connectors = {"cause": "because", "effect": "therefore"}
    if record["question"] not in connectors:
        raise RecordError(f"asks for {record['question']!r}, expected cause or effect")
    if not all(record[name] for name in ("choice1", "choice2")):
        raise RecordError("has an empty choice")
    prompt = f"{record['premise'].strip()[:-1]} {connectors[record['question']]}"
    choices = tuple(f" {text[0].lower()}{text[1:]}" for text in (record["choice1"], record["choice2"]))
    return _asked(prompt, choices, _labelled(record, 2))


def _openbookqa(record: Record) -> Question:
    return _asked(record["question_stem"], *_lettered(record))


def _arc_easy(record: Record) -> Question:
    return _asked(f"Question: {record['question']}\nAnswer:", *_lettered(record))


def _winogrande(record: Record) -> Question:
    """The options fill the blank of the prompt; what follows the blank is scored behind either."""
    before, blank, after = record["sentence"].partition("_")
    if not blank or not after.strip():
        raise RecordError("has no blank (_) with something behind it in its sentence")
    if record["answer"] not in ("1", "2"):
        raise RecordError(f"has answer {record['answer']!r}, expected 1 or 2")
    prompts = before + record["option1"], before + record["option2"]
    return Question(prompts, (after.strip(),), prompts, int(record["answer"]) - 1)


def _rte(record: Record) -> Question:
    prompt = f"{record['sentence1']}\nQuestion: {record['sentence2']} True or False?\nAnswer:"
    return _asked(prompt, ("True", "False"), _labelled(record, 2))


def _hellaswag(record: Record) -> Question:
    """Lines as published (activity_label, ctx_a, ctx_b) are prepared here, those with a query are as they are."""
    endings = record["endings"]
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(text, str) for text in endings):
        raise RecordError("has no list of endings")
    if "query" in record:
        return _asked(str(record["query"]), tuple(endings), _labelled(record, len(endings)))
    if not all(isinstance(record.get(name), str) for name in ("activity_label", "ctx_a", "ctx_b")):
        raise RecordError("has neither a query nor activity_label, ctx_a and ctx_b")
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    choices = tuple(_without_marks(text) for text in endings)
    return _asked(_without_marks(context), choices, _labelled(record, len(endings)))


def _without_marks(text: str) -> str:
    """Take out WikiHow's marks in brackets; a title's becomes a full stop."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


_LETTERED: Mapping[str, type] = MappingProxyType({"choices": dict, "answerKey": str})
_BOTH = ("acc", "acc_norm")
_ALL = (
    Task("piqa", {"goal": str, "sol1": str, "sol2": str, "label": int}, _piqa, _BOTH),
    Task("copa", {"premise": str, "choice1": str, "choice2": str, "question": str, "label": int}, _copa, ("acc",)),
    Task("openbookqa", {"question_stem": str, **_LETTERED}, _openbookqa, _BOTH),
    Task("winogrande", {"sentence": str, "option1": str, "option2": str, "answer": str}, _winogrande, ("acc",)),
    Task("rte", {"sentence1": str, "sentence2": str, "label": int}, _rte, ("acc",)),
    Task("hellaswag", {"endings": list, "label": int}, _hellaswag, _BOTH),
    Task("arc_easy", {"question": str, **_LETTERED}, _arc_easy, _BOTH),
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})


def tasks_named(names: str) -> tuple[Task, ...]:
    """The tasks of a list such as `piqa,rte`, each once, since a mean over tasks counts each alike; `all` means all.

    Raises:
        InputError: a task is not known; all are listed.
    """
    if names.strip() == "all":
        return _ALL
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
    unknown = [name for name in wanted if name not in TASKS]
    if unknown:
        raise InputError(f"unknown task {', '.join(map(repr, unknown))}", hint=f"tasks are all, {', '.join(TASKS)}")
    return tuple(TASKS[name] for name in wanted)
