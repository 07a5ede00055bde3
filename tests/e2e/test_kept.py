# SPDX-License-Identifier: Apache-2.0
"""Layers that stay dense and least numbers of units, from the options to what kernels compute (hybrid selection).

Letters: S tokens, L predicted layers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import shadowc
from shadowc.checkpoint.resolve import resolve
from shadowc.cli import inspect
from shadowc.eval.request import Setting
from shadowc.eval.torch_model import TorchModel
from shadowc.measure.against import stored_plan
from shadowc.measure.expected import expected_bytes
from shadowc.measure.free_running import free_run
from shadowc.measure.masks import wrong_selections
from shadowc.runtime.load import load_cpu, read_manifest
from shadowc.sparsity.kept import Kept
from shadowc.sparsity.predictor import Predictor
from shadowc.sparsity.reference import MaskedModel, load_torch_model
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from shadowc.spec.program import SparsityPlan
from tests.e2e import compiled

IDS = np.arange(10, 22)[None]
HALF = Density(0.5, 0.5)
EXEMPT, HEADS, NEURONS = (2,), 2, 40
LEAST_BLOCKS = 3  # of 16, that hold 40 neurons
STYLES = ("shadow", "dejavu", "shadow+")


@pytest.fixture(scope="module", params=STYLES)
def engine_and_predictor(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Predictor]:
    folder = tmp_path_factory.mktemp("kept")
    predictor = Predictor.dummy(resolve(str(tiny_checkpoint)).facts, 16, 32, style=request.param)
    predictor.save(folder / "predictor")
    changes = {"exempt": EXEMPT, "min_active_heads": HEADS, "min_active_neurons": NEURONS}
    options = compiled.options(tiny_checkpoint, folder / "engine", predictor=str(folder / "predictor"), **changes)
    return shadowc.compile(options), predictor


def plan_of(predictor: Predictor) -> SparsityPlan:
    return predictor.plan(None, (1,), min_active_heads=HEADS, min_active_neurons=LEAST_BLOCKS)


def selected(folder: Path, density: float) -> dict[str, np.ndarray]:
    """Scores, thresholds and counts of tokens under masks."""
    probe = load_cpu(folder).prober()()
    found = probe.step(IDS, sparse_tail=IDS.shape[1], density=Density(density, density))
    return {name: value for name, value in found.items() if name.split(".")[0] in ("scores", "threshold", "active")}


@pytest.mark.parametrize("density", [0.0, 0.3])
def test_exempt_layers_stay_dense_and_others_keep_the_least(engine_and_predictor, density: float) -> None:
    found = selected(engine_and_predictor[0], density)
    for kind, least in (("heads", HEADS), ("neurons", LEAST_BLOCKS)):
        active_BSL, units = found[f"active.{kind}"], found[f"scores.{kind}"].shape[-1]
        assert (active_BSL[..., 1] == units).all()
        others = np.delete(active_BSL, 1, axis=-1)
        assert (others >= least).all()
        assert others.min() < units
        if density == 0.0:
            assert (others == least).all()


def test_text_is_that_of_the_masked_model(engine_and_predictor, tiny_checkpoint: Path) -> None:
    folder, predictor = engine_and_predictor
    masked = MaskedModel(load_torch_model(resolve(str(tiny_checkpoint))), plan_of(predictor), predictor)
    run = free_run(shadowc.load(folder), masked, IDS, tokens=8, density=Density(0.1, 0.1))
    assert run.passed()


def test_the_gate_knows_what_is_kept_and_would_notice_if_it_were_not(engine_and_predictor) -> None:
    folder, _ = engine_and_predictor
    engine = load_cpu(folder)
    assert engine.manifest.sparsity is not None
    plan, found = stored_plan(engine, engine.manifest.sparsity), selected(folder, 0.1)
    tokens = found["scores.heads"].shape[1]
    assert wrong_selections(found, plan, Density(0.1, 0.1), tokens) == 0
    for forgotten in ({"exempt": ()}, {"min_active_heads": 0}, {"min_active_neurons": 0}):
        assert wrong_selections(found, replace(plan, **forgotten), Density(0.1, 0.1), tokens) > 0


def test_the_folder_says_what_is_kept(engine_and_predictor) -> None:
    manifest = read_manifest(engine_and_predictor[0])
    facts = inspect.sparsity_facts(manifest)
    assert facts["sparsity"].endswith("dense layers 0, 2")
    assert facts["kept at least"] == "2 heads, 3 blocks of neurons in a layer"
    nothing, tenth = (expected_bytes(manifest, Density(share, share)) for share in (0.0, 0.1))
    assert nothing == tenth
    assert nothing.neurons < expected_bytes(manifest, Density(1, 1)).neurons


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (Kept((0,)), "layer 0 is to stay dense; the model's masked layers are 1 to 3"),
        (Kept((4,)), "layer 4 is to stay dense; the model's masked layers are 1 to 3"),
        (Kept(heads=5), "5 heads are to be kept at least; a layer has 4"),
        (Kept(neurons=10**6), "1,000,000 neurons are to be kept at least; a layer has"),
        (Kept((1, 2, 3)), "all layers are to stay dense; then nothing is left to mask"),
    ],
)
def test_what_the_model_does_not_have_is_refused(tiny_checkpoint: Path, kept: Kept, says: str) -> None:
    with pytest.raises(InputError, match=says):
        kept.check(resolve(str(tiny_checkpoint)).facts)


def test_all_problems_are_told_at_once(tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError) as caught:
        Kept((0, 9), heads=100).check(resolve(str(tiny_checkpoint)).facts)
    assert len(caught.value.problems) == 3


def test_thresholds_keep_no_least_number_and_say_so_before_any_work(tiny_checkpoint: Path, tmp_path: Path) -> None:
    changes = {"select": "calibrated", "min_active_heads": 1}
    with pytest.raises(InputError, match="thresholds keep the units that reach them"):
        shadowc.compile(compiled.options(tiny_checkpoint, tmp_path / "none.engine", **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["predictor", "random"])
def test_eval_in_torch_leaves_what_an_engine_leaves(engine_and_predictor, tiny_checkpoint: Path, method: str) -> None:
    _, predictor = engine_and_predictor
    checkpoint = resolve(str(tiny_checkpoint))
    kept = Kept(EXEMPT, HEADS, NEURONS)
    model, plain = (TorchModel(load_torch_model(checkpoint), checkpoint, predictor, kept=one) for one in (kept, Kept()))
    plan, wanted = model._masked_model(Setting(method, HALF, "decode", "local")).plan, plan_of(predictor)
    for name in ("exempt", "min_active_heads", "min_active_neurons"):
        assert getattr(plan, name) == getattr(wanted, name)
    assert model.identity != plain.identity  # a sweep of one is not continued by the other
    model.references += ("calibrated",)
    with pytest.raises(InputError, match="thresholds keep the units that reach them"):
        model.check(Setting("calibrated", HALF, "decode"))
