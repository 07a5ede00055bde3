# SPDX-License-Identifier: Apache-2.0
"""Constants of the graph, which operators read once when the session is made, count as what is fed to every call."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from shadowc.spec.ops import MATMUL_ROWS, NETWORK_TYPES, PREDICT_UNITS, SPARSE_ATTENTION, SPARSE_FFN, OpSpec
from tests.plugins import kernels, test_matmul_rows, test_predict_units, test_sparse_attention, test_sparse_ffn

FED = {"x", "scores", "threshold", "past_key", "past_value", "start", "past", "tail", "density"}
"""What an engine's graph computes or is given for every token; the rest is stored in it."""
OPERANDS = {
    SPARSE_FFN: test_sparse_ffn.operands,
    SPARSE_ATTENTION: test_sparse_attention.operands,
    PREDICT_UNITS: test_predict_units.operands,
}


def with_constants(spec: OpSpec, arrays: dict[str, np.ndarray], stored: set[str]) -> onnxruntime.InferenceSession:
    types = {name: arrays[name].dtype for name in kernels.given(spec, arrays)}
    proto = kernels.model(spec, types, {name: arrays[name].ndim for name in types}, {})
    for name in stored:
        array = arrays[name]
        proto.graph.initializer.append(
            helper.make_tensor(name, kernels.TYPES[array.dtype], array.shape, array.tobytes(), raw=True)
        )
    kept = [value for value in proto.graph.input if value.name not in stored]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    return kernels.session(proto)


CASES = [
    *((SPARSE_FFN, dtype) for dtype in kernels.WEIGHTS),
    *((SPARSE_ATTENTION, dtype) for dtype in kernels.WEIGHTS),
    *((PREDICT_UNITS, dtype) for dtype in NETWORK_TYPES),
]


@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=[f"{spec.name}-{dtype}" for spec, dtype in CASES])
@pytest.mark.parametrize("norm", [False, True])
def test_constants_give_the_bits_that_fed_operands_give(spec: OpSpec, dtype: str, norm: bool) -> None:
    arrays = OPERANDS[spec](np.random.default_rng(3), dtype=dtype, norm=norm)
    fed = kernels.run(spec, arrays)
    session = with_constants(spec, arrays, set(arrays) - FED)
    feeds = {name: array for name, array in arrays.items() if name in FED}
    for _ in range(2):
        for output, found in zip(session.get_outputs(), session.run(None, feeds), strict=True):
            cache = output.name.startswith("present_")
            look = (lambda array: test_sparse_attention.live(array, arrays)) if cache else np.asarray
            np.testing.assert_array_equal(look(found), look(fed[output.name]))


def test_a_stored_matrix_gives_the_bits_that_a_fed_one_gives() -> None:
    arrays = test_matmul_rows.operands(np.random.default_rng(3))
    (found,) = with_constants(MATMUL_ROWS, arrays, {"w", "scales"}).run(None, {"x": arrays["x"]})
    np.testing.assert_array_equal(found, kernels.run(MATMUL_ROWS, arrays)["y"])


def test_one_constant_among_fed_operands_is_enough_to_change_nothing() -> None:
    arrays = test_sparse_ffn.operands(np.random.default_rng(4), norm=True)
    fed = kernels.run(SPARSE_FFN, arrays)
    for name in arrays:
        session = with_constants(SPARSE_FFN, arrays, {name})
        found = session.run(["y"], {other: array for other, array in arrays.items() if other != name})
        np.testing.assert_array_equal(found[0], fed["y"])


def test_constants_that_do_not_fit_are_refused_in_the_words_for_fed_operands() -> None:
    arrays = test_sparse_ffn.operands(np.random.default_rng(5), F=40, E=48)
    arrays |= {"b1": arrays["b1"][:-1], "scales": arrays["scales"][:, :1]}
    session = with_constants(SPARSE_FFN, arrays, set(arrays) - FED)
    with pytest.raises(InvalidArgument) as fed:
        kernels.run(SPARSE_FFN, arrays)
    with pytest.raises(InvalidArgument) as stored:
        session.run(None, {name: array for name, array in arrays.items() if name in FED})
    says = (
        "SparseFFN node 'the_node': scales must be [F, 2] = [40, 2], found [40, 1]; b1 must be [F] = [40], found [39]"
    )
    assert says in str(fed.value)
    assert says in str(stored.value)


def test_an_operand_of_more_axes_than_any_has_is_shown_as_far_as_it_is_read() -> None:
    arrays = test_sparse_ffn.operands(np.random.default_rng(6))
    arrays["x"] = arrays["x"].reshape(1, 1, 1, 1, 1, 1, 48)
    with pytest.raises(InvalidArgument, match=r"x must be \[B, S, E\], found \[1, 1, 1, 1, 1, 1, \.\.\.\]"):
        kernels.run(SPARSE_FFN, arrays)
