# SPDX-License-Identifier: Apache-2.0
"""Parity A passes on a good engine and catches every planted defect, in the part that has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper

import shadowc
from shadowc.checkpoint.resolve import resolve
from shadowc.measure.parity import ParityReport, check_parity
from shadowc.runtime.engine import Engine
from shadowc.runtime.probe import Probe
from shadowc.spec.density import Density
from shadowc.spec.errors import VerificationError
from shadowc.spec.progress import NullProgress
from shadowc.stages import Stages
from tests.e2e import compiled

LAYER = 2
"""Where single-layer defects are planted."""


def parity_of(
    engine: Engine, checkpoint: Path, new_probe: Callable[[], object] | None = None, weights: str = "fp32"
) -> ParityReport:
    resolved = resolve(str(checkpoint))
    sparsity = engine.manifest.sparsity
    assert sparsity is not None
    return check_parity(
        new_probe or engine.prober(),  # type: ignore[arg-type]
        resolved.facts,
        resolved.weights,
        weights=weights,
        head_block=0 if weights == "fp32" else 32,
        block=sparsity.neuron_block,
        orders=dict(enumerate(orders_of(checkpoint), start=1)),
        sparse=True,
    )


def orders_of(checkpoint: Path) -> npt.NDArray[np.int32]:
    """The neuron orders of the predictor that the engines were compiled with, from the cache."""
    options = compiled.options(checkpoint, Path("unused"))
    predictor = Stages(options, NullProgress()).predictor(resolve(str(checkpoint)))
    assert predictor is not None
    return predictor.orders_LF


def test_parity_passes_when_the_engine_is_sound(sparse_engine: Path, tiny_checkpoint: Path) -> None:
    report = parity_of(shadowc.load(sparse_engine), tiny_checkpoint)
    assert report.passed()
    assert max(report.layers) < 1e-5


def test_parity_passes_when_weights_are_int8(int8_engine: Path, tiny_checkpoint: Path) -> None:
    report = parity_of(shadowc.load(int8_engine), tiny_checkpoint, weights="int8")
    assert report.passed()
    assert max(report.layers) < 1e-5, "int8 rounding must be modelled exactly, not tolerated"


def test_parity_fails_when_int8_is_compared_with_unrounded_weights(int8_engine: Path, tiny_checkpoint: Path) -> None:
    report = parity_of(shadowc.load(int8_engine), tiny_checkpoint, weights="fp32")
    assert not report.passed()


def test_parity_names_the_layer_when_its_ffn_mask_is_ignored(sparse_engine: Path, tiny_checkpoint: Path) -> None:
    def ignore_mask(model: onnx.ModelProto) -> None:
        node = named(model, f"layers.{LAYER}.ffn")
        node.input[1], node.input[2] = "dense.scores.neurons", "dense.threshold"
        for attribute in node.attribute:
            if attribute.name == "layer":
                attribute.i = 0

    report = parity_of(changed(sparse_engine, ignore_mask), tiny_checkpoint)
    assert failing(report) == [LAYER]


def test_parity_names_the_layer_when_it_uses_another_layers_masks(sparse_engine: Path, tiny_checkpoint: Path) -> None:
    def shift(model: onnx.ModelProto) -> None:
        for attribute in named(model, f"layers.{LAYER}.attention").attribute:
            if attribute.name == "layer":
                attribute.i -= 1

    report = parity_of(changed(sparse_engine, shift), tiny_checkpoint)
    assert failing(report) == [LAYER]


def test_parity_names_the_embedding_when_positions_are_off_by_one(sparse_engine: Path, tiny_checkpoint: Path) -> None:
    def move_positions(model: onnx.ModelProto) -> None:
        table = "model.decoder.embed_positions.weight"
        gather = next(node for node in model.graph.node if node.op_type == "Gather" and node.input[0] == table)
        model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "one.planted"))
        add = helper.make_node("Add", [gather.input[1], "one.planted"], ["moved.planted"], name="planted")
        gather.input[1] = "moved.planted"
        model.graph.node.insert(list(model.graph.node).index(gather), add)

    report = parity_of(changed(sparse_engine, move_positions), tiny_checkpoint)
    assert report.embedding > report.layer_tolerance
    with pytest.raises(VerificationError, match="does not compute what torch computes") as caught:
        report.require()
    assert any(problem.startswith("embedding") for problem in caught.value.problems)


def test_parity_fails_when_a_cache_entry_is_stale(sparse_engine: Path, tiny_checkpoint: Path) -> None:
    engine = shadowc.load(sparse_engine)
    new_probe = engine.prober()
    report = parity_of(engine, tiny_checkpoint, lambda: _StaleCache(new_probe()))
    assert 1 in failing(report)


class _StaleCache:
    """Forgets what one slot of layer 1 held after the prefill, as a write to a wrong slot would."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def step(
        self, ids_BS: npt.NDArray[np.int64], *, density: Density, sparse_tail: int
    ) -> Mapping[str, npt.NDArray[np.float32]]:
        outputs = self._probe.step(ids_BS, density=density, sparse_tail=sparse_tail)
        if ids_BS.shape[1] > 1:
            decoder = self._probe._decoder
            assert decoder is not None
            decoder._cache._past["1.key"][:, :, 3] = 0
        return outputs


def test_compile_leaves_no_engine_when_two_heads_are_swapped_in_the_packing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shadowc.emit import weights

    sound = weights.materialise

    def swapped(recipes, source, names):  # type: ignore[no-untyped-def]
        arrays = sound(recipes, source, names)
        name = f"layers.{LAYER}.attention.w"
        if name in arrays:
            arrays[name][[0, 1]] = arrays[name][[1, 0]].copy()
        return arrays

    monkeypatch.setattr(weights, "materialise", swapped)
    out = tmp_path / "bad.engine"
    with pytest.raises(VerificationError) as caught:
        shadowc.compile(compiled.options(tiny_checkpoint, out))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [f"layer {LAYER}"]
    assert list(tmp_path.iterdir()) == []


def changed(folder: Path, change: Callable[[onnx.ModelProto], None]) -> Engine:
    """The engine with a defect in its graph."""

    def rewrite(model: onnx.ModelProto) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        change(copy)
        return copy

    return shadowc.load(folder)._variant(rewrite)


def named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def failing(report: ParityReport) -> list[int]:
    return [layer for layer, value in enumerate(report.layers) if not value <= report.layer_tolerance]
