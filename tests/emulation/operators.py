# SPDX-License-Identifier: Apache-2.0
"""The emulated kernels behind the interface of tests/plugins/kernels.py: same operands, same outputs, by name.

Activations may be narrower than in the operators' table; outputs come back as float32 (which holds them exactly).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shadowc.spec.ops import SELECT_THRESHOLD, SPARSE_ATTENTION, SPARSE_FFN, OpSpec
from tests.emulation.library import BFLOAT16, Kernels

ACTIVATIONS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
TOLERANCES = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Relative to the largest value (at least 1), against float64 arithmetic on the same rounded operands: rounding of the
outputs, and of keys and values before they are used (2^-11 and 2^-8), twice over; sums are float32."""

ORDERS = (0, 20251)
"""Seeds of the thread orders that every case runs in."""

_HELD = {SPARSE_FFN.name: ("x", "w", "b2"), SPARSE_ATTENTION.name: ("x", "w", "bo", "past_key", "past_value")}


def rounded(operands: dict[str, np.ndarray], act: str) -> dict[str, np.ndarray]:
    """The operands as float32, with values that the activation type holds wherever that makes a result exact.

    Without those of a layer norm: for TensorRT norms and residuals stay nodes of the graph.
    """
    held = {name for names in _HELD.values() for name in names}
    return {
        name: array.astype(ACTIVATIONS[act]).astype(np.float32) if name in held and array.dtype == np.float32 else array
        for name, array in operands.items()
        if not name.startswith("norm_")
    }


def split(operands: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    """The records `w` [rows, parts, ..., E] as one matrix per part, as emit splits them for TensorRT."""
    width = operands["w"].shape[-1]
    parts = {name: operands["w"][:, part].reshape(-1, width) for part, name in enumerate(names)}
    return {name: array for name, array in operands.items() if name != "w"} | parts


def counted_as_given(read: np.ndarray, width: int, held: int, given: int) -> np.ndarray:
    """`read` as if the weights had been read in the type in which the test gave them: rows are counted, then sized.

    Args:
        read: records and bytes.
        width: elements of a row, each with one float32 scale.
        held: bytes per element that the kernel read.
        given: bytes per element of the test's array.
    """
    rows, rest = divmod(int(read[1]), width * held + 4)
    assert rest == 0, "a part of a row was counted"
    return np.array([read[0], rows * (width * given + 4)])


def run(kernels: Kernels, spec: OpSpec, act: str, arrays: dict[str, np.ndarray], **attributes) -> dict[str, np.ndarray]:
    """Outputs by name; every order of threads has to give the same bits."""
    call = {SELECT_THRESHOLD.name: _select, SPARSE_FFN.name: _ffn, SPARSE_ATTENTION.name: _attention}[spec.name]
    return _in_every_order(kernels, lambda: call(kernels, ACTIVATIONS[act], arrays, attributes))


def _in_every_order(kernels: Kernels, call: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    first: dict[str, np.ndarray] = {}
    for seed in ORDERS:
        kernels.order(seed)
        try:
            outputs = call()
        finally:
            kernels.order(0)
        first = first or outputs
        for name, array in outputs.items():
            np.testing.assert_array_equal(array, first[name], f"{name} depends on the order of threads")
    return first


def _select(kernels: Kernels, _: np.dtype, arrays: dict[str, np.ndarray], attributes: dict) -> dict[str, np.ndarray]:
    return dict(zip(("threshold", "active"), kernels.select(**arrays, **attributes), strict=True))


def _narrow(arrays: dict[str, np.ndarray], names: tuple[str, ...], act: np.dtype) -> dict[str, np.ndarray]:
    """The named float32 operands in the activation type."""
    return {n: a.astype(act) if n in names and a.dtype == np.float32 else a for n, a in arrays.items()}


def _ffn(kernels: Kernels, act: np.dtype, arrays: dict[str, np.ndarray], attributes: dict) -> dict[str, np.ndarray]:
    narrow = _narrow(arrays, ("x", "w"), act)
    y, read = kernels.ffn(**split(narrow, "w1", "w2t"), **attributes)
    return {"y": y.astype(np.float32), "read": _counted(read, narrow, arrays)}


def _attention(
    kernels: Kernels, act: np.dtype, arrays: dict[str, np.ndarray], attributes: dict
) -> dict[str, np.ndarray]:
    narrow = _narrow(arrays, ("x", "w", "past_key", "past_value"), act)
    outputs, read = kernels.attention(**split(narrow, "wq", "wk", "wv", "wot"), **attributes)
    read = _counted(read, narrow, arrays)
    return {**{name: array.astype(np.float32) for name, array in outputs.items()}, "read": read}


def _counted(read: tuple[int, int], narrow: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> np.ndarray:
    return counted_as_given(np.array(read), arrays["x"].shape[2], narrow["w"].itemsize, arrays["w"].itemsize)
