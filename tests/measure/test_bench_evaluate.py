# SPDX-License-Identifier: Apache-2.0
"""What bench and eval report is what the kernels counted and what torch computes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import shadowc
from shadowc.cli.app import app
from shadowc.measure import evaluate as evaluation
from shadowc.measure.bench import bench
from shadowc.measure.evaluate import evaluate
from shadowc.runtime.load import load_cpu
from shadowc.spec.density import Density
from shadowc.spec.errors import UnsupportedError

TEXT = "One neuron is one record, and a record that is not read costs nothing. " * 6


def test_dense_bits_equal_torchs_cross_entropy(sparse_engine: Path, tiny_model: object) -> None:
    import torch

    engine = shadowc.load(sparse_engine)
    report = evaluate(engine, TEXT, densities=[], window=32)
    ids = engine.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    nats = 0.0
    for at in range(0, len(ids), 31):
        window = torch.tensor([[2, *ids[at : at + 31]]])
        with torch.no_grad():
            logits = tiny_model(window).logits[0, :-1]  # type: ignore[operator]
        nats += float(torch.nn.functional.cross_entropy(logits.double(), window[0, 1:], reduction="sum"))
    assert report.dense == pytest.approx(nats / np.log(2) / len(TEXT.encode()), rel=1e-5)
    assert report.tokens == len(ids)


def test_bits_are_the_same_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(size=(70, 40)).astype(np.float32) * 20, rng.integers(0, 40, 70)
    wide = logits.astype(np.float64)
    wanted = -np.log2(np.exp(wide)[np.arange(70), ids] / np.exp(wide).sum(axis=1)).sum()
    for rows in (1, 64, 70, 1000):
        monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", rows)
        assert evaluation._bits(logits, ids) == pytest.approx(wanted, rel=1e-12)


def test_eval_counts_the_bytes_of_the_file_when_lines_end_in_crlf(sparse_engine: Path, tmp_path: Path) -> None:
    content = TEXT.replace(". ", ".\r\n").encode()
    (tmp_path / "text.txt").write_bytes(content)
    arguments = ["eval", str(sparse_engine), "--text", str(tmp_path / "text.txt")]
    result = CliRunner().invoke(app, [*arguments, "--densities", "1", "--methods", "predictor", "--json"])
    found = json.loads(result.stdout)
    assert found["text_bytes"] == len(content)
    assert found["text_sha256"] == hashlib.sha256(content).hexdigest()


def test_every_method_keeps_the_share_that_was_asked_for(sparse_engine: Path) -> None:
    report = evaluate(shadowc.load(sparse_engine), TEXT, densities=[Density(0.5, 0.25)], window=32)
    assert [row.method for row in report.rows] == ["predictor", "static", "normalised", "random"]
    for row in report.rows:
        assert row.active_heads == pytest.approx(0.5, abs=0.02)
        assert row.active_neurons == pytest.approx(0.25, abs=0.02)
    by_method = {row.method: row.bits_per_byte for row in report.rows}
    assert by_method["predictor"] != by_method["static"] != by_method["random"]


def test_eval_measures_all_controls_under_one_mask_per_sequence(sequence_engine: Path) -> None:
    report = evaluate(load_cpu(sequence_engine), TEXT, densities=[Density(0.5, 0.25)], window=32)
    assert [row.method for row in report.rows] == ["predictor", "static", "normalised", "random"]
    assert len({row.bits_per_byte for row in report.rows}) == 4
    assert all(row.active_heads == pytest.approx(0.5, abs=0.02) for row in report.rows)


def test_eval_under_one_mask_is_refused_by_an_engine_of_masks_per_token(sparse_engine: Path) -> None:
    with pytest.raises(UnsupportedError, match="mask for every token") as caught:
        evaluate(shadowc.load(sparse_engine), TEXT, densities=[], protocol="prompt")
    assert "--mask sequence" in (caught.value.hint or "")


def test_bench_has_rows_for_a_mask_per_sequence_beside_those_per_token(sequence_engine: Path) -> None:
    report = bench(sequence_engine, densities=[Density(0.5, 0.5)], rounds=1, tokens=4)
    size = {row.label: row.megabytes_per_token for row in report.rows}
    assert list(size) == [
        "dense twin",
        "dense twin, skip zeros",
        "0.5 heads, 0.5 neurons",
        "0.5 heads, 0.5 neurons, skip zeros",
        "0.5 heads, 0.5 neurons, a mask per sequence",
        "0.5 heads, 0.5 neurons, a mask per sequence, skip zeros",
    ]
    assert size["0.5 heads, 0.5 neurons, a mask per sequence"] < size["0.5 heads, 0.5 neurons"]


def test_bench_counts_fewer_bytes_at_lower_density_and_with_skipped_zeros(sparse_engine: Path) -> None:
    report = bench(sparse_engine, densities=[Density(0.5, 0.5)], rounds=1, tokens=4)
    assert [row.label for row in report.rows] == [
        "dense twin",
        "dense twin, skip zeros",
        "0.5 heads, 0.5 neurons",
        "0.5 heads, 0.5 neurons, skip zeros",
    ]
    dense, dense_skip, half, half_skip = (row.megabytes_per_token for row in report.rows)
    assert dense > dense_skip > half_skip
    assert dense > half > half_skip
    assert report.rows[0].speedup == 1
    assert report.stream_gigabytes_per_second > 0
