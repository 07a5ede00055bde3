# SPDX-License-Identifier: Apache-2.0
"""Heat maps say how often predictor and truth chose each unit, and a unit in another's place shows."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shadowc.eval import heat, references, sweep
from shadowc.eval.request import Request, Setting
from shadowc.eval.run import settings_of
from shadowc.eval.task import TASKS
from shadowc.eval.task_corpus import task_corpus
from shadowc.eval.texts import TextCorpus, corpus_of
from shadowc.eval.torch_model import TorchModel
from shadowc.measure.mask_map import cells
from shadowc.sparsity.networks import Network
from shadowc.sparsity.predictor import Predictor
from shadowc.spec.density import Density
from shadowc.spec.errors import UnsupportedError
from shadowc.spec.progress import Event, EventProgress, NullProgress
from tests.eval.conftest import PROSE
from tests.eval.task_files import write_tasks

HALF = Density(0.5, 0.25)
PAIR = (Setting("predictor", HALF, scope="local"), Setting("oracle", HALF, scope="local"))
SETTINGS = settings_of(["predictor", "oracle"], [HALF], ["decode"])


def prose(model: TorchModel) -> TextCorpus:
    return corpus_of(model, "prose", [f"{n} {PROSE}" for n in range(4)], "0", 24)


def test_shares_are_those_of_the_masks_and_meet_the_density(in_torch: TorchModel) -> None:
    heads, neurons = heat.heat_maps(in_torch, prose(in_torch), [PAIR])
    requests = [item.requests[0] for item in prose(in_torch).items]
    assert heads.tokens == neurons.tokens == sum(len(one.ids) - 2 for one in requests)
    for kind, found in enumerate((heads, neurons)):
        for setting, share_LC in zip(PAIR, (found.predicted, found.true), strict=True):
            masks = np.concatenate([in_torch.masks(one, setting)[kind] for one in requests])
            np.testing.assert_allclose(share_LC, cells(masks.mean(axis=0), heat.CELLS))
        np.testing.assert_allclose(found.predicted.mean(axis=1), (0.5, 0.25)[kind], atol=1e-6)
        np.testing.assert_array_equal(found.difference, found.predicted - found.true)
        assert np.abs(found.difference).max() > 0.2  # a predictor of random weights is no truth


def test_units_without_importance_are_nobodys_choice(in_torch: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    true_scores = references.oracle_scores

    def planted(*arguments: Any) -> Any:
        heads, neurons = true_scores(*arguments)
        neurons[..., ::2] = 0.0
        return heads, references._ties_apart(neurons)

    monkeypatch.setattr(references, "oracle_scores", planted)
    model = TorchModel(in_torch._model, in_torch._checkpoint, in_torch._predictor)
    pair = [replace(one, density=Density(1.0, 0.75)) for one in PAIR]
    _, neurons = heat.heat_maps(model, prose(model), [(pair[0], pair[1])])
    assert not neurons.true[:, ::2].any()
    assert neurons.true[:, 1::2].min() > 0.5
    assert neurons.predicted.mean() == pytest.approx(0.75)


def test_the_truth_against_itself_has_no_difference(in_torch: TorchModel) -> None:
    for one in heat.heat_maps(in_torch, prose(in_torch), [(PAIR[1], PAIR[1])]):
        assert not one.difference.any()


def rolled(predictor: Predictor, layer: int, by: int) -> Predictor:
    """Planted defect: the neurons of a layer have the scores of their neighbours."""
    network, units = predictor.neurons, predictor.units[1]
    assert isinstance(network, Network)
    rows = np.arange(network.outputs).reshape(predictor.layers, units)
    rows[layer] = np.roll(rows[layer], by)
    order = rows.reshape(-1)
    moved = replace(network, fc2_weight_OP=network.fc2_weight_OP[order], fc2_bias_O=network.fc2_bias_O[order])
    return replace(predictor, neurons=moved)


def test_a_permutation_of_units_shows_in_the_layer_that_has_it(in_torch: TorchModel) -> None:
    assert in_torch._predictor is not None
    planted = TorchModel(in_torch._model, in_torch._checkpoint, rolled(in_torch._predictor, 1, 3))
    _, sound = heat.heat_maps(in_torch, prose(in_torch), [PAIR])
    _, found = heat.heat_maps(planted, prose(in_torch), [PAIR])
    np.testing.assert_array_equal(found.true, sound.true)
    np.testing.assert_allclose(found.predicted[1], np.roll(sound.predicted[1], 3))
    changed_L = np.abs(found.difference - sound.difference).max(axis=1)
    assert changed_L[1] > 0.1
    assert not np.delete(changed_L, 1).any()


def run(folder: Path, model: TorchModel, settings: list[Setting], progress: Any = None) -> None:
    sweep.run(folder, model, [prose(model)], settings, 0, progress or NullProgress())


def test_a_sweep_with_the_truth_writes_the_data_and_goes_on_with_it(
    in_torch: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, in_torch, SETTINGS)
    path = tmp_path / sweep.HEAT_DATA_FILE
    content = path.read_text()
    (heads, neurons) = json.loads(content)["maps"]
    assert (heads["kind"], neurons["kind"]) == ("heads", "neurons")
    assert np.shape(neurons["predicted"]) == np.shape(neurons["difference"])
    with monkeypatch.context() as patch:
        patch.setattr(TorchModel, "masks", None)  # asking again would fail
        run(tmp_path, in_torch, SETTINGS)
    assert path.read_text() == content
    path.write_text(content[:-30])
    run(tmp_path, in_torch, SETTINGS)
    assert path.read_text() == content
    more = settings_of(["predictor", "oracle"], [HALF, Density(1.0, 0.5)], ["decode"])
    run(tmp_path, in_torch, more)
    assert len(json.loads(path.read_text())["maps"]) == 4


def test_a_sweep_without_the_truth_has_no_map(in_torch: TorchModel, tmp_path: Path) -> None:
    run(tmp_path, in_torch, settings_of(["predictor", "static"], [HALF], ["decode"]))
    assert not (tmp_path / sweep.HEAT_DATA_FILE).exists()
    assert heat.asked([*settings_of(["oracle"], [HALF], ["decode"]), Setting("predictor", Density(1.0, 0.5))]) == []


def test_answers_of_one_token_have_no_map(in_torch: TorchModel, tmp_path: Path) -> None:
    corpus = task_corpus(in_torch, write_tasks(tmp_path), TASKS["rte"])
    single = [item for item in corpus.items if all(one.scored == 1 for one in item.requests)]
    corpus.items = tuple(single)
    assert heat.heat_maps(in_torch, corpus, [PAIR]) == ()


def test_the_picture_is_drawn_where_matplotlib_is(in_torch: TorchModel, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run(tmp_path, in_torch, SETTINGS)
    assert (tmp_path / sweep.HEAT_FILE).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_note_and_the_data(
    in_torch: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    seen: list[Event] = []
    run(tmp_path, in_torch, SETTINGS, EventProgress(seen.append))
    assert [event.text for event in seen if event.kind == "note"] == [
        "no pictures: matplotlib is not installed; pip install 'shadowc[plot]'"
    ]
    assert (tmp_path / sweep.HEAT_DATA_FILE).is_file()
    assert not (tmp_path / sweep.HEAT_FILE).exists()


def test_an_engine_does_not_show_its_masks_here(engine_folders: dict[str, Path]) -> None:
    from shadowc.eval.load import engine_model

    with pytest.raises(UnsupportedError, match="does not show its masks here"):
        engine_model(engine_folders["token"]).masks(Request((2, 5, 6), 2), PAIR[0])
