# SPDX-License-Identifier: Apache-2.0
"""The race over contestants without a model: who runs when, and what becomes of those that fail."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.peers import table
from benchmarks.peers.lineup import DENSE, ROOT, Entrant
from benchmarks.peers.machine import Machine
from benchmarks.peers.process import Launch
from benchmarks.peers.race import Outcome, Plan, prompt, race
from tests.benchmarks.peers.fake_contestant import digest

PLAN = Plan(rounds=3, tokens=4, short_prompt=5, long_prompt=9, vocab=100, memory=1 << 50)
PEOPLE = {"steady": (DENSE,), "talks": (DENSE,), "dies": (DENSE,), "refuses": (DENSE, "0.5/0.5")}


def launches(folder: Path, labels: list[str]) -> dict[str, Launch]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = (sys.executable, "-m", "tests.benchmarks.peers.fake_contestant", "serve", "--model", ".", "--weights")
    return {label: Launch((*start, label), environment, folder / f"{label}.log") for label in labels}


def run(folder: Path, people: dict[str, tuple[str, ...]], plan: Plan = PLAN, notes: list[str] | None = None) -> Outcome:
    heard = notes.append if notes is not None else lambda _: None
    return race(launches(folder, list(people)), people, plan, lambda: 10e9, heard)


def states() -> dict[str, str]:
    """Label -> state of every fake contestant of this process, T where it is stopped."""
    found = {}
    for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in child.read_text("ascii").split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if "tests.benchmarks.peers.fake_contestant" in command:
                state = Path(f"/proc/{pid}/stat").read_text("ascii").rsplit(")", 1)[1].split()[0]
                found[command[command.index("--weights") + 1]] = state
    return found


def test_a_contestant_that_fails_is_reported_with_its_reason_and_the_others_go_on(tmp_path: Path) -> None:
    found = {(one.contestant, one.setting): one for one in run(tmp_path, PEOPLE).results}
    assert "it ended (exit status 3)" in found["dies", DENSE].failure
    assert "no memory left" in found["dies", DENSE].failure
    assert found["refuses", "0.5/0.5"].failure == "RuntimeError: no density 0.5/0.5"
    measured = [("steady", DENSE), ("talks", DENSE), ("refuses", DENSE)]
    assert [len(found[key].samples) for key in measured] == [PLAN.rounds] * 3
    assert not any(found[key].failure for key in measured)


def test_a_failure_is_a_row_of_the_table_and_of_the_document(tmp_path: Path) -> None:
    outcome = run(tmp_path, PEOPLE)
    entrants = [Entrant(label, "openvino", label, settings) for label, settings in PEOPLE.items()]
    event = table.Event("opt-x", Machine("a cpu", 2, 1 << 34, "Linux"), 2, "2026-01-02", "steady", "")
    rows = [line for line in table.markdown(event, entrants, PLAN, outcome).splitlines() if "| OpenVINO" in line]
    assert len(rows) == len(outcome.results)
    assert [row.split("|")[2].strip() for row in rows if "not measured" in row] == ["dies", "refuses"]
    assert "no memory left" in next(row for row in rows if "| dies |" in row)
    document = json.loads(table.document(event, entrants, PLAN, outcome))
    assert [bool(one["figures"]) for one in document["results"]] == [not one.failure for one in outcome.results]


def test_one_that_cannot_load_is_reported(tmp_path: Path) -> None:
    (result,) = run(tmp_path, {"cannot-load": (DENSE,)}).results
    assert result.failure == "ValueError: the weights are of yesterday"
    assert result.samples == ()


def test_too_few_tokens_are_a_failure(tmp_path: Path) -> None:
    (result,) = run(tmp_path, {"stops-early": (DENSE,)}).results
    assert result.failure == "it made 4 tokens, expected 5"


def test_contestants_take_turns(tmp_path: Path) -> None:
    notes: list[str] = []
    run(tmp_path, {"steady": (DENSE,), "talks": (DENSE,)}, notes=notes)
    order = [note.split(":")[0].strip() for note in notes if not note.startswith("rehearsed")]
    one_round = ["steady dense", "talks dense"]
    assert order == [name for turn in (1, 2, 3) for name in (f"round {turn} of 3", *one_round)]


def test_every_sample_has_the_stream_of_its_moment(tmp_path: Path) -> None:
    streams = iter(range(1, 100))
    people = {"steady": (DENSE,), "talks": (DENSE,)}
    found = race(launches(tmp_path, list(people)), people, PLAN, lambda: float(next(streams)), lambda _: None).results
    # two of the rehearsals each, then two for every sample, in turns
    assert [[sample.stream for sample in one.samples] for one in found] == [[5.5, 9.5, 13.5], [7.5, 11.5, 15.5]]


def run_and_look(folder: Path, plan: Plan) -> tuple[Outcome, list[dict[str, str]]]:
    """The outcome, and the states of all processes when the stream is measured: twice in the turn of each."""
    people = {"steady": (DENSE,), "talks": (DENSE,)}
    seen: list[dict[str, str]] = []

    def bandwidth() -> float:
        seen.append(states())
        return 10e9

    return race(launches(folder, list(people)), people, plan, bandwidth, lambda _: None), seen


def test_all_but_the_one_that_runs_are_stopped(tmp_path: Path) -> None:
    _, seen = run_and_look(tmp_path, PLAN)
    assert [len(one) for one in seen[:4]] == [1] * 4  # rehearsed alone
    stopped = [[label for label in ("steady", "talks") if one.get(label) == "T"] for one in seen[4:]]
    # of the last one that was rehearsed the process is still there
    assert stopped == [["talks"], ["talks"], ["steady"], ["steady"]] * PLAN.rounds
    assert states() == {}


def test_what_does_not_fit_into_memory_is_loaded_anew(tmp_path: Path) -> None:
    outcome, seen = run_and_look(tmp_path, replace(PLAN, memory=0))
    assert outcome.reloaded == ("steady", "talks")
    assert [len(result.samples) for result in outcome.results] == [PLAN.rounds] * 2
    assert [list(one) for one in seen] == [["steady"], ["steady"], ["talks"], ["talks"]] * (1 + PLAN.rounds)


def test_every_contestant_gets_the_same_prompt_and_every_round_another(tmp_path: Path) -> None:
    first = [
        [sample.first_token for sample in result.samples]
        for result in run(tmp_path, {"steady": (DENSE,), "talks": (DENSE,)}).results
    ]
    expected = [digest(prompt(turn, PLAN.short_prompt, PLAN.vocab, "short")) for turn in range(PLAN.rounds)]
    assert first == [expected, expected]
    assert len(set(expected)) == PLAN.rounds


@pytest.mark.parametrize("purpose", ["short", "long"])
def test_no_prompt_is_the_warm_ups(purpose: str) -> None:
    assert prompt(0, 33, 50272, purpose) != prompt(0, 33, 50272, "warm-up")
