# SPDX-License-Identifier: Apache-2.0
"""The masked torch model: dense it is transformers' model, masked it is what zeroed weights would give.

Letters: B batch, S tokens, Z masked tokens, L predicted layers, N units of a layer.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shadowc.checkpoint.facts import ModelFacts
from shadowc.checkpoint.llama import LlamaFacts
from shadowc.checkpoint.models import resolve_model
from shadowc.checkpoint.opt import OptFacts
from shadowc.checkpoint.resolve import resolve
from shadowc.sparsity.families import decoder_of
from shadowc.sparsity.predictor import Predictor
from shadowc.sparsity.reference import MaskedModel, MaskedState, load_torch_model
from shadowc.sparsity.selection import unit_mask
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from tests.conftest import LLAMA, random_llama

FP32_TOLERANCE = 2e-5
EFFECT = 1e-2  # what a mask must move at least, to count as having an effect

ROWS, TOKENS, PROMPT, BLOCK = 2, 14, 6, 16
HALF = Density(0.5, 0.5)
DENSE = Density(1.0, 1.0)


@pytest.fixture(scope="module")
def facts(family: str, model: Any) -> ModelFacts:
    kind = {"opt": OptFacts, "llama": LlamaFacts}[family]
    return kind.from_config(model.config.to_dict(), "tiny")


@pytest.fixture(scope="module")
def predictor(facts: ModelFacts) -> Predictor:
    return Predictor.dummy(facts, block=BLOCK, width=32)


@pytest.fixture(scope="module")
def masked(model: Any, predictor: Predictor) -> MaskedModel:
    return MaskedModel(model, predictor.plan("global"), predictor)


@pytest.fixture(scope="module")
def ids(facts: ModelFacts) -> Tensor:
    return torch.randint(4, facts.vocab, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=FP32_TOLERANCE)


def dense_logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def random_masks(facts: ModelFacts, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    units = (facts.heads, facts.ffn // BLOCK)
    return tuple(torch.rand(ROWS, tokens, facts.predicted_layers, n, generator=generator) < 0.5 for n in units)


# --- what the masks do -------------------------------------------------------------------------------------


def test_model_is_transformers_when_density_is_one(masked: MaskedModel, ids: Tensor) -> None:
    result = masked.logits(ids, density=DENSE, masked_from=0)
    assert torch.equal(result.logits, dense_logits(masked.model, ids))
    assert result.mask_heads.all()
    assert result.mask_neurons.all()


def test_tokens_before_the_masked_ones_are_dense(masked: MaskedModel, ids: Tensor) -> None:
    result = masked.logits(ids, density=HALF, masked_from=PROMPT)
    dense = dense_logits(masked.model, ids)
    assert_close(result.logits[:, :PROMPT], dense[:, :PROMPT])
    assert (result.logits[:, PROMPT:] - dense[:, PROMPT:]).abs().amax(-1).min() > EFFECT
    assert result.mask_heads.shape[1] == TOKENS - PROMPT


def test_fixed_masks_equal_zeroed_weights(
    masked: MaskedModel, facts: ModelFacts, predictor: Predictor, ids: Tensor
) -> None:
    heads, neurons = (mask[:1, :1].expand(ROWS, TOKENS, -1, -1) for mask in random_masks(facts, TOKENS))
    pruned = copy.deepcopy(masked.model)
    orders = predictor.tensors()
    for index in range(facts.predicted_layers):
        block = decoder_of(pruned).blocks[index + 1]
        block.context.module.weight[:, ~heads[0, 0, index].repeat_interleave(facts.head_size)] = 0.0
        for unit in torch.nonzero(~neurons[0, 0, index]).flatten().tolist():
            in_checkpoint = orders[f"order.{index + 1}"][unit * BLOCK : (unit + 1) * BLOCK]
            block.hidden.module.weight[:, torch.from_numpy(in_checkpoint).long()] = 0.0
    result = masked.logits(ids, density=DENSE, masks=(heads, neurons))
    assert_close(result.logits, dense_logits(pruned, ids))


def test_everything_off_leaves_the_biases_of_both_blocks(masked: MaskedModel, ids: Tensor) -> None:
    bare = copy.deepcopy(masked.model)
    for block in decoder_of(bare).blocks[1:]:
        block.context.module.weight.zero_()
        block.hidden.module.weight.zero_()
    result = masked.logits(ids, density=Density(0.0, 0.0), masked_from=0)
    assert not result.mask_heads.any()
    assert not result.mask_neurons.any()
    assert_close(result.logits, dense_logits(bare, ids))


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_either_kind_alone_has_an_effect(masked: MaskedModel, ids: Tensor, kind: str) -> None:
    result = masked.logits(ids, density=dataclasses.replace(DENSE, **{kind: 0.5}), masked_from=0)
    assert (result.logits - dense_logits(masked.model, ids)).abs().amax(-1).min() > EFFECT


def test_model_is_left_as_it_was(masked: MaskedModel, ids: Tensor) -> None:
    before = dense_logits(masked.model, ids)
    masked.logits(ids, density=HALF, masked_from=0)
    assert torch.equal(dense_logits(masked.model, ids), before)


def test_model_is_left_as_it_was_when_a_run_fails(masked: MaskedModel, ids: Tensor, facts: ModelFacts) -> None:
    with pytest.raises(IndexError):
        masked.logits(torch.full_like(ids, facts.vocab), density=HALF, masked_from=0)
    assert not any(module._forward_pre_hooks for module in masked.model.modules())


# --- where the masks come from -----------------------------------------------------------------------------


def test_scores_are_the_predictor_s(masked: MaskedModel, predictor: Predictor, ids: Tensor) -> None:
    contexts = []
    projection = decoder_of(masked.model).blocks[0].context.module
    handle = projection.register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[0].clone()))
    result = masked.logits(ids, density=HALF, masked_from=PROMPT)
    handle.remove()
    expected = predictor.scores(contexts[0][:, PROMPT:].flatten(0, 1).numpy())
    for found, wanted in zip((result.scores_heads, result.scores_neurons), expected, strict=True):
        np.testing.assert_allclose(found.flatten(0, 1).numpy(), wanted, atol=FP32_TOLERANCE)


def test_masks_are_scores_at_or_above_the_threshold(masked: MaskedModel, ids: Tensor) -> None:
    result = masked.logits(ids, density=HALF, masked_from=torch.tensor([0, PROMPT]))
    assert torch.equal(result.mask_heads, unit_mask(result.scores_heads, result.threshold_heads))
    assert torch.equal(result.mask_neurons, unit_mask(result.scores_neurons, result.threshold_neurons))


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_masks_do_not_depend_on_later_tokens(masked: MaskedModel, ids: Tensor, granularity: str) -> None:
    changed = ids.clone()
    changed[:, 10:] = 5
    first, second = (
        masked.logits(x, density=HALF, masked_from=PROMPT, granularity=granularity) for x in (ids, changed)
    )
    known = 10 - PROMPT
    assert torch.equal(first.mask_neurons[:, :known], second.mask_neurons[:, :known])
    assert_close(first.logits[:, :10], second.logits[:, :10])
    assert not torch.equal(first.logits[:, 10:], second.logits[:, 10:])


def test_token_masks_differ_from_token_to_token(masked: MaskedModel, ids: Tensor) -> None:
    mask = masked.logits(ids, density=HALF, masked_from=0).mask_neurons
    changed = (mask[:, 1:] != mask[:, :-1]).flatten(2).any(-1)
    assert changed.float().mean() > 0.8


def test_sequence_masks_are_those_of_the_last_prompt_token(masked: MaskedModel, ids: Tensor) -> None:
    fixed = masked.logits(ids, density=HALF, masked_from=PROMPT, granularity="sequence")
    token = masked.logits(ids, density=HALF, masked_from=PROMPT - 1)
    for kind in ("heads", "neurons"):
        mask = getattr(fixed, f"mask_{kind}")
        assert torch.equal(mask, getattr(token, f"mask_{kind}")[:, :1].expand_as(mask))


def test_local_scope_keeps_the_same_number_in_every_layer(model, predictor: Predictor, ids: Tensor) -> None:
    local = MaskedModel(model, predictor.plan("local"), predictor).logits(ids, density=HALF, masked_from=0)
    assert (local.mask_neurons.sum(-1) == 8).all()
    spread = MaskedModel(model, predictor.plan("global"), predictor).logits(ids, density=HALF, masked_from=0)
    assert (spread.mask_neurons.sum((-1, -2)) == 24).all()
    assert not (spread.mask_neurons.sum(-1) == 8).all()


def test_plan_exempts_layers_and_keeps_a_least_number(model, facts, predictor: Predictor, ids: Tensor) -> None:
    plan = predictor.plan("global", (1,), min_active_heads=1, min_active_neurons=2)
    result = MaskedModel(model, plan, predictor).logits(ids, density=Density(0.0, 0.0), masked_from=0)
    assert result.mask_heads.sum(-1)[0, 0].tolist() == [1, facts.heads, 1]
    assert result.mask_neurons.sum(-1)[0, 0].tolist() == [2, facts.ffn // BLOCK, 2]


def test_rows_have_their_own_density(masked: MaskedModel, ids: Tensor) -> None:
    both = masked.logits(ids, density=[HALF, Density(0.25, 0.1)], masked_from=PROMPT)
    alone = masked.logits(ids[1:], density=Density(0.25, 0.1), masked_from=PROMPT)
    assert_close(both.logits[1:], alone.logits)


def test_rows_have_their_own_beginning(masked: MaskedModel, ids: Tensor) -> None:
    both = masked.logits(ids, density=HALF, masked_from=torch.tensor([3, 9]))
    for row, first in enumerate((3, 9)):
        alone = masked.logits(ids[row : row + 1], density=HALF, masked_from=first)
        assert_close(both.logits[row : row + 1], alone.logits)
    assert both.mask_heads[1, : 9 - 3].all()


def test_pads_on_the_left_change_nothing(masked: MaskedModel, ids: Tensor, facts: ModelFacts) -> None:
    padded = torch.cat([torch.full((ROWS, 3), facts.pad), ids], dim=1)
    attention_mask = (torch.arange(TOKENS + 3) >= 3).long().expand(ROWS, -1)
    for granularity in ("token", "sequence"):
        kwargs = {"density": HALF, "granularity": granularity}
        plain = masked.logits(ids, masked_from=PROMPT, **kwargs)
        shifted = masked.logits(padded, attention_mask, masked_from=PROMPT + 3, **kwargs)
        assert_close(shifted.logits[:, 3:], plain.logits)
        assert torch.equal(shifted.mask_neurons, plain.mask_neurons)


# --- given scores and masks --------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [False, True], ids=["one for all tokens", "one per token"])
def test_given_scores_take_the_place_of_the_predictor(masked: MaskedModel, facts, predictor, ids, spread: bool) -> None:
    generator = np.random.default_rng(2)
    scores = [generator.standard_normal((facts.predicted_layers, n)).astype(np.float32) for n in predictor.units]
    if spread:
        scores = [np.broadcast_to(s, (ROWS, TOKENS - PROMPT, *s.shape)).copy() for s in scores]
    result = masked.logits(ids, density=HALF, masked_from=PROMPT, scores=tuple(scores))
    best = np.sort(scores[0].reshape(-1, 3 * facts.heads)[0])[-6:]
    assert (result.mask_heads == torch.from_numpy(np.isin(scores[0], best))).all()
    forced = masked.logits(ids, density=DENSE, masks=(result.mask_heads, result.mask_neurons))
    assert_close(result.logits, forced.logits)


def test_forced_masks_reproduce_a_free_run(masked: MaskedModel, ids: Tensor) -> None:
    free = masked.logits(ids, density=HALF, masked_from=PROMPT)
    forced = masked.logits(ids, density=DENSE, masks=(free.mask_heads.numpy(), free.mask_neurons.numpy()))
    assert_close(forced.logits, free.logits)
    assert forced.scores_heads is None


def test_model_without_predictor_takes_units_in_checkpoint_order(model, predictor, facts, ids: Tensor) -> None:
    plan = predictor.plan("local")
    heads, neurons = random_masks(facts, TOKENS)
    bare = MaskedModel(model, plan).logits(ids, density=DENSE, masks=(heads, neurons))
    in_order = dataclasses.replace(
        predictor, orders_LF=np.tile(np.arange(facts.ffn, dtype=np.int32), (facts.predicted_layers, 1))
    )
    same = MaskedModel(model, plan, in_order).logits(ids, density=DENSE, masks=(heads, neurons))
    assert torch.equal(bare.logits, same.logits)
    permuted = MaskedModel(model, plan, predictor).logits(ids, density=DENSE, masks=(heads, neurons))
    assert (bare.logits - permuted.logits).abs().max() > EFFECT


# --- in pieces ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("ends", [(4, 9, 14), (6, 7, 8, 14), (14,)])
def test_pieces_equal_the_whole(masked: MaskedModel, ids: Tensor, granularity: str, ends: tuple[int, ...]) -> None:
    attention_mask = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    attention_mask[1, :2] = 0
    kwargs = {"density": HALF, "masked_from": PROMPT, "granularity": granularity}
    whole = masked.logits(ids, attention_mask, **kwargs)
    state, pieces = MaskedState(), []
    for begin, end in zip((0, *ends), ends, strict=False):
        pieces.append(masked.logits(ids[:, begin:end], attention_mask[:, :end], state=state, **kwargs))
    live = attention_mask.bool()
    assert_close(torch.cat([piece.logits for piece in pieces], dim=1)[live], whole.logits[live])
    for name in ("mask_heads", "mask_neurons"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces], dim=1), getattr(whole, name))


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "masked_from says where"),
        ({"masked_from": 0, "granularity": "sequence"}, "no prompt"),
        ({"masked_from": 0, "granularity": "layer"}, "token or sequence"),
        ({"masked_from": 0, "density": [HALF] * 3}, "each of the 2"),
        ({"masked_from": 3, "masks": (torch.ones(2, 4, 3, 4), torch.ones(2, 4, 3, 16))}, "forced masks of shape"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(masked: MaskedModel, ids: Tensor, arguments, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        masked.logits(ids, **{"density": HALF, **arguments})


def test_change_to_sequence_masks_after_the_prompt_is_refused(masked: MaskedModel, ids: Tensor) -> None:
    state = MaskedState()
    masked.logits(ids[:, :PROMPT], density=HALF, masked_from=PROMPT, state=state)
    with pytest.raises(InputError, match="last token is lost"):
        masked.logits(ids[:, PROMPT:], density=HALF, masked_from=PROMPT, granularity="sequence", state=state)


def test_model_without_predictor_refuses_to_choose(model, predictor: Predictor, ids: Tensor) -> None:
    with pytest.raises(InputError, match="without a predictor"):
        MaskedModel(model, predictor.plan("local")).logits(ids, density=HALF, masked_from=0)


# --- loading -----------------------------------------------------------------------------------------------


def test_load_torch_model_gives_transformers_model_of_the_checkpoint(tiny_checkpoint, tiny_model) -> None:
    ids = torch.randint(4, 320, (2, 14), generator=torch.Generator().manual_seed(1))
    model = load_torch_model(resolve(str(tiny_checkpoint), offline=True))
    assert not model.training
    assert model.config._attn_implementation == "eager"
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert all(torch.equal(value, tiny_model.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(dense_logits(model, ids), dense_logits(tiny_model, ids))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            }
        },
    ],
    ids=["plain", "tied with biases", "one head of keys, another base", "scaled positions"],
)  # fmt: skip
def test_load_torch_model_gives_transformers_llama_of_the_folder(changes: dict[str, Any], tmp_path: Path) -> None:
    ids = torch.randint(4, 320, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs = random_llama(LLAMA | changes)
    theirs.save_pretrained(tmp_path / "m")
    model = load_torch_model(resolve_model(str(tmp_path / "m"), offline=True))
    assert model.config._attn_implementation == "eager"
    assert torch.equal(dense_logits(model, ids), dense_logits(theirs, ids))
