# SPDX-License-Identifier: Apache-2.0
"""Rewrites of the finished graph keep its numbers and take away what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from shadowc.cli import inspect
from shadowc.runtime import variants
from shadowc.runtime.engine import Engine
from shadowc.runtime.load import load
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from shadowc.spec.manifest import MODEL_FILE
from shadowc.spec.ops import FEW_DIGITS
from tests.conftest import TINY
from tests.emit.engines import KINDS

TOLERANCE = 2e-5
"""Largest |difference| over the largest |logit|: float32, another order of additions."""


FORECAST = 0.05


def ids(tokens: int = 20) -> np.ndarray:
    return np.random.default_rng(2).integers(4, TINY["vocab_size"], (1, tokens), dtype=np.int64)


def graph_of(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / MODEL_FILE, load_external_data=False)


def names(values: Any) -> set[str]:
    return {value.name for value in values}


def test_inner_tensors_become_outputs(engine: Engine) -> None:
    shown = engine.prober()().step(ids(6), density=Density(0.5, 0.5), sparse_tail=3)
    assert shown["residual.0"].shape == shown["residual.4"].shape == (1, 6, 64)
    assert shown["scores.heads"].shape == (1, 3, 3, 4)
    assert shown["read"].shape == (4, 2, 2)
    context = engine.prober(["context.2"])().step(ids(6), density=Density(), sparse_tail=0)["context.2"]
    assert context.shape == (1, 6, 64)


def test_an_output_that_is_there_already_stays_single(folders: dict[str, Path]) -> None:
    model = variants.with_outputs(graph_of(folders["fp32"]), ["logits", "residual.1", "residual.1"])
    listed = [value.name for value in model.graph.output]
    assert listed.count("logits") == listed.count("residual.1") == 1


def test_an_unknown_tensor_is_refused_by_name(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"residual\.99"):
        variants.with_outputs(graph_of(folders["fp32"]), ["residual.0", "residual.99"])


@pytest.mark.parametrize("name", [*KINDS, "dense"])
def test_skipping_zeros_is_exact_and_reads_less(folders: dict[str, Path], name: str) -> None:
    density = None if name == "dense" else 0.5
    kept, skipping = (load(folders[name], skip_zeros=flag) for flag in (False, True))
    found = [engine.generate(ids(), max_new_tokens=10, density=density) for engine in (kept, skipping)]
    np.testing.assert_array_equal(*found)
    if name != "dense":
        assert skipping.last_stats.bytes_read_kernels < kept.last_stats.bytes_read_kernels


def test_scores_as_inputs_take_the_predictor_out(folders: dict[str, Path]) -> None:
    before = graph_of(folders["fp32"])
    model = variants.with_scores_as_inputs(before)
    assert {"scores.heads", "scores.neurons"} <= names(model.graph.input)
    assert not any(tensor.name.startswith("predictor.") for tensor in model.graph.initializer)
    assert not {"mask_scores.heads", "scores.heads"} & names(model.graph.output)
    assert {"logits", "active.heads", "threshold.neurons", "read"} <= names(model.graph.output)
    assert {"density_heads", "sparse_tail"} >= {"density_heads"} <= names(model.graph.input)
    assert any(tensor.name.startswith("predictor.") for tensor in before.graph.initializer)


def test_a_dense_engine_has_no_scores_to_replace(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="no scores"):
        variants.with_scores_as_inputs(graph_of(folders["dense"]))


def test_the_dense_twin_computes_density_one_without_predictor(engine: Engine, folders: dict[str, Path]) -> None:
    model = variants.dense(graph_of(folders["fp32"]))
    assert not any(tensor.name.startswith("predictor.") for tensor in model.graph.initializer)
    assert not {"density_heads", "density_neurons", "sparse_tail"} & (
        names(model.graph.input) | names(model.graph.initializer)
    )
    twin = engine.dense_twin()
    found, expected = twin.logits(ids()), engine.logits(ids(), 1.0)
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
    np.testing.assert_array_equal(
        twin.generate(ids(), max_new_tokens=8), engine.generate(ids(), max_new_tokens=8, density=1.0)
    )
    assert twin.last_stats.heads == 4
    assert twin.last_stats.bytes_read < engine.last_stats.bytes_read  # the predictor is not read
    with pytest.raises(InputError, match="dense"):
        twin.logits(ids(), 0.5)


def test_variants_leave_the_graph_they_are_given(folders: dict[str, Path]) -> None:
    model = graph_of(folders["fp32"])
    before = model.SerializeToString(deterministic=True)
    variants.with_outputs(model, ["residual.1"])
    variants.with_skip_zeros(model, False)
    variants.with_scores_as_inputs(model)
    variants.dense(model)
    variants.predicting(model)
    variants.with_kv(model, "active")
    variants.without_joined_scores(model)
    assert model.SerializeToString(deterministic=True) == before


def test_the_predicting_graph_ends_with_the_scores(folders: dict[str, Path]) -> None:
    before = graph_of(folders["fp32"])
    model = variants.predicting(before)
    assert names(model.graph.input) - names(model.graph.initializer) == {
        "input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value",
    }  # fmt: skip
    assert names(model.graph.output) == {
        "scores.heads", "scores.neurons", "present.0.key", "present.0.value", variants.CONTEXT_READ,
    }  # fmt: skip
    stored = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    assert not [name for name in stored if name.startswith(("lm_head", "layers.1.", "layers.0.ffn"))]
    assert {"layers.0.attention.w", "predictor.heads.fc1.weight"} <= stored


@pytest.mark.parametrize("name", [*KINDS, "sequence"])
def test_inspect_foretells_the_bytes_that_the_kernels_count(folders: dict[str, Path], name: str) -> None:
    """Global ranks move a share from layer to layer and blocks round it, so the forecast is near, not equal."""
    engine = load(folders[name], skip_zeros=False)
    rows = {row: sparse for row, _, sparse in inspect.bytes_rows(engine.manifest)}
    units = {"kB": 1e3, "MB": 1e6}
    foretold = sum(
        float(number) * units[unit]
        for number, unit in (rows[row].split() for row in ("attention records", "neuron records"))
    )
    engine.generate(ids(), max_new_tokens=20, min_new_tokens=20)
    assert engine.last_stats.bytes_read_kernels == pytest.approx(foretold, rel=FORECAST)


def test_logits_are_cut_to_the_tokens_that_are_asked_for(engine: Engine) -> None:
    """`load` cut the graph; a decoder that asks for the last token gets what the whole has there."""
    from shadowc.runtime.prompts import Batch

    def fed(logits_from: int) -> np.ndarray:
        decoder = engine._decoder(Batch(ids(), np.zeros(1, np.int64)), 20)
        return decoder.feed(ids(), sparse_tail=0, outputs=("logits",), logits_from=logits_from)["logits"]

    whole = fed(0)
    assert whole.shape[1] == 20
    for first in (-1, -3, 5):
        np.testing.assert_allclose(fed(first), whole[:, first:], atol=TOLERANCE * np.abs(whole).max())


def test_prompts_compute_the_logits_of_their_last_token_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from shadowc.runtime.decoder import Decoder

    sizes = []
    feed = Decoder.feed

    def watched(self: Decoder, *arguments: Any, **named: Any) -> Any:
        outputs = feed(self, *arguments, **named)
        sizes.append(outputs["logits"].shape[1])
        return outputs

    monkeypatch.setattr(Decoder, "feed", watched)
    engine.generate(ids(), max_new_tokens=1)
    assert sizes == [1]


def rounding(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node if any(one.name == FEW_DIGITS for one in node.attribute)]


def test_prompts_are_rounded_everywhere_but_where_masks_come_from(folders: dict[str, Path]) -> None:
    sparse = [
        node.name for node in graph_of(folders["fp32"]).graph.node if node.op_type in ("SparseAttention", "SparseFFN")
    ]
    assert sparse[0] == "layers.0.attention"
    assert rounding(load(folders["fp32"])._session.load_model()) == sparse[1:]
    assert rounding(load(folders["fp32"], exact_prompts=True)._session.load_model()) == []
