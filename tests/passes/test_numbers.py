# SPDX-License-Identifier: Apache-2.0
"""What the graphs compute, in stock ONNX Runtime with the operators as ONNX functions, against torch.

Letters: B batch, S new tokens, Z masked tokens, L predicted layers, N units of a kind.
"""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch

from shadowc.emit.records import groups, materialise
from shadowc.sparsity.reference import MaskedModel, MaskedResult, MaskedState
from shadowc.spec.density import Density
from shadowc.spec.program import Program, SparsityPlan
from tests.emit.unpack import dequantise, unpack_attention, unpack_ffn
from tests.trace import deep

FP32 = 2e-5
"""Largest difference of logits of size 4 through eleven layers, float32 against float32."""
NARROW = 3e-3
"""The same where weights are compared dequantised, and both sides keep keys and values in float16 (HALF_CACHE)."""
HALF_CACHE = 2.0**-9
"""Largest difference of keys and values that both sides round to float16, of the largest: where float32 sums differ in
their last bits some are rounded to neighbours, 2^-10 apart, in each of eleven layers."""
NEAR_TIE = 1e-5
"""A unit may differ if its score is this close to the threshold, as a share of the range of its layer's scores."""
STEPS = ((0, 7), (7, 8), (8, 9), (9, 10))
IDS, MASK = deep.padded_batch()
LIVE = MASK.astype(bool)


@cache
def _decoder(plan: SparsityPlan | None, weights: str) -> deep.Decoder:
    source = deep.Tensors(plan.block if plan else 1)
    return deep.Decoder(deep.filled(deep.compiled(plan, weights=weights), source), batch=2)


def decode(decoder: deep.Decoder, steps=STEPS, **dials: np.ndarray) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """Feed the padded batch piece by piece; returns the logits of all tokens and every call's results."""
    decoder.reset(len(IDS))
    found = [decoder(IDS[:, start:end], MASK[:, :end], **dials) for start, end in steps]
    return np.concatenate([call["logits"] for call in found], axis=1), found


