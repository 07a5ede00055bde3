# SPDX-License-Identifier: Apache-2.0
"""Parity A passes on a good engine and catches every planted defect, in the part that has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper

import shadowc
from shadowc.checkpoint.resolve import resolve
from shadowc.measure.masks import relative, worse
from shadowc.measure.parity import ParityReport, check_parity
from shadowc.runtime.engine import Engine
from shadowc.runtime.probe import Probe
from shadowc.sparsity.predictor import Predictor
from shadowc.spec.density import Density
from shadowc.spec.errors import VerificationError
from shadowc.spec.progress import NullProgress
from shadowc.stages import Stages
from tests.e2e import compiled

LAYER = 2
"""Where single-layer defects are planted."""


def parity_of(
    engine: Engine,
    checkpoint: Path,
    new_probe: Callable[[], object] | None = None,
    weights: str = "fp32",
    new_held_probe: Callable[[], object] | None = None,
) -> ParityReport:
    resolved = resolve(str(checkpoint))
    sparsity = engine.manifest.sparsity
    assert sparsity is not None
    predictor = predictor_of(checkpoint)
    return check_parity(
        new_probe or engine.prober(),  # type: ignore[arg-type]
        resolved.facts,
        resolved.weights,
        weights=weights,
        block=sparsity.neuron_block,
        orders=dict(enumerate(predictor.orders_LF, start=1)),
        sparse=True,
        plan=predictor.plan(sparsity.scope),
        predictor=predictor,
        new_held_probe=new_held_probe,  # type: ignore[arg-type]
    )


def predictor_of(checkpoint: Path) -> Predictor:
    """The predictor that the engines were compiled with, from the cache."""
    options = compiled.options(checkpoint, Path("unused"))
    predictor = Stages(options, NullProgress()).predictor(resolve(str(checkpoint)))
    assert predictor is not None
    return predictor


def test_parity_passes_when_the_engine_is_sound(sparse_engine: Path, tiny_checkpoint: Path) -> None:
    report = parity_of(shadowc.load(sparse_engine), tiny_checkpoint)
    assert report.passed()
    assert max(report.layers) < 1e-5
    assert report.selection == 0
    assert report.scores is not None
    assert report.scores < 1e-5


def test_parity_passes_when_weights_are_int8(int8_engine: Path, tiny_checkpoint: Path) -> None:
    report = parity_of(shadowc.load(int8_engine), tiny_checkpoint, weights="int8")
    assert report.passed()
    assert max(report.layers) < 1e-5, "int8 rounding must be modelled exactly, not tolerated"
    assert report.selection == 0
    assert report.scores is not None
    assert report.scores < 2e-3


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


def test_parity_fails_when_the_engine_ignores_its_density(sparse_engine: Path, tiny_checkpoint: Path) -> None:
    report = parity_of(changed(sparse_engine, ignore_density), tiny_checkpoint)
    assert failing(report) == [], "masks that are consistent with themselves hide the defect from the layers"
    assert not report.passed()
    with pytest.raises(VerificationError) as caught:
        report.require()
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["selection"]
    assert "no engine was written" not in caught.value.message  # it is there; the gate of compile says so
    assert caught.value.hint.startswith("shadowc bisect ENGINE --against MODEL")


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_parity_fails_when_one_kind_uses_the_density_of_the_other(
    sparse_engine: Path, tiny_checkpoint: Path, kind: str
) -> None:
    def swap(model: onnx.ModelProto) -> None:
        other = {"heads": "neurons", "neurons": "heads"}[kind]
        named(model, f"select.{kind}").input[1] = named(model, f"select.{other}").input[1]

    assert parity_of(changed(sparse_engine, swap), tiny_checkpoint).selection


def test_parity_fails_when_units_are_ranked_in_another_scope(sparse_engine: Path, tiny_checkpoint: Path) -> None:
    report = parity_of(shadowc.load(sparse_engine), tiny_checkpoint, weights="fp32")
    assert report.selection == 0
    local = shadowc.load(sparse_engine).with_scope("local")
    local.manifest = shadowc.load(sparse_engine).manifest
    assert parity_of(local, tiny_checkpoint).selection


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_parity_fails_when_scores_belong_to_the_next_unit(
    sparse_engine: Path, int8_engine: Path, tiny_checkpoint: Path, weights: str, kind: str
) -> None:
    """As rows of fc2 rolled by one would: every score moves to its neighbour, masks stay consistent."""

    def roll(model: onnx.ModelProto) -> None:
        roll_scores(model, f"scores.{kind}")

    engine = changed(sparse_engine if weights == "fp32" else int8_engine, roll)
    report = parity_of(engine, tiny_checkpoint, weights=weights)
    assert failing(report) == []
    assert report.selection == 0
    with pytest.raises(VerificationError) as caught:
        report.require()
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["scores"]
    assert report.scores is not None
    assert report.scores > 10 * report.scores_tolerance


def test_compile_parity_compares_with_the_predictor_only_when_it_is_given(
    sparse_engine: Path, tiny_checkpoint: Path
) -> None:
    report = parity_of(shadowc.load(sparse_engine), tiny_checkpoint)
    assert replace(report, scores=None, selection=None).passed()


@pytest.mark.parametrize("part", ["embedding", "logits", "scores"])
def test_a_difference_that_is_no_number_fails(sparse_engine: Path, tiny_checkpoint: Path, part: str) -> None:
    report = parity_of(shadowc.load(sparse_engine), tiny_checkpoint)
    assert not replace(report, **{part: float("nan")}).passed()  # type: ignore[arg-type]
    assert not replace(report, layers=(0.0, float("nan"))).passed()


def test_relative_differences_are_defined_when_the_truth_is_zero() -> None:
    assert relative(0.0, 0.0) == 0
    assert relative(1e-6, 0.0) > 1
    assert np.isnan(relative(float("nan"), 0.0))
    assert np.isnan(relative(0.0, float("nan")))
    assert np.isnan(worse(1.0, float("nan")))
    assert np.isnan(worse(float("nan"), 1.0))


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


@pytest.mark.parametrize(("steps", "fails"), [(0, False), (2, True)])
def test_parity_names_the_layer_whose_float16_cache_is_not_the_rounding_of_its_keys(
    int8_engine: Path, tiny_checkpoint: Path, steps: int, fails: bool
) -> None:
    """Shown in the cache alone, as keys of slightly wrong weights would be; half a step is what float16 may be off."""
    new_probe = shadowc.load(int8_engine).prober()

    class Shifted:
        def __init__(self) -> None:
            self._probe = new_probe()

        def step(self, ids_BS: npt.NDArray[np.int64], **how: object) -> Mapping[str, npt.NDArray[np.float32]]:
            outputs = dict(self._probe.step(ids_BS, **how))  # type: ignore[arg-type]
            keys = outputs[f"cached.{LAYER}.key"]
            assert keys.dtype == np.float16
            largest = np.unravel_index(np.abs(keys).argmax(), keys.shape)
            keys[largest] *= 1 + steps * 2.0**-10
            return outputs

    report = parity_of(shadowc.load(int8_engine), tiny_checkpoint, Shifted, weights="int8")
    assert failing(report) == ([LAYER] if fails else [])


@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_parity_fails_when_weights_are_compared_in_another_rounding(
    int8_engine: Path, tiny_checkpoint: Path, weights: str
) -> None:
    report = parity_of(shadowc.load(int8_engine), tiny_checkpoint, weights=weights)
    assert len(failing(report)) == len(report.layers)


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

    def swapped(recipes, source, names, *rest):  # type: ignore[no-untyped-def]
        arrays = sound(recipes, source, names, *rest)
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


def ignore_density(model: onnx.ModelProto) -> None:
    """Plants a constant density of 1."""
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "planted"))
    for node in model.graph.node:
        if node.op_type == "SelectThreshold":
            node.input[1] = "planted"


def roll_scores(model: onnx.ModelProto, scores: str) -> None:
    """Moves every score to the next unit, in place of its name."""
    (maker,) = (node for node in model.graph.node if scores in node.output)
    units = next(value for value in model.graph.output if value.name == scores).type.tensor_type.shape.dim[3].dim_value
    order = np.roll(np.arange(units), 1)
    model.graph.initializer.append(numpy_helper.from_array(order, f"{scores}.order"))
    maker.output[list(maker.output).index(scores)] = f"{scores}.sound"
    gather = helper.make_node("Gather", [f"{scores}.sound", f"{scores}.order"], [scores], axis=3, name=f"{scores}.roll")
    model.graph.node.insert(list(model.graph.node).index(maker) + 1, gather)


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
