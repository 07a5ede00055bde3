# SPDX-License-Identifier: Apache-2.0
"""The masks that `generate` shows are those that its tokens were computed under."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shadowc.runtime.engine import Engine
from shadowc.runtime.load import load
from shadowc.runtime.mask_trace import TokenMasks
from shadowc.runtime.tensorrt.engine import TensorRtEngine
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, UnsupportedError
from tests.conftest import TINY

DENSITY = Density(0.5, 0.25)
NEW, PROMPT = 10, 7


def prompts(rows: int = 2) -> np.ndarray:
    return np.random.default_rng(3).integers(4, TINY["vocab_size"], (rows, PROMPT), dtype=np.int64)


def watched(engine: Engine, ids: np.ndarray, density: Density = DENSITY) -> tuple[np.ndarray, list[TokenMasks]]:
    seen: list[TokenMasks] = []
    found = engine.generate(
        ids, max_new_tokens=NEW, min_new_tokens=NEW, density=density,
        watch=lambda masks: seen.append(TokenMasks(masks.heads.copy(), masks.neurons.copy())),
    )  # fmt: skip
    return found, seen


def test_shown_masks_are_those_of_a_trace_over_the_same_tokens(engine: Engine) -> None:
    found, seen = watched(engine, prompts())
    trace = engine.trace(found[:, :-1], DENSITY, prompt_tokens=PROMPT)
    assert len(seen) == NEW - 1
    for kind in ("heads", "neurons"):
        shown = np.stack([getattr(masks, kind) for masks in seen], axis=1)
        np.testing.assert_array_equal(shown, trace.mask(kind))
        assert (shown[:, 0] != shown[:, 1]).any(), "every token makes its own mask"


def test_showing_masks_changes_no_token_and_no_count(engine: Engine) -> None:
    plain = engine.generate(prompts(), max_new_tokens=NEW, min_new_tokens=NEW, density=DENSITY)
    expected = engine.last_stats
    found, _ = watched(engine, prompts())
    np.testing.assert_array_equal(found, plain)
    assert engine.last_stats.bytes_read == expected.bytes_read
    assert engine.last_stats.heads == expected.heads


def test_reference_graph_shows_the_same_masks(engine: Engine, reference: Engine) -> None:
    for mine, theirs in zip(watched(engine, prompts())[1], watched(reference, prompts())[1], strict=True):
        np.testing.assert_array_equal(mine.heads, theirs.heads)
        np.testing.assert_array_equal(mine.neurons, theirs.neurons)


def test_a_held_mask_is_shown_until_it_is_made_anew(folders: dict[str, Path]) -> None:
    held = load(folders["sequence"])
    _, seen = watched(held, prompts())
    for masks in seen:
        np.testing.assert_array_equal(masks.heads, seen[0].heads)
        assert masks.heads.sum(axis=(1, 2)).tolist() == [6, 6]  # half of 3 layers of 4 heads
        assert masks.neurons.sum(axis=(1, 2)).tolist() == [12, 12]
    _, fresh = watched(load(folders["sequence"], refresh=4), prompts())
    changes = [at for at in range(1, len(fresh)) if (fresh[at].neurons != fresh[at - 1].neurons).any()]
    assert changes == [3, 7]  # the prompt's last token, and every fourth after it


def test_dense_engine_has_no_masks_to_show(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="dense"):
        load(folders["dense"]).generate(prompts(), watch=lambda _: None)


def test_plans_show_no_masks(host: TensorRtEngine) -> None:
    with pytest.raises(UnsupportedError, match="target cpu"):
        host.generate(prompts(), watch=lambda _: None)
