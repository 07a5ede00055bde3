# SPDX-License-Identifier: Apache-2.0
"""Counts of many runs: kept for a while, then added up; whoever overwrites what was counted changes nothing.

Letters: B rows, Z masked tokens, L predicted layers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shadowc.runtime.load import read_manifest
from shadowc.runtime.stats import _MOST_KEPT, Meter


@pytest.fixture
def meter(folders: dict[str, Path]) -> Meter:
    return Meter(read_manifest(folders["fp32"]))


def test_runs_are_counted_once_however_many_there_are(meter: Meter) -> None:
    layers, runs = meter.manifest.model.layers, 2 * _MOST_KEPT + 1
    outputs = {
        "active.heads": np.zeros((2, 1, layers - 1), np.int32),
        "active.neurons": np.zeros((2, 1, layers - 1), np.int32),
        "read": np.zeros((layers, 2, 2), np.int64),
        "logits": np.zeros((2, 1, 8), np.float32),
    }
    live_B = np.ones(2, np.bool_)
    tokens = heads = size = 0
    for run in range(runs):
        outputs["active.heads"][:] = [[[run % 3]], [[1]]]
        outputs["active.neurons"][:] = run
        outputs["read"][:, :, 1] = run + 1
        live_B[1] = run < 100
        meter.add(outputs, live_B[:, None], predictions=int(run % 2 == 0))
        tokens += 1 + (run < 100)
        heads += run % 3 + (run < 100)
        size += (run + 1) * 2 * layers
    for _ in range(2):  # asking changes nothing
        stats = meter.stats()
        assert stats.tokens == tokens
        assert stats.heads_by_layer[1:].tolist() == pytest.approx([heads / tokens] * (layers - 1))
        assert stats.bytes_read_kernels == pytest.approx(size / tokens)
    assert (meter.calls, meter.predictions) == (runs, _MOST_KEPT + 1)


def test_without_counters_bytes_are_unknown_and_units_are_all_there_are(meter: Meter) -> None:
    meter.add({"logits": np.zeros((1, 1, 8), np.float32)}, np.ones((1, 1), np.bool_))
    stats = meter.stats()
    assert np.isnan(stats.bytes_read)
    assert stats.active_head_share == 1
