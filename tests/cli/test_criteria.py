# SPDX-License-Identifier: Apache-2.0
"""`shadowc criteria`, and what the other commands say about criteria."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shadowc.sparsity.criteria import criterion_names
from tests.cli.conftest import Shadowc

INPUT = 2
SMALL = ("--units", "8", "--sequences", "3", "--length", "12", "--tokens", "1")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text("the lazy dog jumps over the quick brown fox and the dog sees the fox " * 30, encoding="utf-8")
    return path


def test_without_a_model_all_criteria_are_listed_with_kind_needs_and_formula(shadowc: Shadowc) -> None:
    listed = shadowc("criteria").stdout
    assert all(f"\n{name}: one score a " in f"\n{listed}" for name in criterion_names())
    assert "plainact: one score a token; reads activations, gradients\n  Heads |sum_i g_i a_i|" in listed
    assert "grasp: one score a token; reads activations, second order" in listed
    assert "magnitude: one score a text: static ranking only; reads weights" in listed
    found = {one["name"]: one for one in json.loads(shadowc("criteria", "--json").stdout)}
    assert tuple(found) == criterion_names()
    assert (found["snip"]["trains"], found["nwot"]["trains"]) == (True, False)
    assert "Source: SNIP" in found["snip"]["formula"]


def test_flags_of_a_measurement_are_refused_without_a_model(shadowc: Shadowc) -> None:
    result = shadowc("criteria", "--units", "8", "--offline")
    assert result.exit_code == INPUT
    assert "--units, --offline have no effect without --model" in result.stderr


def test_correlations_are_told_by_kind_with_intervals(shadowc: Shadowc, tiny_checkpoint: Path, text: Path) -> None:
    result = shadowc(
        "criteria", "--model", tiny_checkpoint, "--data", text, "--criterion", "plainact, random,jacov", *SMALL
    )
    assert result.exit_code == 0, result.output
    assert "3 sequences of 12 tokens, dense loss" in result.stdout
    heads, neurons = result.stdout.split("8 neurons; without one")
    for table in (heads, neurons):
        assert "plainact" in table
        assert "random" in table
    assert neurons.count("jacov") == 1
    row = next(line.split() for line in neurons.splitlines() if line.startswith("jacov"))
    assert row[1:] == ["-"] * (len(row) - 1)


def test_json_has_every_correlation_and_what_it_was_measured_on(
    shadowc: Shadowc, tiny_checkpoint: Path, text: Path
) -> None:
    arguments = ("criteria", "--model", tiny_checkpoint, "--data", text, "--criterion", "plainact", "--json", *SMALL)
    first, again = (json.loads(shadowc(*arguments).stdout) for _ in range(2))
    assert first == again
    assert len(first["text_sha256"]) == len(first["identity"]) == 64
    assert first["agreement"]["seed"] == 0
    ranks = first["agreement"]["rows"][0]["ranks"]
    assert len(ranks) == 18
    assert all(-1 <= one["low"] <= one["mean"] <= one["high"] <= 1 for one in ranks.values())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("criteria", "--criterion", "magic"), "known are activation, epenas"),
        (("criteria", "--data", "a.txt"), "--data needs a model"),
        (("criteria", "--model", "opt-mini"), "--data text.txt"),
        (("criteria", "--model", "opt-mini", "--data", "no.txt"), "there is no file no.txt"),
    ],
)
def test_what_cannot_be_measured_is_refused(shadowc: Shadowc, arguments: tuple[str, ...], says: str) -> None:
    result = shadowc(*arguments)
    assert result.exit_code == INPUT
    assert says in result.stderr


@pytest.mark.parametrize("command", ["train", "compile"])
def test_a_criterion_that_cannot_train_is_refused_before_any_work(
    shadowc: Shadowc, tmp_path: Path, command: str
) -> None:
    result = shadowc(command, "--model", "opt-mini", "--criterion", "nwot", "--out", tmp_path / "o")
    assert result.exit_code == INPUT
    assert "criteria that train one: activation, fisher" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_ranking_is_collected_and_kept_as_a_control(
    shadowc: Shadowc, tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    ranking, model = tmp_path / "r", ("--model", tiny_checkpoint, "--positions", "32", "--data", text)
    result = shadowc("collect", *model, "--length", "16", "--criterion", "magnitude", "--out", ranking)
    assert result.exit_code == 0, result.output
    assert "no predictor can learn it" in result.stdout
    assert f"--ranking {ranking}" in result.stdout
    refused = shadowc("train", "--trace", ranking, "--out", tmp_path / "p")
    assert refused.exit_code == INPUT
    assert "criterion magnitude gives one ranking" in refused.stderr
    trace = tmp_path / "t"
    result = shadowc("collect", *model, "--length", "16", "--out", trace)
    assert "exact zeros  0.0 % of heads, " in result.stdout
    trained = shadowc(
        "train", "--trace", trace, "--ranking", ranking, "--epochs", "1", "--neuron-block", "4", "--out", tmp_path / "p"
    )
    assert trained.exit_code == 0, trained.output
    assert "static-magnitude" in trained.stdout


def test_a_text_that_is_too_short_is_refused_with_flags_that_criteria_has(
    shadowc: Shadowc, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("a few words", encoding="utf-8")
    result = shadowc("criteria", "--model", tiny_checkpoint, "--data", tmp_path / "short.txt")
    assert result.exit_code == INPUT
    assert "is too short: 16 sequences of 64 tokens" in result.stderr
    assert result.stderr.splitlines()[-1] == ("next: give a longer text, or fewer --sequences or a smaller --length")
