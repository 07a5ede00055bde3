# SPDX-License-Identifier: Apache-2.0
"""Style dejavu and labels "top": a network for every layer, beside the one look of style shadow.

Letters: B batch, S tokens, M positions, E hidden, L predicted layers, U units of a kind per layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import OPTForCausalLM

from shadowc.checkpoint.opt import OptFacts, published_config
from shadowc.sparsity.fit import Examples, fit
from shadowc.sparsity.importance import ImportanceTrace
from shadowc.sparsity.networks import BUDGET, LayerNetworks, cost_share, default_width
from shadowc.sparsity.predictor import META_FILE, Predictor, style_in
from shadowc.sparsity.reference import MaskedModel, MaskedState
from shadowc.sparsity.styles import check_style
from shadowc.sparsity.targets import targets_of
from shadowc.sparsity.train import train
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, UnsupportedError
from shadowc.spec.options import CompileOptions, TrainOptions

TINY_STEP = 2e-5
OPTIONS = TrainOptions(style="dejavu", neuron_block=16, width=32, epochs=15)
CLEAR_GAIN = 0.2
CHANCE = 0.1  # two standard deviations of the recall over 80 held-out positions
HALF = Density(0.5, 0.5)
Plant = Callable[..., ImportanceTrace]


# --- the value and its files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dummy(small_facts: OptFacts) -> Predictor:
    return Predictor.dummy(small_facts, block=16, width=32, seed=3, style="dejavu")


def test_scores_of_a_layer_come_from_its_own_network_and_input(dummy: Predictor) -> None:
    inputs_MLE = np.random.default_rng(0).standard_normal((5, 2, 16)).astype(np.float32)
    heads_MLH, neurons_MLN = dummy.scores(inputs_MLE)
    assert (heads_MLH.shape, neurons_MLN.shape) == ((5, 2, 4), (5, 2, 4))
    assert isinstance(dummy.neurons, LayerNetworks)
    np.testing.assert_array_equal(neurons_MLN[:, 1], dummy.neurons.networks[1](inputs_MLE[:, 1]))
    inputs_MLE[:, 0] += 1
    np.testing.assert_array_equal(dummy.scores(inputs_MLE)[0][:, 1], heads_MLH[:, 1])


def test_files_keep_the_style_and_every_network(dummy: Predictor, tmp_path: Path, small_facts: OptFacts) -> None:
    dummy.save(tmp_path)
    loaded = Predictor.load(tmp_path, small_facts)
    assert loaded.style == style_in(tmp_path) == "dejavu"
    assert loaded.meta == dummy.meta
    assert "neurons.2.fc2.bias" in loaded.tensors()
    assert all(np.array_equal(loaded.tensors()[name], value) for name, value in dummy.tensors().items())


def test_a_predictor_from_before_there_were_styles_is_shadow(tmp_path: Path, small_facts: OptFacts) -> None:
    Predictor.dummy(small_facts, 16, 32).save(tmp_path)
    meta = json.loads((tmp_path / META_FILE).read_text())
    del meta["style"]
    (tmp_path / META_FILE).write_text(json.dumps(meta))
    assert Predictor.load(tmp_path).style == "shadow"


@pytest.mark.parametrize("read", [Predictor.load, style_in])
def test_an_unknown_style_is_refused_with_the_known_ones(dummy: Predictor, tmp_path: Path, read: Any) -> None:
    dummy.save(tmp_path)
    text = (tmp_path / META_FILE).read_text()
    (tmp_path / META_FILE).write_text(text.replace('"dejavu"', '"powerinfer"'))
    with pytest.raises(InputError, match=r"style 'powerinfer'; this version knows shadow, dejavu, shadow\+"):
        read(tmp_path)


def test_a_missing_network_is_named(dummy: Predictor, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    dummy.save(tmp_path)
    tensors = load_file(tmp_path / "predictor.safetensors")
    del tensors["heads.2.fc1.bias"]
    save_file(tensors, tmp_path / "predictor.safetensors")
    with pytest.raises(InputError, match=r"not a complete predictor: 'heads\.2\.fc1\.bias'"):
        Predictor.load(tmp_path)


def test_only_a_ranking_within_layers_is_planned(dummy: Predictor) -> None:
    assert (dummy.plan(None).scope, dummy.plan("local").style) == ("local", "dejavu")
    with pytest.raises(InputError, match="the scores of the later layers do not exist yet") as caught:
        dummy.plan("global")
    for words in ("--scope local", "compile --select calibrated", "eval --methods calibrated"):  # no flag is in both
        assert words in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "kind", "hint"),
    [
        ({"scope": "global"}, InputError, "--scope local"),
        ({"mask": "sequence"}, UnsupportedError, "--mask token"),
        ({"target": "tensorrt-rtx"}, UnsupportedError, "--target cpu"),
    ],
)
def test_what_the_style_cannot_do_is_refused_with_what_to_type(
    changes: dict[str, str], kind: type[Exception], hint: str
) -> None:
    options = CompileOptions.model_validate({"model": "opt-mini", **changes})
    check_style("shadow", options)
    with pytest.raises(kind) as caught:
        check_style("dejavu", options)
    assert hint in caught.value.hint  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["opt-125m", "opt-1.3b", "opt-6.7b"])
def test_the_budget_buys_a_network_for_each_layer_less_width(name: str) -> None:
    facts = OptFacts.from_config(published_config(name), name)
    width = default_width(facts, 16, "dejavu")
    assert cost_share(facts, 16, width, "dejavu") <= BUDGET < cost_share(facts, 16, width + 32, "dejavu")
    assert width < default_width(facts, 16)


@pytest.mark.parametrize("style", ["shadow", "dejavu"])
def test_cost_share_counts_what_the_tensors_hold(small_facts: OptFacts, style: Any) -> None:
    made = Predictor.dummy(small_facts, 16, 64, style=style)
    e, f = small_facts.hidden, small_facts.ffn
    dense = 3 * (4 * (e * e + e) + (2 * e * f + f + e)) + small_facts.vocab * e
    assert cost_share(small_facts, 16, 64, style) == pytest.approx(made.parameters / dense)


# --- training ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def turns(make_trace: Plant) -> Plant:
    """Return traces in which a layer's own input tells which of four groups matters there; layer 0 tells nothing.

    `told`: the input of the layer that is told; of the others the inputs are noise. None: all are told.
    """

    def make(told: int | None = None, rows: int = 800) -> ImportanceTrace:
        rng = np.random.default_rng(5)
        turn_ML = rng.integers(4, size=(rows, 3))

        def importance(units: int) -> Any:
            mine_MLU = np.arange(units)[None, None] % 4 == turn_ML[..., None]
            return (np.where(mine_MLU, 10, 1) * (rng.random((rows, 3, units)) + 0.5)).astype(np.float32)

        context_ME = rng.standard_normal((rows, 16)).astype(np.float32)
        heads_MLH, neurons_LMF = importance(4), importance(64).transpose(1, 0, 2)
        inputs = {}
        for layer in (1, 2):
            input_ME = rng.standard_normal((rows, 16)).astype(np.float32)
            if told in (None, layer):
                input_ME[np.arange(rows), turn_ML[:, layer]] += 4
            inputs[f"input.{layer}"] = input_ME
        return make_trace(context_ME, heads_MLH, neurons_LMF, np.arange(rows, dtype=np.int32) // 40, inputs)

    return make


def recall(predictor: Predictor, kind: str, method: str = "predictor") -> Any:
    found = predictor.report["found"][kind]["local"]["0.2"][method]
    return found["recall"], found["recall_per_layer"]


@pytest.mark.parametrize("labels", ["scores", "top"])
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_a_layer_learns_from_its_own_input(turns: Plant, small_facts: OptFacts, kind: str, labels: Any) -> None:
    predictor = train(turns(), small_facts, OPTIONS.model_copy(update={"labels": labels}))
    found, static = recall(predictor, kind)[0], recall(predictor, kind, "normalised")[0]
    assert found > static + CLEAR_GAIN
    assert found > 0.85
    error = predictor.report["error"][kind]
    assert error["predictor"] < 0.85 * error["mean"]
    assert len(predictor.report["epoch"][kind]) == 2


def test_the_input_of_one_layer_teaches_no_other(turns: Plant, small_facts: OptFacts) -> None:
    predictor = train(turns(told=2), small_facts, OPTIONS)
    (_, per_layer), (_, static) = recall(predictor, "neurons"), recall(predictor, "neurons", "normalised")
    assert per_layer[0] < static[0] + CHANCE
    assert per_layer[1] > static[1] + CLEAR_GAIN


def test_layer_0_tells_style_shadow_nothing_about_these_turns(turns: Plant, small_facts: OptFacts) -> None:
    """The same trace, so the gain above is the style's and not the trace's."""
    predictor = train(turns(), small_facts, OPTIONS.model_copy(update={"style": "shadow"}))
    assert recall(predictor, "neurons")[0] < recall(predictor, "neurons", "normalised")[0] + CHANCE


def test_style_shadow_learns_labels_too(plant: Plant, small_facts: OptFacts) -> None:
    options = OPTIONS.model_copy(update={"style": "shadow", "labels": "top"})
    predictor = train(plant(dependent=True), small_facts, options)
    assert predictor.meta["labels"] == "top"
    assert recall(predictor, "neurons")[0] > recall(predictor, "neurons", "normalised")[0] + CLEAR_GAIN


def test_labels_follow_the_style_where_nobody_chose_them() -> None:
    assert (TrainOptions().learned, TrainOptions(style="dejavu").learned) == ("scores", "top")
    assert TrainOptions(style="dejavu", labels="scores").learned == "scores"


def test_labels_are_the_first_units_of_a_layer_but_for_those_that_do_nothing() -> None:
    raw_MLU = np.array([[[5, 4, 3, 2, 1], [9, 0, 0, 0, 0], [2, 2, 2, 2, 2]]], np.float32)
    raw_MLU = np.concatenate([raw_MLU, raw_MLU[..., ::-1] * [[1], [1], [0.5]] + [[0], [0], [1]]]).astype(np.float32)
    raw_MLU[1, 2, 0] = 7
    targets_MLU = targets_of(raw_MLU, TrainOptions(labels="top", top=0.4))
    np.testing.assert_array_equal(targets_MLU[0, :2], [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    assert np.isnan(targets_MLU[0, 2]).all()
    assert targets_MLU[1, 2, 0] == 1


def test_labels_start_from_how_often_a_unit_is_in_the_top() -> None:
    rng = np.random.default_rng(0)
    rate_O = np.array([0.1, 0.5, 0.8, 0.0])
    targets_MO = (rng.random((4000, 4)) < rate_O).astype(np.float32)
    noise_ME = rng.standard_normal((4000, 8)).astype(np.float32)
    part = Examples(noise_ME[:3000], targets_MO[:3000], noise_ME[3000:], targets_MO[3000:])
    options = TrainOptions(labels="top", epochs=1, rate=1e-9)
    network = fit(part, 32, options, seed=0).network
    found_O = 1 / (1 + np.exp(-network(noise_ME[:1])[0]))
    np.testing.assert_allclose(found_O, targets_MO[:3000].mean(0).clip(1e-3), atol=1e-3)


# --- the masked model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_facts(tiny_model: OPTForCausalLM) -> OptFacts:
    return OptFacts.from_config(tiny_model.config.to_dict(), "opt-tiny")


@pytest.fixture(scope="module")
def layered(tiny_facts: OptFacts) -> Predictor:
    return Predictor.dummy(tiny_facts, block=16, width=32, style="dejavu")


@pytest.fixture(scope="module")
def masked(tiny_model: OPTForCausalLM, layered: Predictor) -> MaskedModel:
    return MaskedModel(tiny_model, layered.plan("local"), layered)


@pytest.fixture(scope="module")
def ids(tiny_facts: OptFacts) -> Tensor:
    return torch.randint(4, tiny_facts.vocab, (2, 14), generator=torch.Generator().manual_seed(1))


def test_masked_model_scores_each_layer_by_what_its_attention_reads_under_masks(
    masked: MaskedModel, layered: Predictor, ids: Tensor
) -> None:
    seen: list[Tensor] = []
    layers = masked.model.model.decoder.layers
    hooks = [layer.self_attn_layer_norm.register_forward_hook(lambda *args: seen.append(args[2])) for layer in layers]
    result = masked.logits(ids, density=HALF, masked_from=6)
    for hook in hooks:
        hook.remove()
    inputs_BSLE = torch.stack(seen[1:], dim=2)[:, 6:]
    for mine, wanted in zip(
        (result.scores_heads, result.scores_neurons), layered.scores(inputs_BSLE.flatten(0, 1).numpy()), strict=True
    ):
        assert mine is not None
        np.testing.assert_allclose(mine.flatten(0, 1), wanted, atol=TINY_STEP)
    dense = masked.logits(ids, density=Density(1.0, 1.0), masked_from=6)
    torch.testing.assert_close(dense.scores_heads[:, :1, 0], result.scores_heads[:, :1, 0])
    assert (dense.scores_heads[:, :, 2] - result.scores_heads[:, :, 2]).abs().max() > 0.01


@pytest.mark.parametrize("ends", [(6, 7, 8, 14), (3, 10, 14)])
def test_pieces_equal_the_whole(masked: MaskedModel, ids: Tensor, ends: tuple[int, ...]) -> None:
    whole = masked.logits(ids, density=HALF, masked_from=6)
    state, start, parts = MaskedState(), 0, []
    for end in ends:
        parts.append(masked.logits(ids[:, start:end], density=HALF, masked_from=6, state=state).logits)
        start = end
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, rtol=0, atol=TINY_STEP)


def test_masked_model_makes_no_masks_of_a_sequence(masked: MaskedModel, ids: Tensor) -> None:
    with pytest.raises(InputError, match="makes a mask for every token"):
        masked.logits(ids, density=HALF, masked_from=6, granularity="sequence")
