# SPDX-License-Identifier: Apache-2.0
"""What prompts lose by rounding, on opt-mini and with every type of weights: hardly any bits, and no unit of a mask, or
hardly any where every layer makes masks of its own.
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import numpy.typing as npt
import onnx
import pytest

import shadowc
from shadowc.checkpoint.resolve import resolve
from shadowc.emit.prompts import FINELY, FREELY, FREELY_IN_PROMPTS
from shadowc.runtime import variants
from shadowc.runtime.engine import Engine
from shadowc.runtime.library import OpLibrary
from shadowc.runtime.load import load_cpu
from shadowc.runtime.prompts import Batch
from shadowc.sparsity.predictor import Predictor
from shadowc.spec.manifest import MODEL_FILE
from shadowc.spec.ops import FEW_DIGITS
from tests.e2e.compiled import options

pytestmark = pytest.mark.slow

ROUNDED = {
    "avx2": ("int8", "int4"),
    "avx512_icelake": ("int8", "int4", "fp32"),
    "avx512_zen4": ("int8", "int4", "bf16", "fp32"),
    "avx512_amx": ("int8", "int4", "bf16", "fp32"),
}.get(OpLibrary.installed().isa, ())
"""Types of weights whose prompts are computed in other ways than single tokens are, at this processor's level."""

ROWS, SLOTS = 4, 256
MOST_BITS = 2e-3
MOST_UNITS = 1e-3
"""Of a token's units that a mask may have otherwise."""


