# SPDX-License-Identifier: Apache-2.0
"""`--select calibrated` from the checkpoint to figures: the gate, the same numbers as torch, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import shadowc
from shadowc.cli import inspect
from shadowc.eval.load import engine_model, torch_model
from shadowc.eval.run import evaluate, settings_of
from shadowc.eval.texts import corpus_of
from shadowc.measure.against import verify_against
from shadowc.runtime.load import read_manifest
from shadowc.sparsity.importance import Origin
from shadowc.sparsity.predictor import Predictor, PredictorSource
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, ShadowcError, UnsupportedError, VerificationError
from shadowc.spec.options import TrainOptions
from tests.e2e import compiled
from tests.eval.conftest import PROSE, predictor_folder  # noqa: F401 - a fixture

DEJAVU = TrainOptions(style="dejavu", neuron_block=16, width=32, epochs=2, batch=32)


@pytest.fixture(scope="module")
def trained_folder(predictor_folder: Path) -> Path:  # noqa: F811
    """With thresholds. Read only."""
    return predictor_folder.parent / "trained.predictor"


@pytest.fixture(scope="module")
def engine_folder(tiny_checkpoint: Path, trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32, one threshold for all layers. Read only."""
    out = tmp_path_factory.mktemp("select") / "tiny.engine"
    return shadowc.compile(compiled.options(tiny_checkpoint, out, predictor=str(trained_folder), select="calibrated"))


def test_engine_says_how_it_selects(engine_folder: Path) -> None:
    manifest = read_manifest(engine_folder)
    assert manifest.sparsity is not None
    assert (manifest.sparsity.select, manifest.sparsity.scope) == ("calibrated", "global")
    assert manifest.parity["selection"] == 0
    assert "calibrated thresholds, one for all layers" in inspect.sparsity_facts(manifest)["sparsity"]
    assert "of neurons" in inspect.sparsity_facts(manifest)["density met"]


def test_engine_and_torch_give_the_same_figures_and_tell_what_was_met(
    engine_folder: Path, tiny_checkpoint: Path, trained_folder: Path
) -> None:
    ours, theirs = torch_model(Origin(str(tiny_checkpoint), "auto", 0), trained_folder), engine_model(engine_folder)
    assert theirs.methods == ("calibrated",)
    assert "calibrated" in ours.references
    settings = settings_of(("calibrated",), [Density(0.5, 0.25)], ["decode"])
    found = [
        evaluate(model, [corpus_of(model, "prose", [PROSE * 2], "0", 32)], settings).rows[1] for model in (ours, theirs)
    ]
    assert found[0].metrics[0].value == pytest.approx(found[1].metrics[0].value, rel=1e-5)
    assert found[0].active_heads == pytest.approx(found[1].active_heads)
    assert found[0].active_neurons == pytest.approx(found[1].active_neurons)
    assert found[0].sparsity == pytest.approx(found[1].sparsity, abs=0.03)  # a table's row, biases
    assert 0 < found[0].active_neurons < 1


def test_engine_agrees_with_its_checkpoint_alone(engine_folder: Path, tiny_checkpoint: Path) -> None:
    report = verify_against(engine_folder, str(tiny_checkpoint), prompts=2, tokens=12)
    report.require()
    assert report.parity.selection == 0
    assert [(run.scope, run.density.heads) for run in report.runs] == [
        ("global", 1.0),
        ("global", 0.5),
        ("global", 0.2),
    ]


@pytest.mark.parametrize("changes", [{"train": DEJAVU}, {"select": "sensitivity", "weights": "int8"}])
def test_other_styles_budgets_and_weights_pass_the_gate(
    tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    folder = shadowc.compile(
        compiled.options(tiny_checkpoint, tmp_path / "x.engine", **{"select": "calibrated", **changes})
    )
    sparsity = read_manifest(folder).sparsity
    assert sparsity is not None
    assert sparsity.scope == ("local" if sparsity.select == "sensitivity" else "global")
    engine = shadowc.load(folder)
    trace = engine.trace(np.array([[2, 40, 50, 60, 70, 80]], np.int64), 0.5)
    assert trace.active["neurons"].shape[-1] == 3


def test_thresholds_of_another_density_leave_no_engine(
    tiny_checkpoint: Path, trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted defect: the engine gets the table one row off."""
    sound = Predictor.as_source

    def shifted(predictor: Predictor) -> PredictorSource:
        source = sound(predictor)
        tables = [name for name in source.names() if "threshold." in name]
        return PredictorSource(
            {**source._tensors, **{name: np.roll(source.tensor(name), 1, axis=0) for name in tables}}
        )

    monkeypatch.setattr(Predictor, "as_source", shifted)
    with pytest.raises(VerificationError) as found:
        shadowc.compile(
            compiled.options(tiny_checkpoint, tmp_path / "x.engine", predictor=str(trained_folder), select="calibrated")
        )
    assert "thresholds do not follow from scores and density" in " ".join(found.value.problems)
    assert not (tmp_path / "x.engine").exists()


def test_what_belongs_to_a_ranking_is_refused(engine_folder: Path) -> None:
    engine = shadowc.load(engine_folder)
    ids = np.array([[2, 40, 50]], np.int64)
    with pytest.raises(UnsupportedError, match="compiled with --select calibrated"):
        engine.logits(ids, 0.5, scores=lambda tokens: (np.zeros((1, tokens, 3, 4)), np.zeros((1, tokens, 3, 16))))
    with pytest.raises(UnsupportedError, match="cannot take another scope"):
        engine.with_scope("local")
    model = engine_model(engine_folder)
    corpus = corpus_of(model, "prose", [PROSE], "0", 32)
    with pytest.raises(UnsupportedError, match="has masks of method calibrated"):
        evaluate(model, [corpus], settings_of(("static",), [Density(0.5, 0.5)], ["decode"]))


@pytest.mark.parametrize("protocol", ["prompt", "paper"])
def test_one_mask_for_many_tokens_meets_no_mean(tiny_checkpoint: Path, trained_folder: Path, protocol: str) -> None:
    model = torch_model(Origin(str(tiny_checkpoint), "auto", 0), trained_folder)
    with pytest.raises(UnsupportedError, match=f"under protocol '{protocol}' one token makes the mask of many"):
        model.check(*settings_of(("calibrated",), [Density(0.5, 0.5)], [protocol]))  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": "sequence"}, UnsupportedError, "meets a density in the mean over tokens"),
        # Where TensorRT is not installed there are two problems, told together as one InputError.
        ({"target": "tensorrt-rtx", "weights": "fp16"}, ShadowcError, "--select calibrated is for target cpu"),
        ({"select": "sensitivity", "scope": "global"}, InputError, "a share of its own"),
    ],
)
def test_what_thresholds_cannot_do_is_refused_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        shadowc.compile(compiled.options(tiny_checkpoint, tmp_path / "x.engine", **{"select": "calibrated", **changes}))


def test_a_random_predictor_has_no_thresholds(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = compiled.options(tiny_checkpoint, tmp_path / "x.engine", select="calibrated", load_format="dummy")
    with pytest.raises(InputError, match="no calibrated thresholds for budget global"):
        shadowc.compile(options)
