# SPDX-License-Identifier: Apache-2.0
"""Runs one operator in ONNX Runtime: as machine code, or as the ONNX function that defines it."""

from __future__ import annotations

import functools
import os
import pathlib
import platform
from collections.abc import Container

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from shadowc.plugins import cpu_library
from shadowc.spec import ops, oracle

MACHINE = platform.machine()
TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
}
TOLERANCE = 2e-5
"""float32 sums of up to a few thousand products, relative to the largest value (or 1 if that is smaller). It holds for
every type of weights: each is exactly what it is, and sums are float32."""
CACHE_TOLERANCE = {"float32": TOLERANCE, "float16": 2.0**-10}
"""Between caches that two implementations filled, and what attention makes of them: float32 sums that differ in their
last bits can round to neighbours in float16, which are 2^-10 apart."""
WEIGHTS = ("float32", "bfloat16", "int8", "int4")


def library() -> pathlib.Path:
    """The built library: the one named in the environment, or the installed one."""
    chosen = os.environ.get("SHADOWC_ORT_LIBRARY")
    return pathlib.Path(chosen) if chosen else cpu_library()


def given(spec: ops.OpSpec, names: Container[str]) -> list[str]:
    """The inputs of a node, in order: those of the table, and of a norm those that there are."""
    return [
        *(operand.name for operand in spec.inputs),
        *(operand.name for operand in (spec.norm.inputs if spec.norm else ()) if operand.name in names),
    ]


def model(spec: ops.OpSpec, types: dict[str, np.dtype], ranks: dict[str, int], attributes: dict) -> onnx.ModelProto:
    """One node, all of whose operands are graph inputs and outputs of unknown size."""
    node = helper.make_node(
        spec.name,
        given(spec, types),
        [operand.name for operand in spec.outputs],
        name="the_node",
        domain=ops.DOMAIN,
        **attributes,
    )
    inputs = [helper.make_tensor_value_info(name, TYPES[types[name]], [None] * ranks[name]) for name in types]
    outputs = [
        helper.make_tensor_value_info(
            operand.name, TYPES[types.get(operand.name.replace("present", "past"), np.dtype(operand.types[0]))], None
        )
        for operand in spec.outputs
    ]
    opsets = [helper.make_opsetid("", oracle.OPSET), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    graph = helper.make_graph([node], "one_node", inputs, outputs)
    return helper.make_model(graph, ir_version=10, opset_imports=opsets)


def session(proto: onnx.ModelProto, *, threads: int = 2, kernel: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if kernel:
        options.register_custom_ops_library(str(library()))
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@functools.lru_cache(maxsize=256)
def _session(
    spec: ops.OpSpec, types: tuple, ranks: tuple, attributes: tuple, threads: int, kernel: bool
) -> onnxruntime.InferenceSession:
    proto = model(spec, dict(types), dict(ranks), {name: _thaw(value) for name, value in attributes})
    return session(proto if kernel else oracle.attach(proto), threads=threads, kernel=kernel)


def _freeze(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _thaw(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def run(
    spec: ops.OpSpec, arrays: dict[str, np.ndarray], threads: int = 2, kernel: bool = True, **attributes: object
) -> dict[str, np.ndarray]:
    """Outputs by name. Sessions are kept: making one costs more than most runs."""
    made = _session(
        spec,
        tuple((name, arrays[name].dtype) for name in given(spec, arrays)),
        tuple((name, arrays[name].ndim) for name in given(spec, arrays)),
        tuple(sorted((name, _freeze(value)) for name, value in attributes.items())),
        threads,
        kernel,
    )
    return dict(zip((output.name for output in made.get_outputs()), _results(made, arrays), strict=True))


def _results(made: onnxruntime.InferenceSession, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    if all(array.dtype != ml_dtypes.bfloat16 for array in arrays.values()):
        return list(made.run(None, arrays))
    values = {name: ort_value(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return [value.numpy() for value in made.run_with_ort_values(None, values)]


def ort_value(array: np.ndarray) -> onnxruntime.OrtValue:
    """The array as ONNX Runtime takes it; its own numpy knows no bfloat16. It borrows the memory."""
    if array.dtype != ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)


def oracle_run(spec: ops.OpSpec, arrays: dict[str, np.ndarray], **attributes: object) -> dict[str, np.ndarray]:
    """The same as the ONNX function, in stock ONNX Runtime."""
    return run(spec, arrays, kernel=False, **attributes)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE, largest: float = 1.0) -> None:
    """Equal shapes, NaN at the same places, values within tolerance of the largest expected one, or of `largest`."""
    assert found.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    finite = expected[np.isfinite(expected)]
    scale = max(largest, float(np.abs(finite).max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def norm(rng: np.random.Generator, width: int) -> dict[str, np.ndarray]:
    """Random operands of a layer norm."""
    return {
        "norm_scale": rng.uniform(0.5, 1.5, width).astype(np.float32),
        "norm_bias": rng.standard_normal(width, dtype=np.float32) * np.float32(0.3),
    }


def weights(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Random records and scales; the products have a standard deviation of about 0.1."""
    if dtype == "int4":
        groups = (*shape[:-1], shape[-1] // ops.INT4_GROUP)
        low, high = rng.integers(1, 16, (2, *shape[:-1], shape[-1] // 2))
        return (low + 16 * high).astype(np.uint8), rng.uniform(0.5, 1.5, groups).astype(np.float32) * np.float32(
            0.1 / 4.3
        )
    scales = rng.uniform(0.5, 1.5, shape[:-1]).astype(np.float32)
    if dtype == "int8":
        return rng.integers(-127, 128, shape, dtype=np.int8), scales * np.float32(0.1 / 73)
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1)
    return values.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else values, scales


def width_for(dtype: str, width: int) -> int:
    """The width, or for int4 the next one that its groups divide."""
    return -(-width // ops.INT4_GROUP) * ops.INT4_GROUP if dtype == "int4" else width
