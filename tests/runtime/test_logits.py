# SPDX-License-Identifier: Apache-2.0
"""Teacher-forced logits: the same numbers as step by step, in chunks of any size, with any scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from shadowc.runtime import decoder
from shadowc.runtime.engine import Engine
from shadowc.runtime.load import load
from shadowc.runtime.prompts import Batch
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, UnsupportedError
from tests.conftest import TINY

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

FLOAT_TOLERANCE = 2e-5
"""Largest |difference| over the largest |logit|: float32, another order of additions."""
INT8_TOLERANCE = 5e-2
"""The same against unrounded weights: the rounding itself, on a tiny model with large weights."""
PAD, POSITIONS = TINY["pad_token_id"], TINY["max_position_embeddings"]


def random_ids(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, TINY["vocab_size"], (rows, tokens), dtype=np.int64)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def step_by_step(engine: Engine, ids: np.ndarray, density: Density, prompt_tokens: int = 1) -> np.ndarray:
    """The definition of protocol decode: a dense prompt, then one masked token at a time."""
    probe = engine.prober()()
    parts = [probe.step(ids[:, :prompt_tokens], density=density, sparse_tail=0)["logits"]]
    for at in range(prompt_tokens, ids.shape[1]):
        parts.append(probe.step(ids[:, at : at + 1], density=density, sparse_tail=-1)["logits"])
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("fp32", FLOAT_TOLERANCE), ("int8", INT8_TOLERANCE), ("dense", FLOAT_TOLERANCE)]
)
def test_dense_logits_are_those_of_transformers(
    folders: dict[str, Path], tiny_model: OPTForCausalLM, name: str, tolerance: float
) -> None:
    ids = random_ids(2, 30)
    found = load(folders[name]).logits(ids, protocol="dense")
    assert found.dtype == np.float32
    assert difference(found, tiny_model(torch.from_numpy(ids)).logits.numpy()) <= tolerance


@pytest.mark.parametrize("prompt_tokens", [1, 5])
@pytest.mark.parametrize("density", [Density(0.5, 0.5), Density(1.0, 0.25)])
def test_decode_logits_are_those_of_single_steps(engine: Engine, density: Density, prompt_tokens: int) -> None:
    ids = random_ids(1, 40)
    found = engine.logits(ids, density, prompt_tokens=prompt_tokens)
    assert difference(found, step_by_step(engine, ids, density, prompt_tokens)) <= FLOAT_TOLERANCE
    assert difference(found, engine.logits(ids, protocol="dense")) > 100 * FLOAT_TOLERANCE


def test_chunks_do_not_change_the_numbers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(2, 40)
    whole = engine.logits(ids, 0.5, prompt_tokens=3)
    monkeypatch.setattr(decoder, "CHUNK_TOKENS", 7)
    assert difference(engine.logits(ids, 0.5, prompt_tokens=3), whole) <= FLOAT_TOLERANCE


def test_kernels_and_reference_agree_under_masks(engine: Engine, reference: Engine) -> None:
    ids = random_ids(2, 20)
    found, expected = (one.logits(ids, Density(0.5, 0.2)) for one in (engine, reference))
    assert difference(found, expected) <= FLOAT_TOLERANCE


def test_padded_rows_equal_single_rows_and_padding_counts_for_nothing(engine: Engine) -> None:
    ids = random_ids(2, 20)
    ids[1, :8] = PAD
    together = engine.logits(ids, 0.5, prompt_tokens=2)
    counted = engine.last_stats.tokens
    alone = [engine.logits(ids[:1], 0.5, prompt_tokens=2), engine.logits(ids[1:, 8:], 0.5, prompt_tokens=2)]
    assert difference(together[0], alone[0][0]) <= FLOAT_TOLERANCE
    assert difference(together[1, 8:], alone[1][0]) <= FLOAT_TOLERANCE
    assert counted == 18 + 10


def test_a_mask_means_the_same_as_leading_pad_tokens(engine: Engine) -> None:
    ids = random_ids(2, 12)
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    padded = np.where(mask == 1, ids, PAD)
    found, expected = engine.logits(ids, 0.5, attention_mask=mask), engine.logits(padded, 0.5)
    np.testing.assert_array_equal(found[0, 5:], expected[0, 5:])


def test_stats_of_logits_count_the_masked_tokens(engine: Engine) -> None:
    engine.logits(random_ids(1, 30), Density(0.5, 0.25))
    assert engine.last_stats.tokens == 29
    assert engine.last_stats.active_head_share == 0.5
    assert engine.last_stats.active_neuron_share == 0.25
    engine.logits(random_ids(1, 30), protocol="dense")
    assert engine.last_stats.tokens == 0


def test_trace_shows_the_masks_that_were_counted(engine: Engine) -> None:
    ids = random_ids(2, 15)
    trace = engine.trace(ids, Density(0.5, 0.25), prompt_tokens=3)
    assert trace.mask("heads").shape == (2, 12, 3, 4)
    assert trace.mask("neurons").shape == (2, 12, 3, 16)
    for kind in ("heads", "neurons"):
        np.testing.assert_array_equal(trace.mask(kind).sum(axis=3), trace.active[kind])
    np.testing.assert_array_equal(trace.logits, engine.logits(ids, Density(0.5, 0.25), prompt_tokens=3))


def test_a_trace_of_dense_tokens_alone_is_refused(engine: Engine) -> None:
    ids = random_ids(1, 5)
    with pytest.raises(InputError, match="none of the 1 tokens is under a mask"):
        engine.trace(ids[:, :1], 0.5)
    with pytest.raises(InputError, match="none of the 5 tokens is under a mask"):
        engine.trace(ids, 0.5, prompt_tokens=5)


def test_the_predictors_own_scores_as_inputs_change_nothing(engine: Engine) -> None:
    ids = random_ids(1, 25)
    trace = engine.trace(ids, 0.5)
    given: list[int] = []

    def replay(tokens: int) -> tuple[np.ndarray, np.ndarray]:
        start = sum(given)
        given.append(tokens)
        heads, neurons = (trace.scores[kind][:, start : start + tokens] for kind in ("heads", "neurons"))
        return heads, neurons

    found = engine.logits(ids, 0.5, scores=replay)
    assert difference(found, trace.logits) <= FLOAT_TOLERANCE
    assert sum(given) == 24


def constant(heads: np.ndarray, neurons: np.ndarray) -> Any:
    return lambda tokens: (np.repeat(heads[None, None], tokens, 1), np.repeat(neurons[None, None], tokens, 1))


def test_constant_scores_reach_every_token_of_every_row(engine: Engine) -> None:
    ranking = engine.controls("static")
    ids = random_ids(2, 12)
    together = engine.logits(ids, 0.5, scores=constant(ranking.heads, ranking.neurons))
    assert engine.last_stats.active_head_share == 0.5
    alone = engine.logits(ids[1:], 0.5, scores=constant(ranking.heads, ranking.neurons))
    assert difference(together[1], alone[0]) <= FLOAT_TOLERANCE
    reversed_ = engine.logits(ids, 0.5, scores=constant(-ranking.heads, -ranking.neurons))
    assert difference(reversed_, together) > 100 * FLOAT_TOLERANCE


def test_an_unknown_control_is_refused_with_the_known_ones(engine: Engine, folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="it has: static"):
        engine.controls("dejavu")
    with pytest.raises(InputError, match="it has: none"):
        load(folders["dense"]).controls("static")


def test_protocols_that_need_another_mask_are_refused(engine: Engine) -> None:
    with pytest.raises(UnsupportedError, match="mask for every token"):
        engine.logits(random_ids(1, 5), protocol="prompt")
    with pytest.raises(InputError, match="unknown protocol"):
        engine.logits(random_ids(1, 5), protocol="prefill")  # type: ignore[arg-type]


def test_the_whole_context_is_served_and_no_more(engine: Engine) -> None:
    assert engine.logits(random_ids(1, POSITIONS), 0.5).shape == (1, POSITIONS, TINY["vocab_size"])
    with pytest.raises(InputError, match=f"{POSITIONS + 1} tokens"):
        engine.logits(random_ids(1, POSITIONS + 1), 0.5)
    with pytest.raises(InputError, match="prompt_tokens"):
        engine.logits(random_ids(1, 5), 0.5, prompt_tokens=-1)


def test_the_calibration_text_is_refused(engine: Engine, folders: dict[str, Path]) -> None:
    from shadowc.sparsity.fingerprint import fingerprint

    text = "Prose that calibrated the predictor. " * 20
    engine.refuse_calibration_text(text)
    learned = load(folders["fp32"], verify=False)
    sparsity = learned.manifest.sparsity
    assert sparsity is not None
    meta = {"text": fingerprint(text.encode(), [text]).to_meta()}
    learned.manifest = learned.manifest.model_copy(update={"sparsity": sparsity.model_copy(update={"predictor": meta})})
    with pytest.raises(InputError, match="calibrated"):
        learned.refuse_calibration_text(text)


def test_a_batch_knows_its_mask_and_its_margin() -> None:
    batch = Batch(np.array([[1, 1, 5], [1, 6, 7]]), np.array([2, 1]))
    assert batch.mask(4).tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert batch.trimmed().mask(2).tolist() == [[0, 1], [1, 1]]