def distance(logits: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference at real tokens."""
    difference = np.abs(logits - expected)[LIVE]
    return float(difference.max()) if np.isfinite(difference).all() else np.inf


def masks_of(found: list[dict[str, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The masks that the engine's own scores and thresholds mean, [B,Z,L,N] over all calls."""
    kept = {
        kind: np.concatenate(
            [~(call[f"scores.{kind}"] < call[f"threshold.{kind}"][..., None]) for call in found], axis=1
        )
        for kind in ("heads", "neurons")
    }
    return torch.from_numpy(kept["heads"]), torch.from_numpy(kept["neurons"])


def assert_same_selection(found: list[dict[str, np.ndarray]], free: MaskedResult) -> None:
    """The engine chose the units that torch chooses, near ties aside, and counted them."""
    for kind, mask, scores, threshold in (
        ("heads", free.mask_heads, free.scores_heads, free.threshold_heads),
        ("neurons", free.mask_neurons, free.scores_neurons, free.threshold_neurons),
    ):
        mine = masks_of(found)[kind == "neurons"].numpy()
        gap = np.abs(scores.numpy() - threshold.numpy()[..., None])
        span = scores.numpy().max(-1, keepdims=True) - scores.numpy().min(-1, keepdims=True)
        differs = (mine != mask.numpy()) & LIVE[:, -mine.shape[1] :, None, None]
        assert not (differs & (gap > NEAR_TIE * span)).any()
        active = np.concatenate([call[f"active.{kind}"] for call in found], axis=1)
        np.testing.assert_array_equal(active, mine.sum(-1))


def test_trace_and_canonical_graph_equal_transformers_when_the_cache_grows() -> None:
    expected = deep.torch_logits(IDS, MASK)
    for program in (deep.traced(), deep.compiled(until="canonicalise")):
        decoder = deep.Decoder(deep.filled(program, deep.Tensors()), batch=2, capacity=0)
        logits = [decoder(IDS[:, start:end], MASK[:, :end])["logits"] for start, end in STEPS]
        assert distance(np.concatenate(logits, axis=1), expected) < FP32


@pytest.mark.parametrize("plan", [deep.plan(), None], ids=["sparse", "dense"])
def test_graph_equals_transformers_when_everything_is_kept(plan: SparsityPlan | None) -> None:
    dials = deep.dials(1.0) if plan else {}
    logits, _ = decode(_decoder(plan, "fp32"), **dials)
    assert distance(logits, deep.torch_logits(IDS, MASK)) < FP32


@pytest.mark.parametrize("kept", [(0.5, 0.5), (0.2, 0.2), (0.5, 0.2), (0.0, 0.0)])
@pytest.mark.parametrize(
    "plan",
    [
        deep.plan(),
        deep.plan(scope="local", exempt=(0, 9), min_active_heads=1, min_active_neurons=2),
        deep.plan(block=1),
    ],
    ids=["global", "local", "single"],
)
def test_sparse_steps_equal_the_masked_torch_model(plan: SparsityPlan, kept: tuple[float, float]) -> None:
    reference = MaskedModel(deep.model(), plan, deep.predictor(plan.block))
    logits, found = decode(_decoder(plan, "fp32"), **deep.dials(*kept))
    forced = reference.logits(IDS, MASK, density=Density(*kept), masks=masks_of(found))
    assert distance(logits, forced.logits.numpy()) < FP32
    assert_same_selection(found, reference.logits(IDS, MASK, density=Density(*kept), masked_from=7))
    assert distance(logits, deep.torch_logits(IDS, MASK)) > 100 * FP32  # masks do matter


def test_rows_may_have_their_own_densities() -> None:
    reference = MaskedModel(deep.model(), deep.plan(), deep.predictor())
    logits, found = decode(_decoder(deep.plan(), "fp32"), **deep.dials([1.0, 0.2]))
    rows = [Density(1.0, 1.0), Density(0.2, 0.2)]
    forced = reference.logits(IDS, MASK, density=rows, masks=masks_of(found))
    assert distance(logits, forced.logits.numpy()) < FP32
    assert [int(call["active.heads"][0].sum()) for call in found[1:]] == [40] * 3


@pytest.mark.parametrize(
    ("steps", "tail", "first"), [(((0, 10),), 3, 7), (((0, 6), (6, 10)), 99, 0)], ids=["last three", "all"]
)
def test_teacher_forced_text_is_masked_in_the_sparse_tail(steps, tail: int, first: int) -> None:
    reference = MaskedModel(deep.model(), deep.plan(), deep.predictor())
    logits, found = decode(_decoder(deep.plan(), "fp32"), steps, **deep.dials(0.5, tail=tail))
    forced = reference.logits(IDS, MASK, density=Density(0.5, 0.5), masks=masks_of(found))
    assert distance(logits, forced.logits.numpy()) < FP32
    assert_same_selection(found, reference.logits(IDS, MASK, density=Density(0.5, 0.5), masked_from=first))


@pytest.mark.parametrize(
    ("tokens", "tail", "masked"),
    [(1, -1, 1), (5, -1, 0), (1, -7, 1), (1, 0, 0), (5, 0, 0), (5, 3, 3), (5, 5, 5), (5, 99, 5), (1, 2, 1)],
)
def test_sparse_tail_is_clamped_and_mask_scores_are_the_last_row(tokens: int, tail: int, masked: int) -> None:
    decoder = _decoder(deep.plan(), "fp32")
    decoder.reset(2)
    found = decoder(IDS[:, -tokens:], np.ones((2, tokens), np.int64), **deep.dials(0.5, tail=tail))
    everything = decoder.reset(2) or decoder(
        IDS[:, -tokens:], np.ones((2, tokens), np.int64), **deep.dials(0.5, tail=tokens)
    )
    for kind, units in (("heads", 4), ("neurons", 13)):
        assert found[f"scores.{kind}"].shape == (2, masked, 10, units)
        assert found[f"threshold.{kind}"].shape == found[f"active.{kind}"].shape == (2, masked, 10)
        np.testing.assert_allclose(
            found[f"mask_scores.{kind}"], everything[f"scores.{kind}"][:, -1:], rtol=1e-4, atol=1e-5
        )


def test_scores_are_finite_when_a_row_begins_with_pads_that_see_nothing() -> None:
    _, found = decode(_decoder(deep.plan(), "fp32"), ((0, 10),), **deep.dials(0.5, tail=10))
    assert np.isfinite(found[0]["scores.heads"]).all()
    assert np.isfinite(found[0]["logits"]).all()


@cache
def _dequantised(weights: str) -> torch.nn.Module:
    """The torch model with the weights that the graph really multiplies with, and its rounding of keys and values."""
    program, source = deep.compiled(deep.plan(), weights=weights), deep.Tensors()
    model = copy.deepcopy(deep.model())
    for name, module in model.named_modules():
        if name.endswith(("k_proj", "v_proj")):
            module.register_forward_hook(lambda _, __, projected: projected.half().float())
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    state = model.state_dict()
    for names in groups(program.weights):
        recipe = program.weights[names[0]]
        if len(names) == 1 or recipe.sources[0].startswith("predictor."):
            continue
        made = materialise(program.weights, source, names)
        by_kind = {program.weights[name].kind: array for name, array in made.items()}
        if "ffn_records" in by_kind:
            order = source.tensor(recipe.order) if recipe.order else None
            matrices = unpack_ffn(by_kind["ffn_records"], by_kind["ffn_scales"], order)
        elif "attention_records" in by_kind:
            matrices = unpack_attention(by_kind["attention_records"], by_kind["attention_scales"])
        else:
            matrices = (dequantise(by_kind["network_rows"], by_kind["network_scales"]),)
        for name, matrix in zip(recipe.sources, matrices, strict=True):
            state[name].copy_(torch.from_numpy(matrix))
    return model


@pytest.mark.parametrize(
    ("weights", "kept"), [("bf16", 0.5), ("int8", 1.0), ("int8", 0.5), ("int8", 0.2), ("int4", 1.0), ("int4", 0.5)]
)
def test_narrow_graph_equals_torch_with_dequantised_weights(weights: str, kept: float) -> None:
    logits, found = decode(_decoder(deep.plan(), weights), **deep.dials(kept))
    reference, state = MaskedModel(_dequantised(weights), deep.plan(), deep.predictor()), MaskedState()
    forced = reference.logits(IDS, MASK, density=Density(kept, kept), masks=masks_of(found), state=state)
    assert distance(logits, forced.logits.numpy()) < NARROW
    # before the LM head nothing but the cache is rounded a second time
    for layer, cached in enumerate(state.cache.layers):
        for kind, expected in (("key", cached.keys), ("value", cached.values)):
            mine_BHTD = found[-1][f"present.{layer}.{kind}"][:, :, : IDS.shape[1]]
            assert mine_BHTD.dtype == np.float16
            wanted = expected.numpy().swapaxes(1, 2)
            assert distance(mine_BHTD.swapaxes(1, 2), wanted) < HALF_CACHE * np.abs(wanted[LIVE]).max()


def _swap_sources(program: Program, name: str, first: int, second: int) -> None:
    import dataclasses

    recipe = program.weights[name]
    sources = list(recipe.sources)
    sources[first], sources[second] = sources[second], sources[first]
    program.weights[name] = dataclasses.replace(recipe, sources=tuple(sources))


def _node(program: Program, name: str):
    return next(node for node in program.graph.nodes if node.name == name)


def _positions_off_by_one(program: Program) -> None:
    offset = _node(program, "positions").inputs[1]
    offset.values = offset.values + 1


def _key_and_value_swapped(program: Program) -> None:
    _swap_sources(program, "layers.10.attention.w", 1, 2)


def _cache_of_another_layer(program: Program) -> None:
    _node(program, "layers.1.attention").inputs[7] = _node(program, "layers.10.attention").inputs[7]


def _scores_of_another_layer(program: Program) -> None:
    _node(program, "layers.5.ffn").attrs["layer"] = 5


def _ffn_mask_ignored(program: Program) -> None:
    ffn, dense = _node(program, "layers.5.ffn"), _node(program, "layers.0.ffn")
    ffn.inputs[1], ffn.inputs[2] = dense.inputs[1], dense.inputs[2]
    ffn.attrs["layer"] = 0


def _density_ignored(program: Program) -> None:
    import onnx_graphsurgeon as gs

    _node(program, "select.heads").inputs[1] = gs.Constant("one", np.ones(1, np.float32))


def _neurons_in_another_order(program: Program) -> None:
    import dataclasses

    for part in ("w", "scales", "b1"):
        name = f"layers.5.ffn.{part}"
        program.weights[name] = dataclasses.replace(program.weights[name], order="")


@pytest.mark.parametrize(
    "defect",
    [
        _positions_off_by_one, _key_and_value_swapped, _cache_of_another_layer, _scores_of_another_layer,
        _ffn_mask_ignored, _density_ignored, _neurons_in_another_order,
    ],
    ids=lambda defect: defect.__name__.strip("_"),
)  # fmt: skip
def test_planted_defect_moves_the_logits_far_beyond_the_tolerance(defect) -> None:
    program = deep.compiled(deep.plan())
    sound = deep.Decoder(deep.filled(deep.compiled(deep.plan()), deep.Tensors()), batch=2)
    defect(program)
    decoder = deep.Decoder(deep.filled(program, deep.Tensors()), batch=2)
    reference = MaskedModel(deep.model(), deep.plan(), deep.predictor())
    logits, _ = decode(decoder, **deep.dials(0.5))
    free = reference.logits(IDS, MASK, density=Density(0.5, 0.5), masked_from=7)
    assert distance(logits, free.logits.numpy()) > 100 * FP32
    assert distance(decode(sound, **deep.dials(0.5))[0], free.logits.numpy()) < FP32
