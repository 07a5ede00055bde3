# SPDX-License-Identifier: Apache-2.0
"""A Llama-type model through all of the torch side: trace, predictor with its recall, masked decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shadowc.checkpoint.facts import ModelFacts
from shadowc.checkpoint.opt import OptFacts
from shadowc.checkpoint.resolve import ModelCheckpoint
from shadowc.sparsity.collect import collect
from shadowc.sparsity.families import watched
from shadowc.sparsity.importance import ImportanceTrace
from shadowc.sparsity.networks import cost_share
from shadowc.sparsity.predictor import Predictor
from shadowc.sparsity.reference import MaskedModel, MaskedState, load_torch_model
from shadowc.sparsity.train import train
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from shadowc.spec.options import CollectOptions, Style, TrainOptions
from tests.conftest import LLAMA, random_llama

FLOAT32 = 2e-5
HALF = Density(0.5, 0.5)


@pytest.fixture(scope="module")
def trace(llama_checkpoint: ModelCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> ImportanceTrace:
    options = CollectOptions(positions=240, length=32)
    return collect(llama_checkpoint, options, tmp_path_factory.mktemp("llama") / "trace")


@pytest.fixture(scope="module", params=["shadow", "dejavu", "shadow+"])
def style(request: pytest.FixtureRequest) -> Style:
    return request.param


@pytest.fixture(scope="module")
def predictor(trace: ImportanceTrace, style: Style, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("llama") / "predictor"
    train(trace, trace.facts, TrainOptions(style=style, neuron_block=16, epochs=3), folder)
    return Predictor.load(folder, trace.facts)


@pytest.fixture(scope="module")
def masked(llama_checkpoint: ModelCheckpoint, predictor: Predictor) -> MaskedModel:
    return MaskedModel(load_torch_model(llama_checkpoint), predictor.plan(None), predictor)


def test_training_reports_recall_of_every_predicted_layer(predictor: Predictor) -> None:
    assert predictor.units == (4, 16)
    for kind in ("heads", "neurons"):
        found = predictor.report["found"][kind]["local"]["0.5"]
        for method in ("predictor", "normalised", "static", "random"):
            assert 0 < found[method]["recall"] <= 1
            assert len(found[method]["recall_per_layer"]) == 3
        assert found["static"]["recall"] > found["random"]["recall"]


def test_masked_decoding_scores_what_the_predictor_scores_and_is_causal(
    masked: MaskedModel, predictor: Predictor, trace: ImportanceTrace
) -> None:
    ids = torch.from_numpy(trace.tokens_NT[:2].astype(np.int64))
    later = masked.decoder.blocks[1:]
    sites = [masked.decoder.blocks[0].context, *(block.reads for block in later), *(block.ffn_reads for block in later)]
    seen: dict[int, np.ndarray[Any, Any]] = {}
    watches = [
        (site, lambda tensor, n=n: seen.__setitem__(n, tensor[:, 4:].flatten(0, 1).numpy().copy()))
        for n, site in enumerate(sites)
    ]
    with watched(*watches):
        result = masked.logits(ids, density=HALF, masked_from=4)
    attention, ffn = (np.stack([seen[n] for n in numbers], axis=1) for numbers in ((1, 2, 3), (4, 5, 6)))
    given = {"shadow": seen[0], "dejavu": attention, "shadow+": np.stack([attention, ffn], axis=1)}[predictor.style]
    for mine, wanted in zip((result.scores_heads, result.scores_neurons), predictor.scores(given), strict=True):
        np.testing.assert_allclose(mine.flatten(0, 1).numpy(), wanted, rtol=1e-4, atol=1e-4)
    changed = ids.clone()
    changed[:, 20:] = 5
    again = masked.logits(changed, density=HALF, masked_from=4)
    assert torch.equal(again.mask_neurons[:, :16], result.mask_neurons[:, :16])
    torch.testing.assert_close(again.logits[:, :20], result.logits[:, :20], rtol=0, atol=FLOAT32)


def test_token_by_token_with_a_cache_equals_one_pass(masked: MaskedModel, trace: ImportanceTrace) -> None:
    ids = torch.from_numpy(trace.tokens_NT[:2].astype(np.int64))
    whole = masked.logits(ids, density=HALF, masked_from=6)
    state = MaskedState()
    steps = [masked.logits(ids[:, :6], density=HALF, masked_from=6, state=state)]
    steps += [
        masked.logits(ids[:, t : t + 1], density=HALF, masked_from=6, state=state) for t in range(6, ids.shape[1])
    ]
    torch.testing.assert_close(torch.cat([step.logits for step in steps], 1), whole.logits, rtol=0, atol=1e-4)


def test_keys_and_values_of_masked_heads_are_kept(llama_model: Any, llama_checkpoint: ModelCheckpoint) -> None:
    """A head that was off at earlier tokens attends to them as if it had been on, as the engine's K/V do."""
    plan = Predictor.dummy(llama_checkpoint.facts, block=16, width=32).plan("local")
    ids = torch.randint(4, 320, (1, 8), generator=torch.Generator().manual_seed(2))
    seen: list[torch.Tensor] = []
    for off in (False, True):
        heads = torch.ones(1, 8, 3, 4, dtype=torch.bool)
        heads[:, :7, 0, 2] = not off
        masked = MaskedModel(llama_model, plan)
        handle = masked.decoder.blocks[1].context.watch(lambda tensor: seen.append(tensor[0, 7].clone()))
        masked.logits(ids, density=HALF, masks=(heads, torch.ones(1, 8, 3, 16, dtype=torch.bool)))
        handle.remove()
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=FLOAT32)


def test_a_predictor_for_another_shape_is_refused(predictor: Predictor, small_facts: OptFacts) -> None:
    with pytest.raises(InputError, match="does not fit planted"):
        predictor.require_fit(small_facts)


@pytest.mark.parametrize("style_of_cost", ["shadow", "dejavu", "shadow+"])
def test_a_predictors_share_is_of_what_a_dense_token_reads(
    llama_checkpoint: ModelCheckpoint, style_of_cost: Style
) -> None:
    facts: ModelFacts = llama_checkpoint.facts
    model = random_llama(LLAMA)
    dense = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    mine = Predictor.dummy(facts, block=16, width=32, style=style_of_cost)
    assert cost_share(facts, 16, 32, style_of_cost) == pytest.approx(mine.parameters / dense, rel=0.02)
