# SPDX-License-Identifier: Apache-2.0
"""Small tasks of all seven kinds, written by hand, and a little WikiText."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

_OBJECTS = ("lamp", "kettle", "ladder", "violin", "saddle", "anchor", "mitten", "basket", "candle", "hammer")
_PLACES = ("attic", "harbour", "stable", "kitchen", "meadow", "tunnel", "library", "orchard", "chapel", "garage")


def _lettered(texts: Sequence[str]) -> dict[str, list[str]]:
    return {"text": list(texts), "label": ["A", "B", "C", "D"][: len(texts)]}


def records(task: str, count: int = 10, begin: int = 0) -> list[dict[str, object]]:
    """So many lines of a task's file; lines of other places differ."""
    return [_RECORDS[task](begin + index) for index in range(count)]


def _piqa(index: int) -> dict[str, object]:
    thing, place = _OBJECTS[index % 10], _PLACES[(index * 3) % 10]
    return {"goal": f"carry a {thing} to the {place}", "sol1": f"Lift the {thing} with both hands. ",
            "sol2": f"Paint the {place} and wait.", "label": index % 2}  # fmt: skip


def _copa(index: int) -> dict[str, object]:
    thing, place = _OBJECTS[index % 10], _PLACES[(index * 7) % 10]
    return {"premise": f"The {thing} fell in the {place}.", "choice1": f"The {thing} was loose.",
            "choice2": f"The {place} had a roof.", "question": ("cause", "effect")[index % 2],
            "label": (index // 2) % 2}  # fmt: skip


def _openbookqa(index: int) -> dict[str, object]:
    choices = [f"a {_OBJECTS[(index + step) % 10]}" for step in range(4)]
    return {"question_stem": f"What lies in the {_PLACES[index % 10]}?", "choices": _lettered(choices),
            "answerKey": "ABCD"[index % 4]}  # fmt: skip


def _arc_easy(index: int) -> dict[str, object]:
    choices = [f"the {_PLACES[(index + step) % 10]}" for step in range(3 + index % 2)]
    return {"question": f"Where does a {_OBJECTS[index % 10]} belong?", "choices": _lettered(choices),
            "answerKey": "ABC"[index % 3]}  # fmt: skip


def _winogrande(index: int) -> dict[str, object]:
    one, two = _OBJECTS[index % 10], _PLACES[(index + 4) % 10]
    return {"sentence": f"The {one} did not fit into the {two} because the _ was too large for number {index}.",
            "option1": one, "option2": two, "answer": str(1 + index % 2)}  # fmt: skip


def _rte(index: int) -> dict[str, object]:
    thing, place = _OBJECTS[index % 10], _PLACES[index % 7]
    return {"sentence1": f"A {thing} was found in the {place}.", "sentence2": f"The {place} had a {thing} in it.",
            "label": index % 2}  # fmt: skip


def _hellaswag(index: int) -> dict[str, object]:
    thing = _OBJECTS[index % 10]
    endings = [f"{verb} the {thing} slowly." for verb in ("turns", "drops", "sings to", "paints")]
    return {"activity_label": "Moving house", "ctx_a": f"[header] How to hold a {thing} [title] Take a breath.",
            "ctx_b": "then he", "endings": endings, "label": index % 4}  # fmt: skip


_RECORDS = {
    "piqa": _piqa, "copa": _copa, "openbookqa": _openbookqa, "winogrande": _winogrande, "rte": _rte,
    "hellaswag": _hellaswag, "arc_easy": _arc_easy,
}  # fmt: skip


def write_lines(path: Path, lines: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def write_tasks(folder: Path) -> Path:
    """A folder with ten questions and eight solved examples of every task."""
    for task in _RECORDS:
        write_lines(folder / task / "eval.jsonl", records(task))
        write_lines(folder / task / "fewshot.jsonl", records(task, 8, 10))
    return folder


_ASKED = ("goal", "premise", "question_stem", "sentence", "sentence1", "query", "ctx_a")


def pools_apart(folder: Path) -> Path:
    """Change the solved examples of `write_tasks`, so that no task asks one of them."""
    for task in _RECORDS:
        path = folder / task / "fewshot.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        fields = (*_ASKED, "question") if task == "arc_easy" else _ASKED
        write_lines(
            path, [{name: f"Now {value}" if name in fields else value for name, value in x.items()} for x in lines]
        )
    return folder


WIKITEXT = (
    " \n = Lazy Engine = \n \n A lazy engine ( 1843 ) reads 1 @,@ 024 rows , or 2 @.@ 5 % of them ; it 's well @-@"
    " known for \" rest \" at 20 ° C . \n \n = = Design = = \n \n The head sleeps ' soundly ' until it is asked : "
    "twice ! \n \n = Second Page = \n \n Another page [ short ] ends here . N rows remain ? \n"
)
