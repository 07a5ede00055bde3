# SPDX-License-Identifier: Apache-2.0
"""Folders of target tensorrt made from a cpu engine: the same operators in two graphs with weights as inputs.

The graphs keep the CPU's records (one tensor for all projections): what is under test is the runtime around them.
The plans are no plans; a host device runs the graphs instead.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shadowc.emit.folder import file_entries, write_manifest
from shadowc.runtime.load import read_manifest
from shadowc.runtime.tensorrt.layout import aligned
from shadowc.runtime.variants import _keep, _prune
from shadowc.spec.manifest import (
    MODEL_FILE,
    WEIGHTS_FILE,
    EngineManifest,
    PlanPart,
    PlanTensor,
    PluginPart,
    TensorRtPart,
    WeightPart,
)
from shadowc.spec.tensors import LOGITS_FROM

DTYPES = {
    TensorProto.FLOAT: "float32",
    TensorProto.INT8: "int8",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.UINT8: "int8",
}
OPERATORS = ("shadowc::SelectThreshold::1", "shadowc::SparseAttention::1", "shadowc::SparseFFN::1")
PLUGIN = "libshadowc_trt11.so"
ALL_TOKENS = 1 << 30
COUNTS = ("active.heads", "active.neurons", "read")


def write_folder(
    cpu: Path, out: Path, *, max_batch: int = 4, max_context: int = 64, chunk: int = 8, family: str = "rtx1",
) -> EngineManifest:  # fmt: skip
    """An engine folder at `out`; `cpu` is an engine with float32 weights."""
    out.mkdir(parents=True)
    manifest = read_manifest(cpu)
    model = onnx.load(cpu / MODEL_FILE)  # weights included
    weights = write_weights(model, out / WEIGHTS_FILE)
    facts = manifest.model
    parts = {}
    for name, make in (("prefill", prefill_graph), ("decode", decode_graph)):
        graph = make(model, {weight.name for weight in weights}, facts.layers)
        onnx.save(graph, out / f"{name}.onnx")
        (out / f"{name}.plan").write_bytes(name.encode())
        parts[name] = plan_part(graph, name, weights, facts, (max_batch, max_context, chunk))
    (out / PLUGIN).write_bytes(b"plugin")
    for path in cpu.glob("tokenizer*"):
        shutil.copy(path, out / path.name)
    part = TensorRtPart(
        family=family,
        library_version="1.7.1.116",
        activations="float32",
        max_batch=max_batch,
        max_context=max_context,
        chunk=chunk,
        compute_capabilities=("8.0", "8.6", "8.9"),
        portable_above="12.0",
        plans=parts,
        plugins=(PluginPart(file=PLUGIN, registers_itself=False, operators=OPERATORS),),
        weights=tuple(weights),
    )
    made = manifest.model_copy(update={"target": "tensorrt-rtx", "tensorrt": part, "files": file_entries(out)})
    write_manifest(out, made)
    return made


def write_weights(model: onnx.ModelProto, path: Path) -> list[WeightPart]:
    """All large tensors of the graph, aligned; small constants stay inside the graphs."""
    table, end = [], 0
    with path.open("wb") as file:
        for tensor in model.graph.initializer:
            if tensor.name.startswith(("c.", "dense.", "density_", "sparse_tail")) or not tensor.dims:
                continue
            array = numpy_helper.to_array(tensor)
            if array.dtype != np.float32:
                continue
            file.seek(end)
            file.write(array.tobytes())
            table.append(
                WeightPart(name=tensor.name, dtype="float32", shape=array.shape, offset=end, bytes=array.nbytes)
            )
            end = aligned(end + array.nbytes)
        file.truncate(end)
    return table


def decode_graph(model: onnx.ModelProto, weights: set[str], layers: int) -> onnx.ModelProto:
    """Any number of tokens over the cache, all of them masked; past and start come from the caller."""
    graph = _with_weight_inputs(model, weights)
    for node in graph.graph.node:  # what the mask decided is given now
        node.output[:] = [f"unused.{name}" if name in ("past", "start") else name for name in node.output]
    _keep(graph.graph.input, lambda value: value.name not in ("attention_mask", "sparse_tail", LOGITS_FROM))
    _keep(graph.graph.initializer, lambda tensor: not tensor.name.startswith("density_"))
    for name in ("past", "start"):
        graph.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["B"]))
    _constant(graph, "sparse_tail", np.array([ALL_TOKENS], np.int64))
    for value in graph.graph.input:
        if value.name.startswith("density_"):
            value.type.tensor_type.shape.dim[0].dim_param = "B"
    _outputs(graph, ("logits", *_cache("present", layers), *COUNTS))
    return graph


def prefill_graph(model: onnx.ModelProto, weights: set[str], layers: int) -> onnx.ModelProto:
    """A whole prompt, dense: logits of its last token, and fresh keys and values."""
    graph = _with_weight_inputs(model, weights)
    cache = set(_cache("past_key_values", layers))
    H, D = (graph.graph.input[2].type.tensor_type.shape.dim[axis].dim_value for axis in (1, 3))
    gone = cache | {"sparse_tail", "density_heads", "density_neurons"}
    _keep(graph.graph.input, lambda value: value.name not in gone | {LOGITS_FROM})
    _keep(graph.graph.initializer, lambda tensor: tensor.name not in gone)
    _constant(graph, "sparse_tail", np.array([0], np.int64))
    for kind in ("heads", "neurons"):
        _constant(graph, f"density_{kind}", np.ones(1, np.float32))
    _constant(graph, "cache.H", np.array([H], np.int64))
    _constant(graph, "cache.D", np.array([D], np.int64))
    _constant(graph, "last", np.array([-1], np.int64))
    first = [
        helper.make_node("Shape", ["input_ids"], ["cache.B"], "cache.B", start=0, end=1),
        helper.make_node("Shape", ["input_ids"], ["cache.S"], "cache.S", start=1, end=2),
        helper.make_node(
            "Concat", ["cache.B", "cache.H", "cache.S", "cache.D"], ["cache.shape"], "cache.shape", axis=0
        ),
        helper.make_node("ConstantOfShape", ["cache.shape"], ["cache.empty"], "cache.empty"),
    ]
    nodes = list(graph.graph.node)
    for node in nodes:
        node.input[:] = ["cache.empty" if name in cache else name for name in node.input]
        node.output[:] = ["logits.all" if name == "logits" else name for name in node.output]
    del graph.graph.node[:]
    graph.graph.node.extend(
        [*first, *nodes, helper.make_node("Gather", ["logits.all", "last"], ["logits"], "logits.last", axis=1)]
    )
    _outputs(graph, ("logits", *_cache("present", layers)))
    return graph


def plan_part(
    graph: onnx.ModelProto, name: str, weights: list[WeightPart], facts: Any, limits: tuple[int, int, int]
) -> PlanPart:
    """The tensors of a graph, with profiles."""
    batch, context, chunk = limits
    tokens = context if name == "prefill" else chunk
    known = {weight.name for weight in weights}
    H, D, L, V = facts.heads, facts.head_size, facts.layers - 1, facts.vocab
    profile = {
        "token": ((-1, -1), (1, 1), (batch, tokens)),
        "state": ((-1,), (1,), (batch,)),
        "dial": ((-1,), (1,), (batch,)),
        "cache": ((-1, H, -1, D), (1, H, 1, D), (batch, H, context, D)),
    }
    inputs = []
    for value in graph.graph.input:
        kind = _kind(value.name, known)
        if kind == "weight":
            shape = tuple(size.dim_value for size in value.type.tensor_type.shape.dim)
            inputs.append(PlanTensor(name=value.name, kind=kind, dtype="float32", shape=shape))
            continue
        shape, low, high = profile[kind]
        inputs.append(
            PlanTensor(
                name=value.name,
                kind=kind,
                dtype=DTYPES[value.type.tensor_type.elem_type],
                shape=shape,
                smallest=low,
                best=high,
                largest=high,
            )
        )
    outputs = []
    for value in graph.graph.output:
        kind = _kind(value.name, known)
        shape = {
            "logits": (-1, 1 if name == "prefill" else -1, V),
            "cache": (-1, H, -1, D),
            "count": (facts.layers, 2, 2) if value.name == "read" else (-1, -1, L),
        }[kind]
        alias = value.name.replace("present", "past_key_values") if kind == "cache" and name == "decode" else ""
        dtype = {"count": "int64" if value.name == "read" else "int32"}.get(kind, "float32")
        outputs.append(PlanTensor(name=value.name, kind=kind, dtype=dtype, shape=shape, alias_of=alias))
    return PlanPart(file=f"{name}.plan", onnx=f"{name}.onnx", inputs=tuple(inputs), outputs=tuple(outputs))


def _kind(name: str, weights: set[str]) -> Any:
    if name in weights:
        return "weight"
    starts = {
        "input_ids": "token", "attention_mask": "token", "past_key_values.": "cache", "present.": "cache",
        "density_": "dial", "logits": "logits", "active.": "count", "read": "count", "past": "state", "start": "state",
    }  # fmt: skip
    return next(kind for start, kind in starts.items() if name.startswith(start))


def _with_weight_inputs(model: onnx.ModelProto, weights: set[str]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in weights:
            copy.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    _keep(copy.graph.initializer, lambda tensor: tensor.name not in weights)
    return copy


def _constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    _keep(model.graph.initializer, lambda tensor: tensor.name != name)
    model.graph.initializer.append(numpy_helper.from_array(value, name))


def _outputs(model: onnx.ModelProto, names: tuple[str, ...]) -> None:
    """Only these outputs, and only what they need."""
    _keep(model.graph.output, lambda value: value.name in names)
    _prune(model.graph)
    needed = {name for node in model.graph.node for name in node.input}
    _keep(model.graph.input, lambda value: value.name in needed)


def _cache(side: str, layers: int) -> list[str]:
    return [f"{side}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
