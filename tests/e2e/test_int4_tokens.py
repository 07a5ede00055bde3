# SPDX-License-Identifier: Apache-2.0
"""Tokens of int4 engines keep 8 bits of activations where no mask depends on it: text hardly notices."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import shadowc
from shadowc.checkpoint.resolve import resolve
from shadowc.emit.prompts import FREELY
from shadowc.runtime.engine import Engine
from shadowc.runtime.library import OpLibrary
from shadowc.runtime.load import load_cpu
from shadowc.runtime.prompts import Batch
from shadowc.sparsity.predictor import Predictor
from tests.e2e.compiled import options
from tests.e2e.test_prompts import MOST_UNITS, ROWS, freely, text_ids

TOKENS = 40
MOST_BITS = 5e-4
"""Of the bits of a text, where 0.2 % are allowed."""
NAMES = [f"{part}.{kind}" for kind in ("heads", "neurons") for part in ("scores", "threshold")]

pytestmark = pytest.mark.skipif(
    OpLibrary.installed().isa not in ("avx2", "avx512", "avx512_icelake", "avx512_zen4", "avx512_amx"),
    reason="int4 weights meet floats at this level",
)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By style: layer 0 makes all masks, or layers make masks of their own; by random networks."""
    folder, made = tmp_path_factory.mktemp("int4"), {}
    for style in ("shadow", "shadow+"):
        Predictor.dummy(resolve("opt-mini").facts, 1, 32, style=style).save(folder / f"predictor-{style}")
        changes = {"weights": "int4", "predictor": str(folder / f"predictor-{style}"), "offline": True}
        made[style] = shadowc.compile(options("opt-mini", folder / style, **changes))
    return made


def one_by_one(engine: Engine) -> tuple[list[npt.NDArray[np.bool_]], npt.NDArray[np.float64]]:
    """Masks of every token, and the bits of the one behind it."""
    ids = text_ids(engine)[:, :TOKENS]
    decoder = engine._decoder(Batch(ids, np.zeros(ROWS, np.int64)), TOKENS, masks=True)
    decoder.set_density(0.5, 0.5)
    masks, bits = [], []
    for token, following in zip(ids.T[:-1], ids.T[1:], strict=True):
        found = decoder.feed(token[:, None], sparse_tail=1, outputs=[*NAMES, "logits"])
        masks += [found[f"scores.{kind}"] >= found[f"threshold.{kind}"][..., None] for kind in ("heads", "neurons")]
        logits = found["logits"][:, -1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        bits.append(np.log2(np.exp(logits).sum(-1)) - logits[np.arange(ROWS), following] / np.log(2))
    return masks, np.array(bits)


def units_that_differ(found: list[npt.NDArray[np.bool_]], expected: list[npt.NDArray[np.bool_]]) -> float:
    changed = sum(int((mine != theirs).sum()) for mine, theirs in zip(found, expected, strict=True))
    return changed / sum(mask.size for mask in expected)


def rounded_and_exact(folder: Path) -> tuple[Engine, Engine]:
    return load_cpu(folder), load_cpu(folder, exact_prompts=True)


def test_where_layer_0_makes_the_masks_tokens_of_8_bits_change_none_and_hardly_the_text(
    engines: dict[str, Path],
) -> None:
    (masks, bits), (exact_masks, exact_bits) = map(one_by_one, rounded_and_exact(engines["shadow"]))
    assert (bits != exact_bits).any()
    assert units_that_differ(masks, exact_masks) == 0
    assert abs(bits.mean() / exact_bits.mean() - 1) < MOST_BITS


def test_where_layers_make_masks_of_their_own_tokens_are_exact(engines: dict[str, Path]) -> None:
    (masks, bits), (exact_masks, exact_bits) = map(one_by_one, rounded_and_exact(engines["shadow+"]))
    assert units_that_differ(masks, exact_masks) == 0
    np.testing.assert_array_equal(bits, exact_bits)


def test_tokens_of_8_bits_would_change_masks_there(engines: dict[str, Path]) -> None:
    rounded, exact = rounded_and_exact(engines["shadow+"])
    (masks, _), (exact_masks, _) = one_by_one(rounded._variant(partial(freely, rounding=FREELY))), one_by_one(exact)
    assert units_that_differ(masks, exact_masks) > MOST_UNITS
