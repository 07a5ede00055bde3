# SPDX-License-Identifier: Apache-2.0
"""Target cpu: weights.bin, model.onnx for ONNX Runtime with the op library, reference.onnx for stock ONNX Runtime.

Where a mask holds for a sequence, decode_fixed.onnx lies over the same weights.
Only here do the run-time dials get their defaults: GraphSurgeon would turn an initialiser that is also a graph
input into a constant, and other targets do not know defaults.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, MutableSequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from shadowc.emit.prompts import give_logits_a_start, give_prompts_few_digits
from shadowc.emit.records import Array, natural_key
from shadowc.emit.target import EmitResult
from shadowc.emit.weights import Placement, nbytes, write_weights
from shadowc.runtime.weights_memory import renew_pages
from shadowc.spec.density import Density
from shadowc.spec.errors import InternalError
from shadowc.spec.manifest import FIXED_FILE, MODEL_FILE, REFERENCE_FILE, WEIGHTS_FILE, BytesPart, FileEntry
from shadowc.spec.program import WeightRecipe
from shadowc.spec.progress import Progress

if TYPE_CHECKING:
    import onnx

    from shadowc.spec.program import Program, TensorSource

_Message = TypeVar("_Message")

AUTOMATIC_TAIL = -1
"""Default of sparse_tail: one masked token when one token comes in, none in a prefill."""
_RECORD_KINDS = ("attention_records", "attention_scales", "ffn_records", "ffn_scales")
_ONNX_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "bfloat16": 16}
"""TensorProto.FLOAT, UINT8, INT8, BFLOAT16."""
_CACHE_BYTES = {1: 4, 10: 2}
"""TensorProto.FLOAT, FLOAT16."""


def emit_cpu(
    program: Program,
    source: TensorSource,
    staging: Path,
    *,
    fixed: Program | None = None,
    density: Density = Density(),  # noqa: B008 (frozen)
    exact_prompts: bool = False,
    progress: Progress | None = None,
) -> EmitResult:
    """Write the files; repeated with the same arguments they are the same bytes.

    Args:
        program: the final graph; its weights are graph inputs with recipes.
        source: every tensor that the recipes name.
        staging: an existing folder.
        fixed: the same model with masks as inputs; its weights are among the program's.
        density: default of the density inputs, if the graph has them.
        exact_prompts: nothing is rounded: prompts, and tokens with int4 weights, are computed with all digits.
        progress: told how many bytes of weights are written.
    """
    from shadowc.spec import oracle
    from shadowc.trace.program_io import to_model

    model = to_model(program)
    places, weights_entry = write_weights(staging / WEIGHTS_FILE, program.weights, source, progress)
    renew_pages(staging / WEIGHTS_FILE)
    _bind_weights(model, program.weights, places)
    _give_defaults(model, density)
    _prepare_prompts(model, exact_prompts)
    graphs = {MODEL_FILE: model, REFERENCE_FILE: oracle.attach(model)}
    if fixed is not None:
        graphs[FIXED_FILE] = _over_the_same_weights(fixed, program, places, density)
        _prepare_prompts(graphs[FIXED_FILE], exact_prompts)
    files = {WEIGHTS_FILE: weights_entry}
    for name, proto in graphs.items():
        files[name] = _write_model(staging / name, proto)
    ops = {opset.domain: opset.version for opset in model.opset_import if opset.domain}
    return EmitResult(files=files, bytes_per_token=bytes_per_token(model, program.weights), ops=ops)


def _prepare_prompts(model: onnx.ModelProto, exact: bool) -> None:
    give_logits_a_start(model)
    if not exact:
        give_prompts_few_digits(model)


def _over_the_same_weights(
    fixed: Program, program: Program, places: Mapping[str, Placement], density: Density
) -> onnx.ModelProto:
    from shadowc.trace.program_io import to_model

    others = sorted(name for name, recipe in fixed.weights.items() if program.weights.get(name) != recipe)
    if others:
        raise InternalError(f"decode_fixed has weights of its own: {', '.join(others[:5])} ({len(others)} in all)")
    model = to_model(fixed)
    _bind_weights(model, fixed.weights, places)
    _give_defaults(model, density)
    return model


def bytes_per_token(model: onnx.ModelProto, recipes: Mapping[str, WeightRecipe]) -> BytesPart:
    """What one token reads outside the sparse operators, and what the dense operators would read."""
    rows = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    parts = dict.fromkeys(("lm_head", "predictor", "other", "records"), 0)
    for name, recipe in recipes.items():
        size = nbytes(recipe)
        if recipe.kind in _RECORD_KINDS:
            parts["records"] += size
        elif name.startswith("lm_head"):
            parts["lm_head"] += size
        elif name.startswith("predictor."):
            parts["predictor"] += size
        else:
            parts["other"] += size // recipe.shape[0] if name in rows else size
    return BytesPart(**parts, cache=_cache_bytes(model))


def _cache_bytes(model: onnx.ModelProto) -> int:
    """What one token adds to the cache."""
    total = 0
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            tensor = value.type.tensor_type
            _, heads, _, size = (dim.dim_value for dim in tensor.shape.dim)
            total += heads * size * _CACHE_BYTES[tensor.elem_type]
    return total


def _bind_weights(model: onnx.ModelProto, recipes: Mapping[str, WeightRecipe], places: Mapping[str, Placement]) -> None:
    """Turn the graph inputs that have recipes into initialisers that point into weights.bin."""
    graph = model.graph
    inputs = {value.name for value in graph.input}
    missing = sorted(recipes.keys() - inputs)
    if missing:
        raise InternalError(f"recipes without a graph input: {', '.join(missing[:5])} ({len(missing)} in all)")
    _replace(graph.input, [value for value in graph.input if value.name not in recipes])
    constants: list[onnx.TensorProto] = list(graph.initializer)
    tensors = [_external(name, recipes[name], places[name]) for name in recipes]
    _replace(graph.initializer, sorted([*constants, *tensors], key=lambda tensor: natural_key(tensor.name)))


def _external(name: str, recipe: WeightRecipe, place: Placement) -> onnx.TensorProto:
    import onnx

    tensor = onnx.TensorProto(
        name=name,
        dims=recipe.shape,
        data_type=_ONNX_TYPES[recipe.dtype],
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (("location", WEIGHTS_FILE), ("offset", str(place.offset)), ("length", str(place.length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _give_defaults(model: onnx.ModelProto, density: Density) -> None:
    from onnx import numpy_helper

    inputs = {value.name for value in model.graph.input}
    defaults: dict[str, Array] = {
        "density_heads": np.array([density.heads], np.float32),
        "density_neurons": np.array([density.neurons], np.float32),
        "sparse_tail": np.array([AUTOMATIC_TAIL], np.int64),
    }
    for name, value in defaults.items():
        if name in inputs:
            model.graph.initializer.append(numpy_helper.from_array(value, name))


def _write_model(path: Path, model: onnx.ModelProto) -> FileEntry:
    content = model.SerializeToString(deterministic=True)
    path.write_bytes(content)
    return FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _replace(field: MutableSequence[_Message], values: Iterable[_Message]) -> None:
    """Set a repeated protobuf field; its Python class offers no assignment."""
    kept = list(values)
    del field[:]
    field.extend(kept)
