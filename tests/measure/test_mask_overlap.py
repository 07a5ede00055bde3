# SPDX-License-Identifier: Apache-2.0
"""An engine chooses the units that torch chooses, and one with other scores is found out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import shadowc
from benchmarks import engines
from shadowc.eval.engine_model import EngineModel
from shadowc.eval.texts import corpus_of
from shadowc.eval.torch_model import TorchModel
from shadowc.measure.mask_overlap import OverlapReport, overlap
from shadowc.runtime.engine import Engine
from shadowc.runtime.load import load_cpu
from shadowc.sparsity.networks import Network
from shadowc.sparsity.predictor import Predictor
from shadowc.sparsity.reference import MaskedModel
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, VerificationError
from tests.e2e.compiled import options
from tests.eval.conftest import PROSE, engine_folders, fresh_torch, in_torch, predictor_folder

__all__ = ["engine_folders", "fresh_torch", "in_torch", "predictor_folder"]

HALF = Density(0.5, 0.25)


@pytest.fixture(scope="module")
def engine(engine_folders: dict[str, Path]) -> Engine:
    return load_cpu(engine_folders["token"], exact_prompts=True)


def predictor_of(model: TorchModel) -> Predictor:
    assert model._predictor is not None
    return model._predictor


def compared(engine: Engine, model: TorchModel, predictor: Predictor, *densities: Density) -> OverlapReport:
    corpus = corpus_of(EngineModel(engine), "prose", [f"{n} {PROSE}" for n in range(4)], "0", 24)
    return overlap(engine, MaskedModel(model._model, predictor.plan(None), predictor), corpus, densities)


def test_engine_and_torch_choose_the_same_units_and_lose_the_same_bits(engine: Engine, in_torch: TorchModel) -> None:
    report = compared(engine, in_torch, predictor_of(in_torch), HALF, Density(1.0, 0.3), Density())
    report.require()
    half, neurons, dense = report.rows
    for row in report.rows:
        assert row.heads.shared == row.heads.alike == pytest.approx(1.0, abs=1e-3)
        assert row.engine == pytest.approx(row.torch, rel=1e-5)
        assert abs(row.above.value) < 1e-4
    assert half.neurons.shared == pytest.approx(1.0, abs=1e-3)
    assert dense.neurons.tokens_alike == 1.0
    assert len({round(row.engine, 4) for row in (half, neurons, dense)}) == 3
    assert half.masked == report.tokens - 4 * len(_windows(report))  # the start token of a window is dense


def test_a_last_piece_of_one_token_is_dense_in_both(engine: Engine, in_torch: TorchModel) -> None:
    model, predictor = EngineModel(engine), predictor_of(in_torch)
    tokens = corpus_of(model, "prose", [PROSE], "0", 24).tokens
    window = next(size + 1 for size in range(8, tokens) if tokens % size == 1)
    corpus = corpus_of(model, "prose", [PROSE], "0", window)
    assert min(len(item.requests[0].inputs) for item in corpus.items) == 1
    (row,) = overlap(engine, MaskedModel(in_torch._model, predictor.plan(None), predictor), corpus, [HALF]).rows
    assert row.engine == pytest.approx(row.torch, rel=1e-5)
    assert row.masked == tokens - len(corpus.items)


def _windows(report: OverlapReport) -> range:
    """Windows of one of the four documents: each has a start token that is fed and not scored."""
    return range(-(-(report.tokens // 4) // (report.window - 1)))


def test_another_predictors_weights_in_the_engine_are_found(engine: Engine, in_torch: TorchModel) -> None:
    known = predictor_of(in_torch)
    other = Predictor.dummy(in_torch._checkpoint.facts, known.block, 32, seed=1)
    other = replace(other, orders_LF=known.orders_LF)
    report = compared(engine, in_torch, other, HALF)
    assert report.rows[0].neurons.shared < 0.5
    with pytest.raises(VerificationError, match="does not choose the units that torch chooses") as caught:
        report.require()
    assert (
        "of the neurons that either computes are computed by both, expected at least 99.9%" in caught.value.problems[1]
    )


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_scores_of_one_layer_moved_by_one_unit_are_found(engine: Engine, in_torch: TorchModel, kind: str) -> None:
    known = predictor_of(in_torch)
    network = getattr(known, kind)
    assert isinstance(network, Network)
    units = network.outputs // known.layers
    rows = np.arange(network.outputs)
    rows[:units] = np.roll(rows[:units], 1)
    moved = replace(network, fc2_weight_OP=network.fc2_weight_OP[rows], fc2_bias_O=network.fc2_bias_O[rows])
    planted = replace(known, heads=moved) if kind == "heads" else replace(known, neurons=moved)
    with pytest.raises(VerificationError, match="does not choose"):
        compared(engine, in_torch, planted, HALF).require()


def test_other_units_and_masks_of_a_sequence_are_refused(
    engine: Engine, engine_folders: dict[str, Path], in_torch: TorchModel
) -> None:
    facts = in_torch._checkpoint.facts
    with pytest.raises(InputError, match="blocks of 16 neurons, the predictor has style shadow with blocks of 8"):
        compared(engine, in_torch, Predictor.dummy(facts, 8, 32), HALF)
    held = load_cpu(engine_folders["sequence"], exact_prompts=True)
    with pytest.raises(InputError, match="makes a mask for every token"):
        compared(held, in_torch, predictor_of(in_torch), HALF)


def test_the_benchmark_compiles_compares_and_fails_with_an_engine_of_another_predictor(
    tiny_checkpoint: Path,
    predictor_folder: Path,
    in_torch: TorchModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "test.jsonl"
    text.write_text("".join(f'{{"text": "{n} {PROSE.strip()}"}}\n' for n in range(3)))
    asked = ["--model", str(tiny_checkpoint), "--predictor", str(predictor_folder), "--densities", "0.5/0.25"]
    asked += ["--text", str(text), "--window", "16", "--limit", "4", "--out", str(tmp_path / "out")]
    assert engines.main([*asked, "--weights", "fp32,int8"]) == 0
    table = (tmp_path / "out" / "engines.csv").read_text().splitlines()
    assert len(table) == 3
    assert engines.digest(predictor_folder) in table[1]

    known = predictor_of(in_torch)
    other = Predictor.dummy(in_torch._checkpoint.facts, known.block, 32, seed=1)
    other.save(tmp_path / "other")

    def planted(wanted: shadowc.CompileOptions) -> Path:
        assert wanted.out is not None
        return shadowc.compiler.compile(options(tiny_checkpoint, wanted.out, predictor=str(tmp_path / "other")))

    monkeypatch.setattr(shadowc, "compile", planted)
    assert engines.main([*asked, "--weights", "fp32"]) == 1
    assert f"{predictor_folder.name} fp32: the fp32 engine does not choose the units" in capsys.readouterr().err
