# SPDX-License-Identifier: Apache-2.0
"""What bench and eval report is what the kernels counted and what torch computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import shadowc
from shadowc.measure.bench import bench
from shadowc.measure.evaluate import evaluate
from shadowc.spec.density import Density

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


def test_every_method_keeps_the_share_that_was_asked_for(sparse_engine: Path) -> None:
    report = evaluate(shadowc.load(sparse_engine), TEXT, densities=[Density(0.5, 0.25)], window=32)
    assert [row.method for row in report.rows] == ["predictor", "static", "normalised", "random"]
    for row in report.rows:
        assert row.active_heads == pytest.approx(0.5, abs=0.02)
        assert row.active_neurons == pytest.approx(0.25, abs=0.02)
    by_method = {row.method: row.bits_per_byte for row in report.rows}
    assert by_method["predictor"] != by_method["static"] != by_method["random"]


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
