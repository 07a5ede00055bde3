# SPDX-License-Identifier: Apache-2.0
"""Graphs that are told where tokens are give what those give that derive it from a mask, and have less to do.

Letters: B rows, S tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from shadowc.runtime import variants
from shadowc.runtime.decoder import Decoder
from shadowc.runtime.load import load
from shadowc.spec.density import Density
from shadowc.spec.manifest import FIXED_FILE, MODEL_FILE
from shadowc.spec.tensors import PAST, START, TAIL, TOKEN
from tests.conftest import TINY
from tests.emit.engines import KINDS

MASKED = Density(0.5, 0.25)


def padded() -> tuple[np.ndarray, np.ndarray]:
    """Three rows of 3, 11 and 8 tokens, and their mask."""
    ids_BS = np.random.default_rng(5).integers(4, TINY["vocab_size"], (3, 11), dtype=np.int64)
    mask_BS = np.arange(11) >= np.array([[8], [0], [3]])
    return np.where(mask_BS, ids_BS, TINY["pad_token_id"]), mask_BS.astype(np.int64)


def results(folder: Path) -> list[np.ndarray]:
    """Texts, counts and logits of an engine, of padded rows too."""
    engine, (ids_BS, mask_BS) = load(folder, threads=2), padded()
    sparse = engine.manifest.sparsity is not None
    density = MASKED if sparse else None
    found: list[Any] = [engine.generate(ids_BS, max_new_tokens=12, density=density, attention_mask=mask_BS)]
    stats = engine.last_stats
    found += [np.array([stats.heads, stats.neurons, stats.bytes_read])]
    for dense_tokens in (1, 5):
        protocol = "prompt" if sparse and engine.manifest.sparsity.mask == "sequence" else "decode"
        found.append(engine.logits(ids_BS, density, protocol, dense_tokens, attention_mask=mask_BS))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("name", [*KINDS, "dense", "sequence"])
def test_a_graph_that_is_told_gives_the_same_bits(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = results(folders[name])
    monkeypatch.setattr(variants, "told", lambda model: model)
    for found, wanted in zip(told, results(folders[name]), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_loop_that_tells_a_wrong_start_gives_other_logits(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, times = results(folders["fp32"])[-1], Decoder._times

    def off_by_one(self: Decoder, tokens: int) -> dict[str, np.ndarray]:
        found = times(self, tokens)
        return {**found, START: np.maximum(found[START] - 1, 0)}

    monkeypatch.setattr(Decoder, "_times", off_by_one)
    assert np.abs(results(folders["fp32"])[-1] - honest).max() > 1e-3


def test_tokens_of_rows_that_are_still_padding_are_told_one_by_one(folders: dict[str, Path]) -> None:
    """A step per slot, padding too, ends where the whole prompt at once does."""
    from shadowc.runtime.prompts import Batch

    engine, (ids_BS, mask_BS) = load(folders["dense"], threads=2), padded()
    batch = Batch(ids_BS, np.argmax(mask_BS, axis=1))
    by_step = engine._decoder(batch, 16)
    for slot in range(ids_BS.shape[1]):
        found_BV = by_step.step(ids_BS[:, slot])["logits"][:, 0]
    wanted_BV = engine._decoder(batch, 16).prefill(ids_BS)
    np.testing.assert_allclose(found_BV, wanted_BV, atol=2e-5 * np.abs(wanted_BV).max())


@pytest.mark.parametrize(("name", "file"), [("fp32", MODEL_FILE), ("dense", MODEL_FILE), ("sequence", FIXED_FILE)])
def test_nothing_of_a_mask_is_left_in_a_graph_that_is_told(folders: dict[str, Path], name: str, file: str) -> None:
    before = onnx.load(folders[name] / file, load_external_data=False)
    after = variants.told(before)
    inputs = {value.name for value in after.graph.input}
    assert {PAST, START} <= inputs
    assert not {"attention_mask", "sparse_tail"} & inputs
    made = {made for node in after.graph.node for made in node.output}
    assert not made & {PAST, START, TOKEN, TAIL, "slots", "past1", "real"}
    assert len(after.graph.node) < len(before.graph.node)