@pytest.fixture(scope="module", params=["int8", "int4", "bf16", "fp32"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    if request.param not in ROUNDED:
        pytest.skip("prompts with these weights go row by row here, or have all digits")
    out = tmp_path_factory.mktemp("prompts") / "mini"
    return shadowc.compile(options("opt-mini", out, weights=request.param, offline=True))


def text_ids(engine: Engine) -> npt.NDArray[np.int64]:
    ids = engine.tokenizer(topics["specialnames"] + topics["typesseq"])["input_ids"]
    return np.array(ids[: ROWS * SLOTS], np.int64).reshape(ROWS, SLOTS)


def bits(engine: Engine) -> float:
    """Of the tokens of a text, read as prompts are."""
    ids = text_ids(engine)
    logits = engine.logits(ids, protocol="dense")[:, :-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, ids[:, 1:, None], axis=2)[..., 0]
    return float((np.log2(np.exp(logits).sum(-1)) - chosen / np.log(2)).sum())


def scores_after_a_prompt(engine: Engine) -> list[npt.NDArray[np.float32]]:
    ids = text_ids(engine)
    decoder = engine._decoder(Batch(ids, np.zeros(ROWS, np.int64)), SLOTS)
    decoder.prefill(ids[:, :-1])
    outputs = decoder.feed(ids[:, -1:], sparse_tail=1, outputs=("scores.heads", "scores.neurons"))
    return list(outputs.values())


def test_rounded_prompts_are_rounded_and_cost_hardly_any_bits(folder: Path) -> None:
    rounded, exact = bits(load_cpu(folder)), bits(load_cpu(folder, exact_prompts=True))
    assert rounded != exact
    assert abs(rounded / exact - 1) < MOST_BITS


def test_an_engine_compiled_with_exact_prompts_has_no_others(tmp_path: Path) -> None:
    changes = {"weights": "int8", "predictor": "none", "exact_prompts": True, "offline": True}
    folder = shadowc.compile(options("opt-mini", tmp_path / "mini", **changes))
    assert bits(load_cpu(folder)) == bits(load_cpu(folder, exact_prompts=True))


def test_masks_after_a_rounded_prompt_are_those_of_an_exact_one(folder: Path) -> None:
    rounded, exact = load_cpu(folder), load_cpu(folder, exact_prompts=True)
    for found, expected in zip(scores_after_a_prompt(rounded), scores_after_a_prompt(exact), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_rounding_where_masks_come_from_would_be_noticed(folder: Path) -> None:
    def everywhere(model):
        changed = variants._copy(model)
        for node in changed.graph.node:
            if node.name == "layers.0.attention":
                variants._set_int(node, FEW_DIGITS, FREELY)
        return changed

    exact, planted = load_cpu(folder, exact_prompts=True), load_cpu(folder)._variant(everywhere)
    pairs = zip(scores_after_a_prompt(planted), scores_after_a_prompt(exact), strict=True)
    assert all((found != expected).any() for found, expected in pairs)


OWN_MASKS = "shadow+"
STEPS, TEXTS = 8, 6


@pytest.fixture(scope="module")
def of_own_masks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of engines whose layers predict for themselves, by type of weights.

    By random networks: what little training a test can afford leaves the mean scores, which no prompt changes.
    """
    folder, folders = tmp_path_factory.mktemp("own"), {}
    Predictor.dummy(resolve("opt-mini").facts, 1, 32, style=OWN_MASKS).save(folder / "predictor")
    for weights in ("int8", "int4", "bf16"):
        if weights not in ROUNDED:
            continue
        changes = {"weights": weights, "predictor": str(folder / "predictor"), "offline": True}
        folders[weights] = shadowc.compile(options("opt-mini", folder / weights, **changes))
    return folders


def masks_behind_prompts(engine: Engine, ids: npt.NDArray[np.int64]) -> list[npt.NDArray[np.bool_]]:
    """Of the last tokens of every row, behind a prompt of the others."""
    decoder = engine._decoder(Batch(ids, np.zeros(ROWS, np.int64)), SLOTS, masks=True)
    decoder.set_density(0.5, 0.5)
    decoder.prefill(ids[:, :-STEPS])
    names, masks = [f"{part}.{kind}" for kind in ("heads", "neurons") for part in ("scores", "threshold")], []
    for token in ids[:, -STEPS:].T:
        found = decoder.feed(token[:, None], sparse_tail=1, outputs=names)
        masks += [found[f"scores.{kind}"] >= found[f"threshold.{kind}"][..., None] for kind in ("heads", "neurons")]
    assert all(0.4 < mask.mean() < 0.6 for mask in masks)
    return masks


def units_that_differ(engine: Engine, exact: Engine) -> float:
    """The share, over several texts: of one alone it is up to three times as much, or a third."""
    ids = exact.tokenizer(" ".join(topics[name] for name in sorted(topics)))["input_ids"][: TEXTS * ROWS * SLOTS]
    shares = []
    for text in np.array(ids, np.int64).reshape(TEXTS, ROWS, SLOTS):
        pairs = zip(masks_behind_prompts(engine, text), masks_behind_prompts(exact, text), strict=True)
        shares += [(found != expected).mean() for found, expected in pairs]
    return float(np.mean(shares))


@pytest.fixture(params=["int8", "int4", "bf16"])
def own_masks(of_own_masks: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    if request.param not in of_own_masks:
        pytest.skip("prompts with these weights go row by row here, or have all digits")
    return of_own_masks[request.param]


def test_masks_of_every_layer_hardly_change_by_a_rounded_prompt(own_masks: Path) -> None:
    rounded, exact = (load_cpu(own_masks, exact_prompts=choice) for choice in (False, True))
    assert 0 < abs(bits(rounded) / bits(exact) - 1) < MOST_BITS
    assert units_that_differ(rounded, exact) <= MOST_UNITS


def test_the_first_layers_of_a_prompt_round_finely_and_int4_in_more_of_them(own_masks: Path) -> None:
    """Of the eight layers of opt-mini; int4 is told from the others by how the graph stores it."""
    int4 = own_masks.name == "int4"
    first = {"ffn": 4, "attention": 6} if int4 else {"ffn": 3, "attention": 5}
    freely = FREELY_IN_PROMPTS if int4 else FREELY
    graph = onnx.load(own_masks / MODEL_FILE, load_external_data=False).graph
    found = {
        node.name: attribute.i for node in graph.node for attribute in node.attribute if attribute.name == FEW_DIGITS
    }
    expected = {
        f"layers.{layer}.{kind}": freely if layer >= first[kind] else FINELY for layer in range(8) for kind in first
    }
    assert found == expected


def freely(model: onnx.ModelProto, rounding: int = FREELY_IN_PROMPTS) -> onnx.ModelProto:
    """The graph that rounds so in every layer that rounds at all."""
    changed = variants._copy(model)
    for node in changed.graph.node:
        if any(one.name == FEW_DIGITS for one in node.attribute):
            variants._set_int(node, FEW_DIGITS, rounding)
    return changed


def test_prompts_rounded_freely_in_every_layer_would_change_masks(own_masks: Path) -> None:
    if OpLibrary.installed().isa == "avx2" and own_masks.name == "int8":
        pytest.skip("12 bits change hardly a unit in any layer")

    rounded, exact = (load_cpu(own_masks, exact_prompts=choice) for choice in (False, True))
    assert units_that_differ(rounded._variant(freely), exact) > MOST_UNITS
