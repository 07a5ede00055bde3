# SPDX-License-Identifier: Apache-2.0
"""Masks that hold for a sequence: the masked torch model's numbers, less read, nothing written for inactive heads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from shadowc.measure.evaluate import evaluate
from shadowc.runtime import decoder
from shadowc.runtime.load import load_cpu
from shadowc.runtime.prompts import from_ids
from shadowc.runtime.sequence import SequenceDecoder
from shadowc.runtime.sequence_engine import SequenceEngine
from shadowc.sparsity.reference import MaskedModel
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, UnsupportedError
from shadowc.spec.manifest import FIXED_FILE
from shadowc.spec.program import SparsityPlan
from tests.conftest import TINY
from tests.emit import engines, handmade

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

    from shadowc.runtime.engine import Engine

TOLERANCE = 2e-5
"""Largest |difference| over the largest |logit|: float32, another order of additions."""
EFFECT = 100 * TOLERANCE
"""What another mask must change at least."""
DENSITIES = [Density(0.5, 0.5), Density(0.2, 0.2), Density(0.5, 0.2)]
TEXT = "One neuron is one record, and a record that is not read costs nothing. " * 6
PAD, POSITIONS = TINY["pad_token_id"], TINY["max_position_embeddings"]
LAYERS, HEADS, UNITS = 3, 4, 16
"""Predicted layers of the tiny model, and units of each."""


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> SequenceEngine:
    return sequence_engine(folders)


@pytest.fixture(scope="module")
def masked(tiny_model: OPTForCausalLM) -> MaskedModel:
    """The masked torch model with the predictor of the handmade engines."""
    named = handmade.predictor_tensors(engines.tiny_facts(), engines.BLOCK)

    class Predictor:
        def tensors(self) -> dict[str, np.ndarray]:
            return {name.removeprefix("predictor."): tensor for name, tensor in named.items()}

    plan = SparsityPlan(handmade.WIDTH, handmade.WIDTH, engines.BLOCK, "global")
    return MaskedModel(tiny_model, plan, Predictor())


def sequence_engine(folders: dict[str, Path], **options: Any) -> SequenceEngine:
    found = load_cpu(folders["sequence"], threads=2, **options)
    assert isinstance(found, SequenceEngine)
    return found


def random_ids(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, TINY["vocab_size"], (rows, tokens), dtype=np.int64)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def without_end(logits: np.ndarray) -> np.ndarray:
    """Logits that do not choose the end token, as `min_new_tokens` has it."""
    return np.where(np.arange(logits.shape[-1]) == TINY["eos_token_id"], -np.inf, logits)


# --- the numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", DENSITIES)
def test_generated_tokens_are_those_of_the_masked_torch_model(
    engine: SequenceEngine, masked: MaskedModel, density: Density
) -> None:
    """Each token is the one that torch chooses after all before it, so torch alone would generate the same."""
    found = engine.generate(random_ids(2, 9), max_new_tokens=20, min_new_tokens=20, density=density)
    wanted = masked.logits(found, density=density, masked_from=9, granularity="sequence").logits.numpy()
    np.testing.assert_array_equal(found[:, 9:], without_end(wanted[:, 8:-1]).argmax(axis=-1))


@pytest.mark.parametrize("prompt_tokens", [1, 6])
@pytest.mark.parametrize("density", DENSITIES)
def test_logits_are_those_of_the_masked_torch_model(
    engine: SequenceEngine, masked: MaskedModel, density: Density, prompt_tokens: int
) -> None:
    ids = random_ids(2, 30)
    found = engine.logits(ids, density, "prompt", prompt_tokens=prompt_tokens)
    wanted = masked.logits(ids, density=density, masked_from=prompt_tokens, granularity="sequence").logits.numpy()
    assert difference(found, wanted) <= TOLERANCE
    assert difference(found, engine.logits(ids, density, "decode", prompt_tokens=prompt_tokens)) > EFFECT


def test_rows_whose_prompts_end_elsewhere_are_those_of_the_masked_torch_model(
    engine: SequenceEngine, masked: MaskedModel
) -> None:
    ids, mask = random_ids(2, 24), np.ones((2, 24), np.int64)
    mask[1, :9] = 0
    found = engine.logits(ids, 0.5, "prompt", prompt_tokens=4, attention_mask=mask)
    wanted = masked.logits(
        ids, mask, density=Density(0.5, 0.5), masked_from=torch.tensor([4, 13]), granularity="sequence"
    ).logits.numpy()
    assert difference(found[0], wanted[0]) <= TOLERANCE
    assert difference(found[1, 9:], wanted[1, 9:]) <= TOLERANCE


def test_the_reference_graph_generates_and_scores_the_same(engine: SequenceEngine, folders: dict[str, Path]) -> None:
    reference = sequence_engine(folders, reference=True)
    ids = random_ids(2, 12, seed=4)
    found, wanted = (one.generate(ids, max_new_tokens=12, density=0.5) for one in (engine, reference))
    np.testing.assert_array_equal(found, wanted)
    found, wanted = (one.logits(ids, 0.5, "prompt", prompt_tokens=5) for one in (engine, reference))
    assert difference(found, wanted) <= TOLERANCE


def test_chunks_do_not_change_the_numbers(engine: SequenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(2, 40)
    again = engine.with_refresh(6)
    whole = [one.logits(ids, 0.5, "prompt", prompt_tokens=10) for one in (engine, again)]
    new = [one.generate(ids, max_new_tokens=5, density=0.5) for one in (engine, again)]
    monkeypatch.setattr(decoder, "CHUNK_TOKENS", 7)
    for one, wanted in zip((engine, again), whole, strict=True):
        assert difference(one.logits(ids, 0.5, "prompt", prompt_tokens=10), wanted) <= TOLERANCE
    for one, wanted in zip((engine, again), new, strict=True):
        np.testing.assert_array_equal(one.generate(ids, max_new_tokens=5, density=0.5), wanted)


def test_density_one_is_dense(engine: SequenceEngine, tiny_model: OPTForCausalLM) -> None:
    ids = random_ids(1, 20)
    wanted = tiny_model(torch.from_numpy(ids)).logits.numpy()
    assert difference(engine.logits(ids, 1.0, "prompt", prompt_tokens=3), wanted) <= TOLERANCE


# --- rows ----------------------------------------------------------------------------------------------------


def steps(engine: Engine, ids: np.ndarray, densities: np.ndarray, tokens: int = 10) -> np.ndarray:
    """Logits [B,tokens,V] of greedy steps after a prompt, each row at its own density."""
    batch = from_ids(ids, None, engine.model)
    running = engine._decoder(batch, batch.slots + tokens)
    logits = [running.prefill(batch.ids)]
    running.set_density(densities, densities)
    for _ in range(tokens - 1):
        logits.append(running.step(logits[-1].argmax(axis=1))["logits"][:, 0].copy())
    return np.stack(logits, axis=1)


UNEQUAL = np.array([9, 5, 1])
MIXED = np.array([0.5, 0.2, 1.0], np.float32)


def unequal_rows() -> np.ndarray:
    ids = random_ids(3, 9, seed=6)
    for row, tokens in enumerate(UNEQUAL):
        ids[row, : 9 - tokens] = PAD
    return ids


@pytest.mark.parametrize("refresh", [0, 3])
def test_left_padded_rows_of_mixed_densities_equal_their_single_runs_bit_for_bit(
    engine: SequenceEngine, refresh: int
) -> None:
    one = engine.with_refresh(refresh)
    together = steps(one, unequal_rows(), MIXED)
    for row, tokens in enumerate(UNEQUAL):
        alone = steps(one, unequal_rows()[row : row + 1, 9 - tokens :], MIXED[row : row + 1])[0]
        np.testing.assert_array_equal(together[row], alone)


def test_a_finished_row_computes_nothing_and_leaves_the_others_alone(engine: SequenceEngine) -> None:
    ids = random_ids(2, 7)
    batch = from_ids(ids, None, engine.model)
    running = engine._decoder(batch, 20)
    running.prefill(batch.ids)
    running.set_density(0.5, 0.5)
    running.mute(0)
    muted = running.step(np.array([5, 6]))
    assert not muted["active.heads"][0].any()
    assert not muted["active.neurons"][0].any()
    assert muted["active.heads"][1].sum() == LAYERS * HEADS // 2


# --- what is read and written --------------------------------------------------------------------------------


def test_weights_of_inactive_units_are_not_read_and_no_predictor_is(folders: dict[str, Path]) -> None:
    exact = sequence_engine(folders, skip_zeros=False)
    exact.generate(random_ids(1, 6), max_new_tokens=9, min_new_tokens=9, density=Density(0.5, 0.25))
    stats, fixed = exact.last_stats, exact.manifest.bytes_per_token
    assert (stats.active_head_share, stats.active_neuron_share) == (0.5, 0.25)
    E, D, F = 64, 16, 256
    head, neuron = 4 * D * (E + 1) * 4, 2 * (E + 1) * 4
    wanted = (HEADS + LAYERS * HEADS / 2) * head + (F + LAYERS * F / 4) * neuron  # no K/V of inactive heads
    assert stats.bytes_read_kernels == pytest.approx(wanted)
    assert stats.bytes_read == pytest.approx(wanted + fixed.lm_head + fixed.other)


def keys_and_values(running: SequenceDecoder) -> Iterator[tuple[int, np.ndarray]]:
    for name, buffer in running._cache._past.items():
        yield int(name.split(".")[0]), buffer


@pytest.mark.parametrize("refresh", [0, 100])
def test_only_a_mask_that_may_change_lets_inactive_heads_write_k_and_v(engine: SequenceEngine, refresh: int) -> None:
    one = engine.with_refresh(refresh)
    batch = from_ids(random_ids(1, 6), None, one.model)
    running = one._decoder(batch, 12)
    running.prefill(batch.ids)
    running.set_density(0.5, 0.5)
    for _, buffer in keys_and_values(running):
        buffer[:, :, 6:] = 7.0
    threshold = running.feed(np.array([[5, 6, 7]]), sparse_tail=3, outputs=("threshold.heads",))["threshold.heads"]
    running.step(np.array([8]))
    active_LH = running.mask["heads"][0, 0] >= threshold[0, 0, :, None]
    assert active_LH.sum() == LAYERS * HEADS // 2
    for layer, buffer in keys_and_values(running):
        written_H = (buffer[0, :, 6:10] != 7.0).all(axis=(1, 2))
        untouched_H = (buffer[0, :, 6:10] == 7.0).all(axis=(1, 2))
        wanted_H = np.ones(HEADS, bool) if layer == 0 or refresh else active_LH[layer - 1]
        np.testing.assert_array_equal(written_H, wanted_H)
        np.testing.assert_array_equal(untouched_H, ~wanted_H)


def test_a_step_neither_selects_nor_binds_a_mask_that_stays(
    engine: SequenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shadowc.runtime.session import Binding

    batch = from_ids(random_ids(1, 6), None, engine.model)
    running = engine._decoder(batch, 12)
    running.prefill(batch.ids)
    running.step(np.array([5]))
    bound: list[str] = []
    honest = Binding.give
    monkeypatch.setattr(Binding, "give", lambda self, name, array: (bound.append(name), honest(self, name, array))[1])
    running.step(np.array([6]))
    assert not bound
    running.mute(0)
    running.step(np.array([7]))
    assert {"mask_scores.heads", "density_heads"} <= set(bound)


# --- refresh -------------------------------------------------------------------------------------------------


def refreshed_masks(masked: MaskedModel, ids: np.ndarray, prompt: int, refresh: int, density: Density) -> Any:
    """The masks of every token after the prompt if each `refresh`-th token makes one; the prompt's last is the first.

    Scores depend on layer 0 alone, so a token's own mask is the same whatever masks the others have.
    """
    own = masked.logits(ids, density=density, masked_from=prompt - 1)
    makers = np.arange(1, ids.shape[1] - prompt + 1) // refresh * refresh
    return own.mask_heads[:, makers], own.mask_neurons[:, makers]


@pytest.mark.parametrize("refresh", [1, 3, 100])
def test_refresh_makes_a_fresh_mask_every_so_many_tokens(
    engine: SequenceEngine, masked: MaskedModel, refresh: int
) -> None:
    density, prompt, ids = Density(0.5, 0.2), 5, random_ids(2, 20)
    again = engine.with_refresh(refresh)
    masks = refreshed_masks(masked, ids, prompt, refresh, density)
    wanted = masked.logits(ids, density=density, masks=masks).logits.numpy()
    assert difference(again.logits(ids, density, "prompt", prompt_tokens=prompt), wanted) <= TOLERANCE
    new = again.generate(ids[:, :prompt], max_new_tokens=12, min_new_tokens=12, density=density)
    masks = refreshed_masks(masked, new, prompt, refresh, density)
    free = masked.logits(new, density=density, masks=masks).logits.numpy()[:, prompt - 1 : -1]
    np.testing.assert_array_equal(without_end(free).argmax(axis=-1), new[:, prompt:])


def test_refresh_at_every_token_is_a_mask_per_token(engine: SequenceEngine) -> None:
    ids, each = random_ids(2, 20), engine.with_refresh(1)
    found = each.logits(ids, 0.5, "prompt", prompt_tokens=4)
    assert difference(found, engine.logits(ids, 0.5, "decode", prompt_tokens=4)) <= TOLERANCE
    assert difference(found, engine.logits(ids, 0.5, "prompt", prompt_tokens=4)) > EFFECT
    never = engine.with_refresh(1000).logits(ids, 0.5, "prompt", prompt_tokens=4)
    assert difference(never, engine.logits(ids, 0.5, "prompt", prompt_tokens=4)) <= TOLERANCE


def test_a_refreshed_mask_without_the_k_and_v_of_all_heads_is_caught(
    engine: SequenceEngine, masked: MaskedModel
) -> None:
    density, ids = Density(0.5, 0.5), random_ids(1, 25)
    planted = engine.with_refresh(2)
    planted._fixed = engine._fixed
    masks = refreshed_masks(masked, ids, 5, 2, density)
    wanted = masked.logits(ids, density=density, masks=masks).logits.numpy()
    assert difference(planted.logits(ids, density, "prompt", prompt_tokens=5), wanted) > EFFECT


def test_refreshing_is_counted_where_it_happens(folders: dict[str, Path]) -> None:
    counted = []
    for refresh in (0, 4):
        exact = sequence_engine(folders, skip_zeros=False, refresh=refresh)
        exact.generate(random_ids(1, 6), max_new_tokens=9, min_new_tokens=9, density=1.0)
        counted.append(exact.last_stats)
    never, twice = counted  # at density 1 all K/V are written either way
    context = 4 * HEADS * 16 * (64 + 1) * 4
    assert (twice.bytes_read_kernels - never.bytes_read_kernels) * 8 == pytest.approx(2 * context)
    predictor = exact.manifest.bytes_per_token.predictor
    assert (twice.bytes_read - never.bytes_read) * 8 == pytest.approx(2 * (context + predictor))


# --- quality -------------------------------------------------------------------------------------------------


def test_bits_under_a_mask_per_sequence_are_those_of_its_own_protocol(engine: SequenceEngine) -> None:
    """Refreshed at every token it is the protocol decode after the same prompt, and only then."""
    cut: dict[str, Any] = {"densities": [Density(0.5, 0.25)], "window": 32, "prompt_tokens": 8}
    held, fresh = (evaluate(one, TEXT, methods=["predictor"], **cut) for one in (engine, engine.with_refresh(1)))
    token = evaluate(engine, TEXT, methods=["predictor"], protocol="decode", **cut)
    assert (held.protocol, held.prompt_tokens, token.protocol) == ("prompt", 8, "decode")
    assert fresh.rows[0].bits_per_byte == pytest.approx(token.rows[0].bits_per_byte, rel=1e-5)
    assert held.rows[0].bits_per_byte != pytest.approx(token.rows[0].bits_per_byte, rel=1e-3)
    assert held.dense == pytest.approx(token.dense, rel=1e-5)
    for row in (held.rows[0], fresh.rows[0], token.rows[0]):
        assert (row.active_heads, row.active_neurons) == pytest.approx((0.5, 0.25), abs=0.02)


# --- controls and other protocols ----------------------------------------------------------------------------


def test_controls_take_the_place_of_the_predictor(engine: SequenceEngine, masked: MaskedModel) -> None:
    ranking, ids, density = engine.controls("static"), random_ids(2, 20), Density(0.5, 0.5)
    found = engine.logits(
        ids, density, "prompt", prompt_tokens=4,
        scores=lambda tokens: (
            np.repeat(ranking.heads[None, None], tokens, axis=1),
            np.repeat(ranking.neurons[None, None], tokens, axis=1),
        ),
    )  # fmt: skip
    scores = (ranking.heads, ranking.neurons)
    wanted = masked.logits(ids, density=density, masked_from=4, scores=scores).logits.numpy()
    assert difference(found, wanted) <= TOLERANCE
    assert engine.last_stats.active_head_share == 0.5


def test_variants_keep_the_mask_of_the_sequence(engine: SequenceEngine, folders: dict[str, Path]) -> None:
    ids = random_ids(1, 20)
    skipping = sequence_engine(folders, skip_zeros=True)
    found, wanted = (one.generate(ids, max_new_tokens=8, density=0.5) for one in (skipping, engine))
    np.testing.assert_array_equal(found, wanted)
    local = engine.with_scope("local")
    assert isinstance(local, SequenceEngine)
    local.logits(ids, 0.5, "prompt", prompt_tokens=4)
    assert local.last_stats.heads_by_layer.tolist() == [4, 2, 2, 2]
    twin = engine.dense_twin()
    assert difference(twin.logits(ids), engine.logits(ids, 1.0, "prompt")) <= TOLERANCE


def test_the_same_folder_runs_with_a_mask_per_token(folders: dict[str, Path], engine: SequenceEngine) -> None:
    ids = random_ids(1, 20)
    token = load_cpu(folders["sequence"], mask="token")
    assert not isinstance(token, SequenceEngine)
    found = token.generate(ids, max_new_tokens=12, density=0.5)
    np.testing.assert_array_equal(found, load_cpu(folders["fp32"]).generate(ids, max_new_tokens=12, density=0.5))
    with pytest.raises(UnsupportedError, match="mask for every token"):
        token.logits(ids, 0.5, "prompt")


def test_a_mask_per_sequence_is_refused_by_an_engine_that_was_not_compiled_for_it(folders: dict[str, Path]) -> None:
    for name, how in (("fp32", "--mask token"), ("dense", "without a predictor")):
        for wish in ({"mask": "sequence"}, {"refresh": 4}):
            with pytest.raises(UnsupportedError, match=how) as caught:
                load_cpu(folders[name], **wish)  # type: ignore[arg-type]
            assert "--mask sequence" in (caught.value.hint or "")


@pytest.mark.parametrize("wish", [{"mask": "token", "refresh": 4}, {"refresh": -1}])
def test_a_refresh_that_means_nothing_is_refused(folders: dict[str, Path], wish: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="refresh"):
        load_cpu(folders["sequence"], **wish)


def test_a_prompt_without_a_token_makes_no_mask(engine: SequenceEngine) -> None:
    with pytest.raises(InputError, match="last token of its prompt"):
        engine.logits(random_ids(1, 5), 0.5, "prompt", prompt_tokens=0)
    with pytest.raises(InputError, match="unknown protocol"):
        engine.logits(random_ids(1, 5), 0.5, "prefill")  # type: ignore[arg-type]


def test_the_whole_context_is_served_and_no_more(engine: SequenceEngine) -> None:
    found = engine.generate(random_ids(1, POSITIONS - 5), max_new_tokens=20, min_new_tokens=20, density=0.5)
    assert found.shape == (1, POSITIONS)
    with pytest.raises(InputError, match=f"{POSITIONS + 1} tokens"):
        engine.logits(random_ids(1, POSITIONS + 1), 0.5, "prompt")


def test_a_folder_without_its_second_graph_is_refused(copied: Any) -> None:
    from shadowc.spec.errors import VerificationError

    folder = copied("sequence")
    (folder / FIXED_FILE).unlink()
    with pytest.raises(VerificationError, match=FIXED_FILE):
        load_cpu(folder)
