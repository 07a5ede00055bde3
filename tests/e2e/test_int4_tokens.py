# SPDX-License-Identifier: Apache-2.0
"""Tokens of int4 engines keep 16 bits of activations in layers that round freely: masks and text hardly notice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import shadowc
from shadowc.checkpoint.resolve import resolve
from shadowc.runtime.engine import Engine
from shadowc.runtime.library import OpLibrary
from shadowc.runtime.load import load_cpu
from shadowc.runtime.prompts import Batch
from shadowc.sparsity.predictor import Predictor
from tests.e2e.compiled import options
from tests.e2e.test_prompts import MOST_UNITS, ROWS, freely, text_ids

TOKENS = 40
MOST_BITS = 1e-4
"""0.2 % is allowed; what 16 bits change is a hundredth of what a digit of 8 would."""
NAMES = [f"{part}.{kind}" for kind in ("heads", "neurons") for part in ("scores", "threshold")]

pytestmark = pytest.mark.skipif(
    OpLibrary.installed().isa not in ("avx2", "avx512", "avx512_icelake", "avx512_zen4", "avx512_amx"),
    reason="int4 weights meet floats at this level",
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine whose layers make masks of their own, by random networks."""
    folder = tmp_path_factory.mktemp("int4")
    Predictor.dummy(resolve("opt-mini").facts, 1, 32, style="shadow+").save(folder / "predictor")
    changes = {"weights": "int4", "predictor": str(folder / "predictor"), "offline": True}
    return shadowc.compile(options("opt-mini", folder / "out", **changes))


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


def test_tokens_of_16_bits_change_hardly_a_mask_and_no_text(engine: Path) -> None:
    (masks, bits), (exact_masks, exact_bits) = (
        one_by_one(load_cpu(engine, exact_prompts=choice)) for choice in (False, True)
    )
    assert (bits != exact_bits).any()
    assert units_that_differ(masks, exact_masks) <= MOST_UNITS
    assert abs(bits.mean() / exact_bits.mean() - 1) < MOST_BITS


def test_tokens_of_a_digit_of_8_bits_would_change_masks(engine: Path) -> None:
    """What prompts may do, tokens must not: here a token is a prompt of enough rows."""
    rounded, exact = load_cpu(engine)._variant(freely), load_cpu(engine, exact_prompts=True)
    ids = text_ids(exact)[:, :TOKENS]
    differ = []
    for choice in (rounded, exact):
        decoder = choice._decoder(Batch(ids, np.zeros(ROWS, np.int64)), TOKENS, masks=True)
        decoder.set_density(0.5, 0.5)
        found = decoder.feed(ids, sparse_tail=TOKENS - 1, outputs=NAMES)
        differ.append(
            [found[f"scores.{kind}"] >= found[f"threshold.{kind}"][..., None] for kind in ("heads", "neurons")]
        )
    assert units_that_differ(*differ) > MOST_UNITS
