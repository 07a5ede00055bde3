# SPDX-License-Identifier: Apache-2.0
"""`bisect` names the layer, the tensor and the stored parameter that were altered, and nothing on a sound engine."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import shadowc
from shadowc.checkpoint.opt import HEAD, layer_names
from shadowc.measure.against import verify_against
from shadowc.measure.bisect import BisectReport, bisect
from shadowc.runtime.sequence import ScoreMaker
from shadowc.spec.errors import InputError, VerificationError
from shadowc.spec.manifest import FIXED_FILE, MODEL_FILE, REFERENCE_FILE, WEIGHTS_FILE
from shadowc.spec.ops import SELECT_THRESHOLD
from tests.conftest import TINY, random_model, write_tokenizer
from tests.e2e.compiled import options

LAYER = 2
NAMES = layer_names(LAYER)
ATTENTION, FFN = f"layers.{LAYER}.attention", f"layers.{LAYER}.ffn"
MIDDLE, OUTPUT = f"layers.{LAYER}.middle", f"residual.{LAYER + 1}"


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "altered.engine"))


def alter(folder: Path, name: str, index: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change one stored element of weights.bin, found through the graph."""
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    tensor = next(one for one in graph.initializer if one.name == name)
    where = {entry.key: entry.value for entry in tensor.external_data}
    assert where["location"] == WEIGHTS_FILE
    shape, dtype = tuple(tensor.dims), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    mapped = np.memmap(folder / WEIGHTS_FILE, dtype, "r+", int(where.get("offset", 0)), shape)
    mapped[index] = change(mapped[index])
    mapped.flush()


def larger(value: np.ndarray) -> np.ndarray:
    return value + np.asarray(1, value.dtype)


def found(folder: Path, checkpoint: Path) -> BisectReport:
    report = bisect(folder, str(checkpoint))
    assert report.first is not None
    return report


