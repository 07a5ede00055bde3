# SPDX-License-Identifier: Apache-2.0
"""Commands on a Llama-type model: those of the torch side work, those of engines refuse it and say what works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Shadowc

UNSUPPORTED = 3


def test_collect_and_train_work_and_train_shows_recall(
    shadowc: Shadowc, llama_folder: Path, quick: tuple[str, ...], tmp_path: Path
) -> None:
    trace, predictor = tmp_path / "t", tmp_path / "p"
    collected = shadowc("collect", "--model", llama_folder, "--out", trace, *quick, "--json")
    assert collected.exit_code == 0, collected.output
    assert json.loads(collected.stdout)["facts"]["kv_heads"] == 2
    trained = shadowc("train", "--trace", trace, "--out", predictor, "--epochs", 2)
    assert trained.exit_code == 0, trained.output
    assert "recall per layer: neurons" in trained.stdout
    assert f"next: shadowc eval --model {llama_folder} --predictor {predictor}" in trained.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    "command",
    [
        ("compile", "--model", "MODEL", "--out", "OUT"),
        ("run", "MODEL", "a text"),
        ("bench", "MODEL"),
        ("inspect", "MODEL"),
        ("verify", "MODEL"),
        ("bisect", "MODEL"),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_engine_commands_refuse_it_and_say_what_works(
    shadowc: Shadowc, llama_folder: Path, tmp_path: Path, command: tuple[str, ...], kind: str
) -> None:
    model, out = llama_folder, tmp_path / "e"
    if kind == "gguf":
        model = tmp_path / "m.gguf"
        model.write_bytes(b"GGUF")
    result = shadowc(*({"MODEL": model, "OUT": out}.get(part, part) for part in command))
    assert result.exit_code == UNSUPPORTED, result.output
    assert "collect, train (which shows recall), eval" in result.stderr
    assert f"next: shadowc train --model {model}" in result.stderr
    assert not out.exists()
