# SPDX-License-Identifier: Apache-2.0
"""Puts the opt-mini example on the path and makes a tiny run that several tests look at."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "opt_mini"))

import opt_model
import train

TINY = opt_model.Shape(layers=2, hidden=32, heads=2, neurons=64, vocab=400, positions=32)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred small made-up stories in one file."""
    rng = random.Random(7)
    names, verbs = ["Ann", "Ben", "Cleo", "Dora", "Emil"], ["saw", "found", "liked", "lost", "drew"]
    things = ["a red boat", "the old clock", "her map", "a small fish", "the long road", "his lamp"]
    stories = [
        " ".join(f"{rng.choice(names)} {rng.choice(verbs)} {rng.choice(things)}." for _ in range(rng.randint(4, 20)))
        for _ in range(200)
    ]
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> train.Options:
    """The options of a finished run of twelve steps on a tiny model."""
    out = tmp_path_factory.mktemp("run")
    options = train.Options(
        (text_file,), out, steps=12, shape=TINY, window=32, compile=False, evaluate_every=5, threads=1
    )
    assert train.train(options)
    return options
