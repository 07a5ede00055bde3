# SPDX-License-Identifier: Apache-2.0
"""The exact control: the share of zeros that is asked for is there, and is what the kernels' bytes say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import decoding
from benchmarks.decoding import DENSE, ZEROS, Round, one_round
from benchmarks.exact.__main__ import make_lowered, settings_of
from benchmarks.exact.shifted import Lowered, lower
from benchmarks.exact.table import markdown, zeros_counted
from benchmarks.rounds import Asked, Ledger
from shadowc.checkpoint.dummy import DummyWeights
from shadowc.checkpoint.opt import OptFacts, config_dict, layer_names
from shadowc.runtime.load import read_manifest
from tests.benchmarks.samples import sample
from tests.conftest import TINY
from tests.e2e.conftest import sparse_engine, stage_cache

__all__ = ["sparse_engine", "stage_cache"]

FACTS = OptFacts.from_config({"model_type": "opt", **TINY}, "opt-tiny")
SAMPLED = 0.02
"""Share of zeros on other tokens than those of the measure: 4 layers of 256 neurons over 64 tokens."""
COUNTED = 1e-6


def zeros_in_torch(weights: Lowered, facts: OptFacts) -> list[float]:
    """Share of ReLU outputs at zero by layer, in the whole model, on tokens that `lower` did not see."""
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(OPTConfig(**config_dict(facts))).eval()
    model.load_state_dict({name: torch.from_numpy(weights.tensor(name).copy()) for name in weights.names()})
    shares: list[float] = []
    for layer in model.model.decoder.layers:
        layer.fc1.register_forward_hook(lambda _, __, u: shares.append(float((u <= 0).float().mean())))
    ids = np.random.default_rng(99).integers(4, facts.vocab, (2, 32))
    with torch.no_grad():
        model(torch.from_numpy(ids))
    return shares


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95])
def test_every_layer_reaches_its_share_of_zeros_on_other_tokens(share: float) -> None:
    found = zeros_in_torch(lower(FACTS, DummyWeights(FACTS, 0), share), FACTS)
    assert len(found) == FACTS.layers
    assert found == pytest.approx([share] * FACTS.layers, abs=SAMPLED)


def test_only_biases_of_fc1_are_lowered() -> None:
    weights = DummyWeights(FACTS, 0)
    lowered = lower(FACTS, weights, 0.9)
    biases = {layer_names(layer).fc1.bias for layer in range(FACTS.layers)}
    assert set(lowered.by_name) == biases
    for name in weights.names():
        changed = not np.array_equal(weights.tensor(name), lowered.tensor(name))
        assert changed == (name in biases)


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, float("nan")])
def test_a_share_that_cannot_be_reached_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="expected a share above 0 and below 1"):
        lower(FACTS, DummyWeights(FACTS, 0), share)


def test_settings_are_dense_and_masked_without_and_with_zeros_skipped() -> None:
    assert settings_of("0.5/0.2") == ("dense", "dense+zeros", "0.5/0.2", "0.5/0.2+zeros")
    with pytest.raises(ValueError, match="HEADS/NEURONS"):
        settings_of("half")


@pytest.fixture(scope="module")
def lowered_engine(tmp_path_factory: pytest.TempPathFactory, stage_cache: Path) -> Path:
    parent = tmp_path_factory.mktemp("lowered")
    model = parent / "opt-tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "opt", **TINY}))
    make_lowered(str(model), 0.9, "int8", parent / "tiny.engine")
    return parent / "tiny.engine"


def test_an_engine_of_lowered_weights_has_their_zeros_by_the_bytes_of_its_kernels(
    lowered_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "STREAM_BYTES", 1 << 20)
    found = one_round(lowered_engine, [DENSE, DENSE + ZEROS], turn=0, tokens=32, threads=1).samples
    counted = zeros_counted(read_manifest(lowered_engine), found[DENSE].size, found[DENSE + ZEROS].size)
    assert counted == pytest.approx(0.9, abs=2 * SAMPLED)  # one sequence that repeats itself
    assert [path.name for path in lowered_engine.parent.iterdir() if "checkpoint" in path.name] == []


def test_zeros_follow_from_bytes(sparse_engine: Path) -> None:
    manifest = read_manifest(sparse_engine)
    fixed, model = manifest.bytes_per_token, manifest.model
    dense = fixed.records + fixed.lm_head + fixed.other
    half_of_fc2 = model.layers * model.ffn * (model.hidden + 1) * 4 / 2  # rows of floats, each with its factor
    assert zeros_counted(manifest, dense, dense - half_of_fc2) == pytest.approx(0.5, abs=COUNTED)
    assert zeros_counted(manifest, dense, dense) == 0.0


def test_the_table_has_a_row_per_setting_with_its_speed_over_its_own_twin(sparse_engine: Path, tmp_path: Path) -> None:
    manifest = read_manifest(sparse_engine)
    fixed = manifest.bytes_per_token
    dense = float(fixed.records + fixed.lm_head + fixed.other)
    settings = settings_of("0.5/0.5")
    ledger = Ledger(tmp_path / "x.json", Asked("fp32", "token", settings, 4, 1))
    times = dict(zip(settings, (10.0, 8.0, 5.0, 4.0), strict=True))
    ledger.add("opt-x", Round(20e9, 1.0, {name: sample(ms, dense) for name, ms in times.items()}))
    rows = [line.split(" | ") for line in markdown([("opt-x", manifest)], ledger).splitlines() if "| opt-x" in line]
    assert [(row[2], row[3], row[7]) for row in rows] == [
        ("dense twin", "no", "1.00x"),
        ("dense twin", "yes", "1.25x"),
        ("0.5/0.5", "no", "2.00x"),
        ("0.5/0.5", "yes", "2.50x"),
    ]
