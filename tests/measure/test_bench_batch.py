# SPDX-License-Identifier: Apache-2.0
"""`bench --batch`: rows that are decoded at once; times and bytes per token are those of a step over its rows."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from shadowc.cli.app import app
from shadowc.measure import bench as bench_module
from shadowc.measure import rounds, shares, turns
from shadowc.measure.bench import bench
from shadowc.measure.rounds import CONTEXT_TOKENS, prompt_ids
from shadowc.measure.turns import Text, tokens_generated
from shadowc.runtime.load import load_cpu, read_manifest
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError

KEPT = Density(0.5, 0.5)
ROWS, TOKENS = 3, 5


@pytest.mark.parametrize("engine", ["sparse_engine", "sequence_engine"])
def test_rows_at_once_have_the_bytes_of_generate_with_as_many_prompts(
    engine: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(engine)
    report = bench(folder, densities=[KEPT], rounds=1, tokens=TOKENS, batch=ROWS, skip_zeros=False, threads=1)
    loaded = load_cpu(folder, threads=1, skip_zeros=False)
    ids, new = prompt_ids(loaded.manifest, CONTEXT_TOKENS, ROWS), tokens_generated(TOKENS)
    loaded.generate(ids, new, new, KEPT)
    assert report.rows[-1].megabytes_per_token == pytest.approx(loaded.last_stats.bytes_read / 1e6)
    assert report.batch == ROWS
    one = bench(folder, densities=[KEPT], rounds=1, tokens=TOKENS, skip_zeros=False, threads=1)
    for row, alone in zip(report.rows, one.rows, strict=True):
        assert row.megabytes_per_token < alone.megabytes_per_token  # one read serves all rows


def test_rows_have_prompts_of_their_own(sparse_engine: Path) -> None:
    ids = prompt_ids(read_manifest(sparse_engine), CONTEXT_TOKENS, ROWS)
    assert len(np.unique(ids, axis=0)) == ROWS


def test_a_token_of_several_rows_takes_a_step_over_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 8.0)
    monkeypatch.setattr(turns, "perf_counter", lambda: next(clock))

    def generate(prompt: Any, most: int, _least: int, _density: Any, stream: Any, **_: Any) -> None:
        for _token in range(most):
            stream(prompt[:, 0])

    engine: Any = SimpleNamespace(generate=generate, last_stats=SimpleNamespace(bytes_read=1.0))
    for rows in (1, 4):
        text = Text(engine, np.zeros((rows, 2), np.int64), KEPT, [2])
        text.go_on()
        assert text.seconds == [8.0 / rows] * 2


def test_the_prompts_of_all_rows_are_counted(sparse_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_read", lambda _, prompt: (3.0, float(prompt.shape[0])))
    report = bench(sparse_engine, densities=[KEPT], rounds=1, tokens=1, prompt_tokens=10, batch=ROWS, skip_zeros=False)
    assert [(row.first_token_ms, row.tokens_per_second) for row in report.prompts] == [(3000.0, 10.0)] * 2


@pytest.mark.parametrize("batch", [64, 65, 300])
def test_prompts_of_many_rows_are_one_run_of_the_profiled_graph(sparse_engine: Path, batch: int) -> None:
    found = bench(sparse_engine, densities=[KEPT], rounds=1, tokens=1, batch=batch, skip_zeros=False)
    assert all(row.shares is not None for row in found.rows)


def test_profiled_time_is_of_a_token_and_not_of_a_step(sparse_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    right = shares.by_generation

    def watched(*given: Any) -> Any:
        for one in right(*given):
            seen.append(one.ms_per_token)
            yield one

    monkeypatch.setattr(shares, "by_generation", watched)
    report = bench(sparse_engine, densities=[KEPT], rounds=1, tokens=1, batch=ROWS, skip_zeros=False)
    assert [row.shares.ms_per_token for row in report.rows if row.shares] == pytest.approx([ms / ROWS for ms in seen])


@pytest.mark.parametrize(("batch", "most", "expected"), [(0, None, "1 or more"), (5, 4, "1 to 4, as the engine was")])
def test_rows_that_an_engine_does_not_take_are_refused(
    sparse_engine: Path, batch: int, most: int | None, expected: str
) -> None:
    manifest = read_manifest(sparse_engine)
    if most is not None:
        part: Any = SimpleNamespace(max_batch=most, max_context=64)
        manifest = manifest.model_copy(update={"tensorrt": part})
    with pytest.raises(InputError, match=f"batch is {batch}, expected {expected}"):
        bench_module._check_batch(batch, manifest)


def test_tokens_are_timed_behind_as_many_as_are_asked_for(sparse_engine: Path) -> None:
    quick: dict[str, Any] = {"densities": [KEPT], "rounds": 1, "tokens": TOKENS, "skip_zeros": False, "threads": 1}
    report = bench(sparse_engine, context_tokens=40, **quick)
    loaded = load_cpu(sparse_engine, threads=1, skip_zeros=False)
    new = tokens_generated(TOKENS)
    loaded.generate(prompt_ids(loaded.manifest, 40), new, new, KEPT)
    assert report.context_tokens == 40
    assert report.rows[-1].megabytes_per_token == pytest.approx(loaded.last_stats.bytes_read / 1e6)


@pytest.mark.parametrize(
    ("context", "said", "hint"),
    [(0, "context_tokens is 0", "for example 16"), (60, "has room for 2", "--tokens 2"), (63, "for 0", "fewer tokens")],
)
def test_a_context_that_leaves_no_room_is_refused(sparse_engine: Path, context: int, said: str, hint: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        bench(sparse_engine, densities=[KEPT], tokens=TOKENS, context_tokens=context)
    assert hint in str(caught.value.hint)


def test_the_command_says_how_many_rows_there_were(sparse_engine: Path) -> None:
    arguments = ["bench", str(sparse_engine), "--densities", "0.5", "--rounds", "1", "--tokens", "2", "--no-skip-zeros"]
    shown = CliRunner().invoke(app, [*arguments, "--batch", "2"]).stdout
    assert "median of 1 rounds of 2 tokens in each of 2 rows at once" in shown
    assert "2 prompts of 33 tokens" in shown
    assert json.loads(CliRunner().invoke(app, [*arguments, "--batch", "2", "--json"]).stdout)["batch"] == 2
