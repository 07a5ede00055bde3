# SPDX-License-Identifier: Apache-2.0
"""Generation: greedy as transformers, rows of a batch independent, ends where it must, counted as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from shadowc.runtime.engine import Engine
from shadowc.runtime.load import load
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from tests.conftest import TINY
from tests.emit import engines

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

POSITIONS, PAD, EOS = TINY["max_position_embeddings"], TINY["pad_token_id"], TINY["eos_token_id"]
DENSITIES = [1.0, 0.5, Density(0.5, 0.25), 0.0]


def prompts(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, TINY["vocab_size"], (rows, tokens), dtype=np.int64)


def greedy(model: OPTForCausalLM, ids: np.ndarray, tokens: int) -> np.ndarray:
    out = model.generate(
        torch.from_numpy(ids), attention_mask=torch.from_numpy((ids != PAD).astype(np.int64)), do_sample=False,
        max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=PAD,
    )  # fmt: skip
    return out.numpy()


@pytest.mark.parametrize("rows", [1, 3])
def test_generate_equals_transformers_greedy_when_dense(engine: Engine, tiny_model: OPTForCausalLM, rows: int) -> None:
    ids = prompts(rows, 7)
    found = engine.generate(ids, max_new_tokens=20, min_new_tokens=20, density=1.0)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, greedy(tiny_model, ids, 20))


def test_generate_equals_transformers_when_rows_are_left_padded(engine: Engine, tiny_model: OPTForCausalLM) -> None:
    ids = prompts(3, 9)
    ids[1, :4] = ids[2, :1] = PAD
    found = engine.generate(ids, max_new_tokens=12, min_new_tokens=12, density=1.0)
    np.testing.assert_array_equal(found, greedy(tiny_model, ids, 12))


@pytest.mark.parametrize("density", DENSITIES)
def test_left_padded_rows_equal_single_runs(engine: Engine, density: float | Density) -> None:
    long, short = prompts(1, 9, seed=1)[0], prompts(1, 5, seed=2)[0]
    batch = np.stack([long, np.concatenate([np.full(4, PAD), short])])
    together = engine.generate(batch, max_new_tokens=15, min_new_tokens=15, density=density)
    alone = [
        engine.generate(row[None], max_new_tokens=15, min_new_tokens=15, density=density)[0] for row in (long, short)
    ]
    np.testing.assert_array_equal(together[0], alone[0])
    np.testing.assert_array_equal(together[1, 4:], alone[1])


def test_padding_common_to_all_rows_costs_no_context(engine: Engine) -> None:
    ids = prompts(2, 6)
    padded = np.concatenate([np.full((2, POSITIONS), PAD), ids], axis=1)
    found = engine.generate(padded, max_new_tokens=5, min_new_tokens=5, density=0.5)
    expected = engine.generate(ids, max_new_tokens=5, min_new_tokens=5, density=0.5)
    np.testing.assert_array_equal(found[:, POSITIONS:], expected)


@pytest.mark.parametrize("density", DENSITIES)
def test_kernels_and_reference_generate_the_same(engine: Engine, reference: Engine, density: float | Density) -> None:
    ids = prompts(2, 8, seed=3)
    found, expected = (one.generate(ids, max_new_tokens=12, density=density) for one in (engine, reference))
    np.testing.assert_array_equal(found, expected)
    assert engine.last_stats.heads == reference.last_stats.heads
    assert np.isnan(reference.last_stats.bytes_read)


def test_density_none_is_the_engines_own(engine: Engine) -> None:
    ids = prompts(1, 8)
    assert engine.density == engines.DENSITY
    np.testing.assert_array_equal(
        engine.generate(ids, max_new_tokens=10), engine.generate(ids, max_new_tokens=10, density=engines.DENSITY)
    )


def test_generation_stops_where_the_context_ends(engine: Engine, tiny_model: OPTForCausalLM) -> None:
    ids = prompts(1, POSITIONS - 6)
    found = engine.generate(ids, max_new_tokens=50, min_new_tokens=50, density=1.0)
    assert found.shape == (1, POSITIONS)
    assert engine.last_stats.finish == ("context",)
    np.testing.assert_array_equal(found, greedy(tiny_model, ids, 6))


@pytest.mark.parametrize("tokens", [POSITIONS, POSITIONS + 5])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(engine: Engine, tokens: int) -> None:
    with pytest.raises(InputError, match=f"has {tokens} tokens.*holds {POSITIONS}"):
        engine.generate(prompts(1, tokens))


def test_rows_end_at_their_end_token_and_are_padded(tiny_model: OPTForCausalLM, engine: Engine, tmp_path: Path) -> None:
    ids = prompts(2, 7, seed=4)
    free = engine.generate(ids, max_new_tokens=12, min_new_tokens=12, density=0.5)[:, 7:]
    eos = next(int(token) for at, token in enumerate(free[0]) if at >= 2 and token not in free[1])
    first = int(np.argmax(free[0] == eos))
    engines.write_engine(tmp_path / "e", tiny_model, eos=eos)
    early = load(tmp_path / "e")
    new = early.generate(ids, max_new_tokens=12, density=0.5)[:, 7:]
    np.testing.assert_array_equal(new[0], [*free[0, : first + 1], *[PAD] * (12 - first - 1)])
    np.testing.assert_array_equal(new[1], free[1])
    assert early.last_stats.finish == ("eos", "length")
    assert early.last_stats.tokens == first + 11  # decode steps of the first row and of the second
    model = early.manifest.model.model_copy(update={"pad": eos})
    early.manifest = early.manifest.model_copy(update={"model": model})
    padded = early.generate(ids, max_new_tokens=12, density=0.5)[:, 7:]
    np.testing.assert_array_equal(padded[0], [*free[0, : first + 1], *[eos] * (12 - first - 1)])
    np.testing.assert_array_equal(padded[1], free[1])
    assert early.last_stats.finish == ("eos", "length")
    alone = early.generate(ids[:1], max_new_tokens=12, density=0.5)
    assert alone.shape == (1, 7 + first + 1)
    at_least = early.generate(ids[:1], max_new_tokens=12, min_new_tokens=12, density=0.5)[:, 7:]
    assert eos not in at_least
    np.testing.assert_array_equal(at_least[0, :first], free[0, :first])


def test_text_comes_out_when_text_goes_in(engine: Engine) -> None:
    ids = np.array([engine.tokenizer("a lazy neuron")["input_ids"]])
    new = engine.generate(ids, max_new_tokens=10, density=0.5)[0, ids.shape[1] :]
    text = engine.generate("a lazy neuron", max_new_tokens=10, density=0.5)
    assert isinstance(text, str)
    whole = engine.tokenizer.decode([*ids[0], *new], skip_special_tokens=True)
    assert whole == "a lazy neuron" + text


def test_several_texts_are_padded_and_answered_in_order(engine: Engine) -> None:
    texts = ["a lazy neuron jumps over the record", "one head"]
    together = engine.generate(texts, max_new_tokens=8, density=0.5)
    assert together == [engine.generate(text, max_new_tokens=8, density=0.5) for text in texts]


def test_streamed_pieces_are_the_text(engine: Engine) -> None:
    pieces: list[str] = []
    text = engine.generate("The quick", max_new_tokens=30, density=0.5, stream=pieces.append)
    assert "".join(pieces) == text
    assert len(pieces) > 1


def test_streamed_ids_are_the_new_ids(engine: Engine) -> None:
    ids, steps = prompts(2, 5), []
    found = engine.generate(ids, max_new_tokens=6, density=0.5, stream=lambda new: steps.append(new.copy()))
    np.testing.assert_array_equal(np.stack(steps, axis=1), found[:, 5:])


def test_stats_count_what_the_kernels_did(folders: dict[str, Path]) -> None:
    exact = load(folders["fp32"], skip_zeros=False)
    exact.generate(prompts(1, 6), max_new_tokens=9, min_new_tokens=9, density=Density(0.5, 0.25))
    stats = exact.last_stats
    assert (stats.tokens, stats.new_tokens, stats.finish) == (8, 9, ("length",))
    assert stats.heads_by_layer[0] == 4
    assert stats.active_head_share == 0.5
    assert stats.active_neuron_share == 0.25
    assert stats.heads == pytest.approx((4 + 3 * 2) / 4)
    assert stats.neurons == pytest.approx((16 + 3 * 4) / 4)
    E, D, F = 64, 16, 256
    # an active head reads four parts; an inactive one still its k and v rows, so that later tokens may use it
    head, key_value = (parts * D * (E + 1) * 4 for parts in (4, 2))
    neuron = 2 * (E + 1) * 4
    layers = 3
    wanted = (4 + layers * 2) * head + layers * 2 * key_value + (F + layers * F / 4) * neuron
    assert stats.bytes_read_kernels == pytest.approx(wanted)
    fixed = exact.manifest.bytes_per_token
    assert stats.bytes_read == pytest.approx(wanted + fixed.lm_head + fixed.predictor + fixed.other)
    assert stats.dense_bytes == fixed.records + fixed.lm_head + fixed.other
    assert stats.active_neurons == pytest.approx((F + layers * F / 4) / 4)
    assert stats.seconds > 0
    assert stats.tokens_per_second == pytest.approx(8 / stats.seconds)


def test_bytes_of_a_batch_are_all_that_was_read_over_the_tokens_that_count(folders: dict[str, Path]) -> None:
    exact = load(folders["fp32"], skip_zeros=False)
    exact.generate(prompts(1, 6), max_new_tokens=5, min_new_tokens=5, density=1.0)
    alone = exact.last_stats
    assert alone.bytes_read == pytest.approx(alone.dense_bytes + exact.manifest.bytes_per_token.predictor)
    exact.generate(np.repeat(prompts(1, 6), 2, axis=0), max_new_tokens=5, min_new_tokens=5, density=1.0)
    both = exact.last_stats
    assert both.tokens == 2 * alone.tokens
    assert alone.bytes_read / 2 <= both.bytes_read <= alone.bytes_read
    assert both.bytes_read_kernels >= alone.bytes_read_kernels / 2


def test_a_single_new_token_has_no_masked_tokens_to_count(engine: Engine) -> None:
    engine.generate(prompts(1, 6), max_new_tokens=1)
    assert (engine.last_stats.tokens, engine.last_stats.new_tokens) == (0, 1)
    assert engine.last_stats.tokens_per_second == 0
    assert engine.last_stats.active_head_share == 1


def test_a_dense_engine_generates_and_refuses_a_density(folders: dict[str, Path], tiny_model: OPTForCausalLM) -> None:
    dense = load(folders["dense"])
    ids = prompts(1, 7)
    np.testing.assert_array_equal(dense.generate(ids, max_new_tokens=5, min_new_tokens=5), greedy(tiny_model, ids, 5))
    dense.generate(ids, max_new_tokens=2, density=1.0)
    with pytest.raises(InputError, match="engine is dense"):
        dense.generate(ids, density=0.5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda engine: engine.generate(np.zeros((1, 0), np.int64)), "shape"),
        (lambda engine: engine.generate(np.array([5, 6])), "shape"),
        (lambda engine: engine.generate(np.array([[0.5]])), "whole numbers"),
        (lambda engine: engine.generate(np.array([[5, 320]])), "token id 320"),
        (lambda engine: engine.generate(np.array([[5, -1]])), "token id -1"),
        (lambda engine: engine.generate([]), "no prompt"),
        (lambda engine: engine.generate(np.array([[5]]), max_new_tokens=0), "max_new_tokens"),
        (lambda engine: engine.generate(np.array([[5]]), max_new_tokens=2, min_new_tokens=3), "min_new_tokens"),
        (lambda engine: engine.generate(np.array([[5]]), density=1.5), "from 0 to 1"),
        (lambda engine: engine.generate(np.array([[5]]), density=float("nan")), "from 0 to 1"),
        (lambda engine: engine.generate(np.array([[5, 6, 7]]), attention_mask=[[1, 0, 1]]), "zeros, then ones"),
        (lambda engine: engine.generate(np.array([[5, 6, 7]]), attention_mask=[[1, 1, 0]]), "zeros, then ones"),
        (lambda engine: engine.generate(np.array([[5, 6, 7]]), attention_mask=[[0, 0, 0]]), "zeros, then ones"),
        (lambda engine: engine.generate(np.array([[5, 6, 7]]), attention_mask=[[1, 2, 2]]), "may hold 0 and 1, found"),
        (lambda engine: engine.generate(np.array([[5, 6, 7]]), attention_mask=[[1, 1]]), "attention_mask is"),
        (lambda engine: engine.generate(np.array([[5, 6]]), attention_mask=[["a", "b"]]), "may hold 0 and 1, found"),
        (lambda engine: engine.generate(np.array([[5, 6]]), attention_mask=[[0.5, 1]]), "may hold 0 and 1, found"),
        (
            lambda engine: engine.generate(np.array([[5]]), max_new_tokens=True),
            "max_new_tokens is True, expected",
        ),
        (lambda engine: engine.generate(np.array([[5, 6]]), attention_mask=[[1, 1], [1]]), "attention_mask must be a"),
        (lambda engine: engine.generate([[5, 6], [7]]), "token ids must be a rectangle"),
        (lambda engine: engine.generate("a", attention_mask=[[1]]), "attention_mask belongs to ids"),
        (
            lambda engine: engine.generate(np.array([[5]]), max_new_tokens=1.5),
            "max_new_tokens is 1.5, expected a whole",
        ),
        (
            lambda engine: engine.generate(np.array([[5]]), min_new_tokens="1"),
            "min_new_tokens is '1', expected a whole",
        ),
        (lambda engine: engine.generate(np.array([[5]]), density="half"), "found heads 'half' and neurons 'half'"),
        (lambda engine: engine.generate(np.array([[5]]), density=(0.5, 0.2)), "from 0 to 1; found heads"),
        (lambda engine: engine.logits(np.array([[5]]), prompt_tokens=0.5), "prompt_tokens is 0.5, expected a whole"),
    ],
)
def test_bad_input_gets_one_sentence(engine: Engine, call: Callable[[Engine], object], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        call(engine)
    assert caught.value.hint


def test_numbers_of_numpy_are_numbers(engine: Engine) -> None:
    ids = np.array([[5, 6]])
    given = {"max_new_tokens": np.int32(3), "min_new_tokens": np.uint8(3), "density": np.float32(0.5)}
    np.testing.assert_array_equal(engine.generate(ids, **given), engine.generate(ids, 3, 3, 0.5))
    for share in (np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)):
        assert json.dumps([Density.of(share).heads, Density(neurons=share).neurons]) == "[0.5, 0.5]"


def test_stats_before_any_run_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="nothing has run"):
        _ = load(folders["fp32"], verify=False).last_stats