PLANTED = {
    "query": (f"{ATTENTION}.w", (1, 0, 3, 5), f"context.{LAYER}", NAMES.q.weight, (16 + 3, 5)),
    "key": (f"{ATTENTION}.w", (1, 1, 3, 5), f"cached.{LAYER}.key", NAMES.k.weight, (16 + 3, 5)),
    "value": (f"{ATTENTION}.w", (3, 2, 0, 63), f"cached.{LAYER}.value", NAMES.v.weight, (48, 63)),
    "output": (f"{ATTENTION}.w", (2, 3, 7, 9), MIDDLE, NAMES.out.weight, (9, 32 + 7)),
    "query bias": (f"{ATTENTION}.bqkv", (0, 0, 2), f"context.{LAYER}", NAMES.q.bias, (2,)),
    "output bias": (f"{ATTENTION}.bo", (11,), MIDDLE, NAMES.out.bias, (11,)),
    "attention norm": (NAMES.attention_norm.weight, (4,), f"cached.{LAYER}.key", NAMES.attention_norm.weight, (4,)),
    "FFN norm": (NAMES.ffn_norm.bias, (6,), OUTPUT, NAMES.ffn_norm.bias, (6,)),
    "second FFN bias": (f"{FFN}.b2", (8,), OUTPUT, NAMES.fc2.bias, (8,)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_altered_weight_is_named_with_layer_tensor_and_place(
    sparse_engine: Path, tiny_checkpoint: Path, copied: Callable[[Path], Path], name: str
) -> None:
    stored, index, tensor, parameter, at = PLANTED[name]
    folder = copied(sparse_engine)
    alter(folder, stored, index, larger)
    report = found(folder, tiny_checkpoint)
    assert (report.first.layer, report.first.tensor) == (LAYER, tensor)
    assert [(one.name, one.at, one.values) for one in report.altered] == [(parameter, at, 1)]
    assert any(WEIGHTS_FILE in problem for problem in report.changed_files)
    with pytest.raises(VerificationError, match=f"layer {LAYER}, {tensor}") as caught:
        report.require()
    assert parameter in caught.value.problems[0]


@pytest.mark.parametrize("part", [0, 1])
def test_altered_neuron_is_named_in_the_checkpoints_order(
    sparse_engine: Path, tiny_checkpoint: Path, copied: Callable[[Path], Path], part: int
) -> None:
    """Any record will do whose neuron fires and is active; a whole column of them is altered, of two sizes."""
    from shadowc.runtime.load import load_cpu

    folder = copied(sparse_engine)
    order = load_cpu(sparse_engine).neuron_orders()[LAYER]
    assert (order != np.arange(len(order))).any()
    for record in range(256):
        alter(folder, f"{FFN}.w", (record, part, 5), lambda value: value + np.float32(0.1))
    alter(folder, f"{FFN}.w", (17, part, 5), larger)
    report = found(folder, tiny_checkpoint)
    assert (report.first.layer, report.first.tensor) == (LAYER, OUTPUT)
    neuron = int(order[17])
    (altered,) = report.altered
    assert altered.name == (NAMES.fc2.weight if part else NAMES.fc1.weight)
    assert altered.at == ((5, neuron) if part else (neuron, 5))
    assert altered.values == 256


def test_altered_record_of_an_int8_engine_is_named(
    int8_engine: Path, tiny_checkpoint: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(int8_engine)
    alter(folder, f"{ATTENTION}.w", (1, 1, 3, 5), lambda value: np.int8(-value or 90))
    report = found(folder, tiny_checkpoint)
    assert (report.first.layer, report.first.tensor) == (LAYER, f"cached.{LAYER}.key")
    assert [(one.name, one.at) for one in report.altered] == [(NAMES.k.weight, (19, 5))]


def test_first_of_two_altered_layers_is_named(
    sparse_engine: Path, tiny_checkpoint: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(sparse_engine)
    for layer in (3, 1):
        alter(folder, f"layers.{layer}.ffn.b2", (0,), larger)
    report = found(folder, tiny_checkpoint)
    assert report.first.layer == 1
    assert [(one.layer, one.tensor) for one in report.compared if one.deviates] == [
        (1, "residual.2"),
        (3, "residual.4"),
    ]


OUTSIDE = {
    "model.decoder.embed_positions.weight": ("residual.0", (5, 1), "model.decoder.embed_positions.weight", (5, 1)),
    "model.decoder.final_layer_norm.bias": ("logits", (1,), "model.decoder.final_layer_norm.bias", (1,)),
    "lm_head": ("logits", (1, 7), "lm_head.weight", (7, 1)),
}


@pytest.mark.parametrize("stored", OUTSIDE)
def test_what_lies_outside_the_layers_is_named_too(
    sparse_engine: Path, tiny_checkpoint: Path, copied: Callable[[Path], Path], stored: str
) -> None:
    tensor, index, parameter, at = OUTSIDE[stored]
    folder = copied(sparse_engine)
    alter(folder, stored, index, larger)
    report = found(folder, tiny_checkpoint)
    assert (report.first.layer, report.first.tensor) == (None, tensor)
    assert [(one.name, one.at) for one in report.altered] == [(parameter, at)]


def test_nan_in_a_weight_is_a_deviation(
    sparse_engine: Path, tiny_checkpoint: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(sparse_engine)
    alter(folder, f"{ATTENTION}.bo", (3,), lambda _: np.float32(np.nan))
    report = found(folder, tiny_checkpoint)
    assert (report.first.layer, report.first.tensor) == (LAYER, MIDDLE)
    assert [(one.name, one.at) for one in report.altered] == [(NAMES.out.bias, (3,))]


def test_graph_that_uses_another_layers_masks_is_told_from_altered_weights(
    sparse_engine: Path, tiny_checkpoint: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(sparse_engine)
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    node = next(node for node in model.graph.node if node.name == FFN)
    next(one for one in node.attribute if one.name == "layer").i = 0
    size = (folder / MODEL_FILE).stat().st_size
    written = model.SerializeToString()
    assert len(written) == size
    (folder / MODEL_FILE).write_bytes(written)
    report = found(folder, tiny_checkpoint)
    assert (report.first.layer, report.first.tensor, report.altered) == (LAYER, OUTPUT, ())
    with pytest.raises(VerificationError) as caught:
        report.require()
    assert MODEL_FILE in caught.value.problems[0]


def rewrite_fixed(folder: Path, plant: Callable[[onnx.GraphProto], None]) -> None:
    """Plant a defect in decode_fixed.onnx alone; its size stays."""
    path = folder / FIXED_FILE
    model = onnx.load(path, load_external_data=False)
    plant(model.graph)
    written = model.SerializeToString()
    assert len(written) == path.stat().st_size
    assert written != path.read_bytes()
    path.write_bytes(written)


def stored_as_layer(name: str, layer: int) -> Callable[[onnx.GraphProto], None]:
    """Let one tensor of LAYER be read where the same tensor of another layer lies."""

    def plant(graph: onnx.GraphProto) -> None:
        places = {one.name: one.external_data for one in graph.initializer}
        mine, theirs = (places[f"layers.{number}.{name}"] for number in (LAYER, layer))
        for entry, other in zip(mine, theirs, strict=True):
            entry.value = other.value

    return plant


def masks_of_layer(operator: str, row: int) -> Callable[[onnx.GraphProto], None]:
    def plant(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.name == operator)
        next(one for one in node.attribute if one.name == "layer").i = row

    return plant


ONLY_HELD = {
    "other FFN bias": (stored_as_layer("ffn.b2", LAYER + 1), OUTPUT, [NAMES.fc2.bias]),
    "other K bias": (stored_as_layer("attention.bqkv", LAYER + 1), f"cached.{LAYER}.key", [NAMES.k.bias]),
    "masks of another layer's neurons": (masks_of_layer(FFN, 0), OUTPUT, []),
    "masks of another layer's heads": (
        masks_of_layer(ATTENTION, 2),
        f"cached.{LAYER}.key",
        [],
    ),  # of a head that is active, not written
}


@pytest.mark.parametrize("name", ONLY_HELD)
def test_defect_of_the_graph_with_held_masks_alone_is_named_with_that_graph(
    sequence_engine: Path, tiny_checkpoint: Path, copied: Callable[[Path], Path], name: str
) -> None:
    plant, tensor, parameters = ONLY_HELD[name]
    folder = copied(sequence_engine)
    rewrite_fixed(folder, plant)
    report = found(folder, tiny_checkpoint)
    assert (report.first.graph, report.first.layer, report.first.tensor) == (FIXED_FILE, LAYER, tensor)
    assert [one.name for one in report.altered] == parameters
    with pytest.raises(VerificationError, match=f"{FIXED_FILE}, layer {LAYER}, {tensor}") as caught:
        report.require()
    assert any(FIXED_FILE in problem for problem in caught.value.problems)


def test_held_masks_of_another_selection_are_named(
    sequence_engine: Path, tiny_checkpoint: Path, copied: Callable[[Path], Path]
) -> None:
    def plant(graph: onnx.GraphProto) -> None:
        nodes = [node for node in graph.node if node.op_type == SELECT_THRESHOLD.name]
        next(one for node in nodes for one in node.attribute if one.name == "min_active").i = 4

    folder = copied(sequence_engine)
    rewrite_fixed(folder, plant)
    report = found(folder, tiny_checkpoint)
    assert (report.first.graph, report.first.tensor) == (FIXED_FILE, "threshold.heads, threshold.neurons")


def test_held_masks_that_another_units_scores_make_are_named(
    sequence_engine: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = ScoreMaker.scores

    def rolled(*arguments: object) -> object:
        scores, read = sound(*arguments)
        return tuple(np.roll(array, 1, axis=-1) for array in scores), read

    monkeypatch.setattr(ScoreMaker, "scores", rolled)
    report = found(sequence_engine, tiny_checkpoint)
    assert (report.first.graph, report.first.tensor) == (FIXED_FILE, "mask_scores.heads, mask_scores.neurons")
    assert [one.tensor for one in report.compared if one.deviates] == [report.first.tensor]


def test_altered_weight_deviates_in_both_graphs_and_is_named_once(
    sequence_engine: Path, tiny_checkpoint: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(sequence_engine)
    alter(folder, f"{FFN}.b2", (8,), larger)
    report = found(folder, tiny_checkpoint)
    assert [(one.graph, one.layer, one.tensor) for one in report.compared if one.deviates] == [
        (MODEL_FILE, LAYER, OUTPUT),
        (FIXED_FILE, LAYER, OUTPUT),
    ]
    assert [(one.name, one.at) for one in report.altered] == [(NAMES.fc2.bias, (8,))]


def stored_head(folder: Path) -> str:
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    (name,) = [one.name for one in graph.initializer if "lm_head" in one.name and one.data_type in WHOLE_NUMBERS]
    return name


WHOLE_NUMBERS = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)


def test_engine_compiled_before_matmul_rows_is_refused_and_not_called_wrong(
    int8_engine: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = onnx.load(int8_engine / MODEL_FILE, load_external_data=False)
    (head,) = [node for node in graph.graph.node if "logits" in node.output]
    head.op_type, head.domain = "MatMulNBits", "com.microsoft"
    monkeypatch.setattr("shadowc.runtime.engine.Engine.graph", lambda _: graph)
    for command in (
        lambda: bisect(int8_engine, str(tiny_checkpoint)),
        lambda: verify_against(int8_engine, str(tiny_checkpoint)),
    ):
        with pytest.raises(InputError, match="compiled by an earlier version"):
            command()


def with_altered_head(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As where the engine was compiled with the defect, and its files are what its manifest says."""
    alter(folder, stored_head(folder), (Ellipsis, slice(0, 8)), lambda values: 127 - values)
    monkeypatch.setattr("shadowc.runtime.verification.file_problems", lambda *_, **__: [])
    return folder


def test_altered_head_of_an_int8_engine_is_named(
    int8_engine: Path, tiny_checkpoint: Path, copied: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = found(with_altered_head(copied(int8_engine), monkeypatch), tiny_checkpoint)
    assert report.first.tensor == "logits"
    assert [altered.name for altered in report.altered] == [HEAD]


def test_parameter_stored_in_a_form_that_is_not_compared_is_not_said_to_be_the_checkpoints(
    int8_engine: Path, tiny_checkpoint: Path, copied: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the head has the form of engines that were compiled before MatMulRows."""
    folder = with_altered_head(copied(int8_engine), monkeypatch)
    monkeypatch.setattr("shadowc.measure.stored_weights._TRANSPOSED", {HEAD: "lm_head.of_before"})
    report = found(folder, tiny_checkpoint)
    assert (report.first.tensor, report.altered, HEAD in report.matched) == ("logits", (), False)
    for one, command in ((report, "with --reference"), (replace(report, reference=True), "or one of the latter")):
        with pytest.raises(VerificationError) as caught:
            one.require()
        assert f"{HEAD}: stored in a form that is not compared" in caught.value.hint
        assert "final_layer_norm.bias: as in the checkpoint" in caught.value.hint
        assert command in caught.value.hint


@pytest.mark.parametrize("reference", [False, True])
def test_parameters_that_were_compared_are_named_where_the_graph_is_wrong(
    sparse_engine: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, reference: bool
) -> None:
    monkeypatch.setattr("shadowc.measure.parity.LAYER_TOLERANCE", 0.0)
    report = bisect(sparse_engine, str(tiny_checkpoint), reference=reference)
    assert report.first is not None
    assert report.matched == report.first.parameters != ()
    with pytest.raises(VerificationError) as caught:
        report.require()
    assert "not compared" not in caught.value.hint
    assert ("--reference" in caught.value.hint) == (not reference)


@pytest.mark.parametrize("kind", ["sparse_engine", "int8_engine", "sequence_engine"])
def test_sound_engine_has_no_deviation(kind: str, tiny_checkpoint: Path, request: pytest.FixtureRequest) -> None:
    report = bisect(request.getfixturevalue(kind), str(tiny_checkpoint))
    report.require()
    assert report.first is None
    assert (report.altered, report.changed_files) == ((), ())
    of_graph = 2 + 1 + 5 * 4
    assert Counter(one.graph for one in report.compared) == (
        {MODEL_FILE: of_graph, FIXED_FILE: of_graph + 1} if kind == "sequence_engine" else {MODEL_FILE: of_graph}
    )
    inner = [one.difference for one in report.compared if one.layer is not None]
    assert 0 < max(inner) < 1e-5


@pytest.mark.parametrize("kind", ["sparse_engine", "int8_engine", "sequence_engine"])
def test_reference_graph_is_compared_without_kernels(
    kind: str, tiny_checkpoint: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    assert (folder / REFERENCE_FILE).is_file()
    assert bisect(folder, str(tiny_checkpoint), reference=True).first is None


@pytest.mark.parametrize(
    ("sharper", "form"),
    [(5.0, {}), (1.0, {"word_embed_proj_dim": 32, "do_layer_norm_before": False})],
    ids=["sharp attention", "the form of opt-350m"],
)
def test_reference_graphs_of_an_int8_engine_whose_prompts_come_in_two_calls_are_sound(
    tmp_path: Path, sharper: float, form: dict[str, Any]
) -> None:
    model = random_model({**TINY, **form})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(sharper**0.5)
    checkpoint = tmp_path / "opt-sharp"
    model.save_pretrained(checkpoint)
    write_tokenizer(checkpoint)
    folder = shadowc.compile(options(checkpoint, tmp_path / "sharp.engine", weights="int8", mask="sequence"))
    report = bisect(folder, str(checkpoint), reference=True)
    assert report.first is None
    assert {one.graph for one in report.compared} == {REFERENCE_FILE, FIXED_FILE}


def test_altered_query_is_found_in_the_reference_graph_of_an_int8_engine(
    int8_engine: Path, tiny_checkpoint: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(int8_engine)
    alter(folder, f"{ATTENTION}.w", (1, 0, 3), lambda values: np.negative(values))
    report = bisect(folder, str(tiny_checkpoint), reference=True)
    assert report.first is not None
    assert (report.first.layer, report.first.tensor) == (LAYER, f"context.{LAYER}")
    assert [(one.name, one.at[0]) for one in report.altered] == [(NAMES.q.weight, 19)]


def test_engine_of_another_checkpoint_is_refused(sparse_engine: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError, match="another checkpoint"):
        bisect(sparse_engine, str(tiny_checkpoint), load_format="dummy")
