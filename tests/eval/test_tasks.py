# SPDX-License-Identifier: Apache-2.0
"""Prompts of the seven tasks, letter by letter; what counts as right; and files that cannot be used."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shadowc.cli.eval_inputs import Ground
from shadowc.eval.request import Outcome
from shadowc.eval.task import TASKS, tasks_named
from shadowc.eval.task_corpus import encoded, questions_of, request_of, task_corpus
from shadowc.eval.torch_model import TorchModel
from shadowc.sparsity.fingerprint import fingerprint
from shadowc.spec.errors import InputError
from tests.eval.task_files import records, write_lines, write_tasks

RIGHT = {"acc": 1.0, "acc_norm": 1.0}

WANTED = {
    "piqa": [
        ("Question: carry a lamp to the attic\nAnswer:", " Lift the lamp with both hands. "),
        ("Question: carry a lamp to the attic\nAnswer:", " Paint the attic and wait."),
    ],
    "copa": [
        ("The lamp fell in the attic because", "  the lamp was loose."),
        ("The lamp fell in the attic because", "  the attic had a roof."),
    ],
    "openbookqa": [("What lies in the attic?", f" a {thing}") for thing in ("lamp", "kettle", "ladder", "violin")],
    "winogrande": [
        (f"The lamp did not fit into the meadow because the {thing}", " was too large for number 0.")
        for thing in ("lamp", "meadow")
    ],
    "rte": [
        ("A lamp was found in the attic.\nQuestion: The attic had a lamp in it. True or False?\nAnswer:", f" {word}")
        for word in ("True", "False")
    ],
    "hellaswag": [
        ("Moving house: How to hold a lamp. Take a breath. Then he", f" {verb} the lamp slowly.")
        for verb in ("turns", "drops", "sings to", "paints")
    ],
    "arc_easy": [
        ("Question: Where does a lamp belong?\nAnswer:", f" the {place}") for place in ("attic", "harbour", "stable")
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data") / "tasks")


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_the_published_ones(task: str) -> None:
    assert list(TASKS[task].question(records(task)[0]).pairs) == WANTED[task]


def test_a_solved_example_ends_in_two_line_breaks_and_has_the_right_answer() -> None:
    wanted = (
        ("carry a lamp to the attic", "Lift the lamp with both hands. "),
        ("carry a kettle to the kitchen", "Paint the kitchen and wait."),
    )
    for record, (goal, right) in zip(records("piqa", 2), wanted, strict=True):
        assert TASKS["piqa"].question(record).solved == f"Question: {goal}\nAnswer: {right}\n\n"
    winogrande = TASKS["winogrande"].question(records("winogrande", 2)[1])
    assert winogrande.solved.startswith("The kettle did not fit into the tunnel because the tunnel was too large")


def test_hellaswag_takes_prepared_queries_as_they_are() -> None:
    record = {"query": "Sailing: A man  [sits]. He", "endings": ["rows.", "[step] sinks."], "label": 1}
    question = TASKS["hellaswag"].question(record)
    assert question.pairs == (
        ("Sailing: A man  [sits]. He", " rows."),
        ("Sailing: A man  [sits]. He", " [step] sinks."),
    )


def test_shots_are_drawn_question_after_question_from_one_generator(in_torch: TorchModel, folder: Path) -> None:
    task = TASKS["rte"]
    corpus = task_corpus(in_torch, folder, task, 2)
    generator = random.Random(1234)
    pool = [task.question(record) for record in records("rte", 8, 10)]
    for item, question in zip(corpus.items, corpus.questions, strict=True):
        front = "".join(one.solved for one in generator.sample(pool, 2))
        prompt = in_torch.tokenizer(front + question.pairs[0][0])["input_ids"]
        assert item.requests[0].ids[: item.requests[0].prompt] == tuple(prompt)[-(item.requests[0].prompt or 0) :]


def test_what_is_scored_is_the_answer_and_the_prompt_is_the_rest(in_torch: TorchModel, folder: Path) -> None:
    corpus = task_corpus(in_torch, folder, TASKS["piqa"])
    decode = in_torch.tokenizer.decode
    for item, question in zip(corpus.items, corpus.questions, strict=True):
        for request, (prompt, text) in zip(item.requests, question.pairs, strict=True):
            assert request.prompt == len(request.ids) - request.scored
            assert prompt.endswith(decode(request.ids[1 : request.prompt])[-20:])
            assert decode(request.ids[-request.scored :]) == text


def test_blanks_at_the_end_of_a_prompt_are_scored_and_an_empty_prompt_is_the_start_token(in_torch: TorchModel) -> None:
    tokenizer, start = in_torch.tokenizer, in_torch.start
    prompt, text = encoded(tokenizer, start, "a lamp ", "is lit")
    assert tokenizer.decode(prompt[1:]) == "a lamp"
    assert tokenizer.decode(text) == " is lit"
    assert encoded(tokenizer, start, "", "lit")[0] == [start]


def test_a_long_prompt_loses_its_start() -> None:
    request = request_of(list(range(10)), [90, 91], context=8)
    assert request.ids == (3, 4, 5, 6, 7, 8, 9, 90, 91)  # eight are fed, the ninth is predicted
    assert (request.prompt, request.scored) == (7, 2)


def answers(values: list[float]) -> list[Outcome]:
    return [Outcome(value, False) for value in values]


def test_acc_takes_the_likeliest_choice_and_acc_norm_the_likeliest_per_character(
    in_torch: TorchModel, tmp_path: Path
) -> None:
    lines = [{"goal": "g", "sol1": "ab", "sol2": "abcdefgh", "label": label} for label in (0, 1, 1)]
    write_lines(tmp_path / "piqa" / "eval.jsonl", lines)
    corpus = task_corpus(in_torch, tmp_path, TASKS["piqa"])
    outcomes = [answers([-2.0, -4.0]), answers([-2.0, -4.0]), answers([-5.0, -4.0])]
    acc, norm = corpus.metrics(outcomes)
    assert (acc.numerator, norm.numerator) == ((1.0, 0.0, 1.0), (0.0, 1.0, 1.0))
    assert acc.value == pytest.approx(2 / 3)
    assert acc.standard_error == pytest.approx(math.sqrt((2 / 9) * 1.5 / 3))


BAD = {
    "not json": ("piqa", "{", "is not JSON"),
    "list": ("piqa", "[1]", "is list, expected an object"),
    "missing": ("piqa", json.dumps({"goal": "g", "sol1": "a", "sol2": "b"}), "has no field 'label'"),
    "kind": ("rte", json.dumps({"sentence1": "s", "sentence2": 3, "label": 0}), "has int in field 'sentence2'"),
    "bool": ("rte", json.dumps({"sentence1": "s", "sentence2": "t", "label": True}), "has bool in field 'label'"),
    "label": ("rte", json.dumps({"sentence1": "s", "sentence2": "t", "label": 2}), "has label 2, expected 0 to 1"),
    "blank": (
        "winogrande",
        json.dumps({"sentence": "no blank.", "option1": "a", "option2": "b", "answer": "1"}),
        "has no blank",
    ),
    "answer": (
        "winogrande",
        json.dumps({"sentence": "a _ here.", "option1": "a", "option2": "b", "answer": "3"}),
        "has answer '3', expected 1 or 2",
    ),
    "key": (
        "arc_easy",
        json.dumps({"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}),
        "has answerKey 'C', expected one of A, B",
    ),
    "lengths": (
        "openbookqa",
        json.dumps({"question_stem": "q", "choices": {"text": ["a"], "label": ["A", "B"]}, "answerKey": "A"}),
        "of one length",
    ),
    "connector": (
        "copa",
        json.dumps({"premise": "p.", "choice1": "A", "choice2": "B", "question": "why", "label": 0}),
        "asks for 'why', expected cause or effect",
    ),
    "endings": ("hellaswag", json.dumps({"query": "q", "endings": ["one"], "label": 0}), "has no list of endings"),
    "half a character": (
        "hellaswag",
        json.dumps({"query": "half of \ud83d", "endings": ["one", "two"], "label": 0}),
        r"has half of a surrogate pair in a text: 'half of \ud83d'",
    ),
    "query": ("hellaswag", json.dumps({"endings": ["one", "two"], "label": 0}), "has neither a query nor"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named_with_file_number_and_reason(in_torch: TorchModel, tmp_path: Path, case: str) -> None:
    task, line, reason = BAD[case]
    path = tmp_path / task / "eval.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(records(task, 1)[0]) + "\n\n" + line + "\n", "utf-8")
    with pytest.raises(InputError) as caught:
        task_corpus(in_torch, tmp_path, TASKS[task])
    assert caught.value.message.startswith(f"{path}, line 3 ")
    assert reason in caught.value.message
    assert caught.value.hint.startswith("one JSON object a line, with ")


def emptied(path: Path) -> None:
    path.write_text("\n", "utf-8")


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("eval.jsonl", Path.unlink, "there is no file"),
        ("fewshot.jsonl", Path.unlink, "there is no file"),
        ("eval.jsonl", emptied, "holds no examples"),
        ("fewshot.jsonl", lambda path: write_lines(path, records("rte", 1)), "holds 1 examples, and 2 shots take 2"),
    ],
)
def test_missing_examples_are_named(
    in_torch: TorchModel, tmp_path: Path, name: str, spoil: Callable[[Path], None], reason: str
) -> None:
    folder = write_tasks(tmp_path / "tasks")
    spoil(folder / "rte" / name)
    with pytest.raises(InputError, match=reason):
        task_corpus(in_torch, folder, TASKS["rte"], 2)


def test_a_task_or_number_of_shots_that_is_named_twice_counts_once(in_torch: TorchModel, folder: Path) -> None:
    ground = Ground.read(None, None, folder, "copa,rte, copa", "2,0,02", None, 3)
    names = [corpus.name for corpus in ground.corpora(in_torch)]
    assert names == ["copa, 2 shots", "rte, 2 shots", "copa, 0 shots", "rte, 0 shots"]


def test_unknown_tasks_are_refused_with_all_that_are_known() -> None:
    assert [task.name for task in tasks_named("rte, copa")] == ["rte", "copa"]
    assert len(tasks_named("all")) == 7
    with pytest.raises(InputError, match="'boolq'") as caught:
        tasks_named("rte,boolq")
    assert all(task in caught.value.hint for task in TASKS)


def test_questions_that_calibrated_the_predictor_are_refused(in_torch: TorchModel, tmp_path: Path) -> None:
    """A question of 200 letters is recognised, whatever else the calibration text says; its pool is not refused."""
    long = [line | {"sentence1": f"{line['sentence1']} " * 8} for line in records("rte")]
    write_lines(tmp_path / "rte" / "eval.jsonl", long)
    write_lines(tmp_path / "rte" / "fewshot.jsonl", [line | {"sentence1": f"Now {line['sentence1']}"} for line in long])
    task, predictor = TASKS["rte"], in_torch._predictor
    assert predictor is not None

    def calibrated_on(name: str) -> TorchModel:
        questions, _ = questions_of(task, tmp_path / "rte" / name)
        text = "\n\n".join(["Some other words.", *(question.solved for question in questions)])
        seen = fingerprint(text.encode(), [text]).to_meta()
        return TorchModel(
            in_torch._model, in_torch._checkpoint, replace(predictor, meta=predictor.meta | {"text": seen})
        )

    with pytest.raises(
        InputError, match=r"of this text's paragraphs and lines of at least 200 characters were in the text"
    ):
        task_corpus(calibrated_on("eval.jsonl"), tmp_path, task)
    assert task_corpus(calibrated_on("fewshot.jsonl"), tmp_path, task, 2).items
