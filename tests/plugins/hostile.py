# SPDX-License-Identifier: Apache-2.0
"""Operands that no graph of ours has, between pages that nobody may touch: a process that dies of a bad access.

Called with a seed, a number of calls and, by the test of this test, a defect. Every operand and every output ends where
a forbidden page begins, or begins where one ends; the bytes on its other side are known and looked at afterwards.
Prints how many calls were answered, and how many were refused with the operator's own words.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys

import numpy as np
import onnxruntime

from shadowc.spec.ops import (
    MATMUL_ROWS,
    NETWORK_TYPES,
    PREDICT_UNITS,
    SELECT_THRESHOLD,
    SPARSE_ATTENTION,
    SPARSE_FFN,
    OpSpec,
)
from tests.plugins import kernels, test_matmul_rows, test_predict_units, test_sparse_attention, test_sparse_ffn

PAGE = mmap.PAGESIZE
KNOWN = 0xA5
POSITIONS = (-(2**63), -(2**31), -1, 0, 1, 7, 8, 11, 12, 13, 2**31, 2**32 + 1, 2**63 - 1)
NUMBERS = (-(2**63), -7, -1, 0, 1, 2, 3, 40, 2**31, 2**62, 2**63 - 1)
BITS = (
    0x7FC00000,
    0xFFC00001,
    0x7F800000,
    0xFF800000,
    0x7F7FFFFF,
    0xFF7FFFFF,
    1,
    0x80000001,
    0,
    0x80000000,
    0x7F800001,
)
"""NaNs of several kinds, infinities, the largest and smallest numbers, both zeros."""
FLOATS = (
    "x",
    "scores",
    "threshold",
    "density",
    "bqkv",
    "bo",
    "b1",
    "b2",
    "scales",
    "scales1",
    "scales2",
    "past_key",
    "past_value",
    "norm_scale",
    "norm_bias",
)

Arrays = dict[str, np.ndarray]


class Fence:
    """Memory for one array between forbidden pages.

    Args:
        array: what it holds at first.
        at_end: it ends where the forbidden page begins; else it begins where one ends.
    """

    def __init__(self, array: np.ndarray, at_end: bool) -> None:
        pages = max(-(-array.nbytes // PAGE), 1)
        self._memory = mmap.mmap(-1, (pages + 2) * PAGE)
        whole = np.frombuffer(self._memory, np.uint8)
        whole[:] = KNOWN
        start = (pages + 1) * PAGE - array.nbytes if at_end else PAGE
        self._slack = whole[PAGE:start] if at_end else whole[start + array.nbytes : (pages + 1) * PAGE]
        self.array = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        self.array[...] = array
        for page in (0, pages + 1):
            place = ctypes.c_void_p(whole.ctypes.data + page * PAGE)
            if ctypes.CDLL(None, use_errno=True).mprotect(place, ctypes.c_size_t(PAGE), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def require_whole(self, name: str) -> None:
        """The bytes beside the array are as they were."""
        assert (self._slack == KNOWN).all(), f"something was written beside {name}"


def call(rng: np.random.Generator) -> tuple[OpSpec, Arrays, dict[str, object]]:
    """Operands of one of the operators, mostly valid ones, and attributes."""
    dtype = str(rng.choice(kernels.WEIGHTS))
    B, S, L = (int(rng.integers(1, high)) for high in (4, 12, 4))
    Z = int(rng.integers(0, S + 1))
    layer = int(rng.integers(0, L))
    which = rng.integers(5)
    if which == 0:
        shape = (B, Z, L, int(rng.integers(1, 40)))
        density = rng.uniform(-0.2, 1.2, int(rng.choice([1, B]))).astype(np.float32)
        chosen = {"scope": str(rng.choice(["local", "global"])), "min_active": int(rng.integers(0, 5))}
        return SELECT_THRESHOLD, {"scores": rng.standard_normal(shape, dtype=np.float32), "density": density}, chosen
    if which == 4:
        rows = {"S": int(rng.choice([0, 1, S, 40])), "N": int(rng.integers(0, 300)), "E": int(rng.integers(1, 330))}
        return MATMUL_ROWS, test_matmul_rows.operands(rng, B=B, **rows), {}
    prompt = int(rng.integers(8) == 0)
    rounding = prompt * int(rng.integers(1, 4)) or int(dtype == "int4" and S % 2)
    if prompt:  # enough rows and weights for panels
        B, S, Z = int(rng.integers(1, 3)), int(rng.integers(20, 40)), 0
    if which == 1:
        size = {"F": int(rng.integers(1, 50)), "E": int(rng.integers(1, 80)), "block": int(rng.integers(1, 9))}
        if prompt:
            size |= {"F": int(rng.integers(130, 300)), "E": int(rng.integers(256, 330))}
        arrays = test_sparse_ffn.operands(rng, B=B, S=S, Z=Z, L=L, dtype=dtype, norm=bool(rng.integers(2)), **size)
        chosen = {"layer": layer, "block": size["block"], "skip_zeros": int(rng.integers(2)), "few_digits": rounding}
        return SPARSE_FFN, arrays, chosen
    if which == 2:
        return predicting(rng, B=B, S=S, Z=Z)
    size = {
        "H": int(rng.integers(1, 4)),
        "D": int(rng.choice([1, 3, 16, 20])),
        "cache": str(rng.choice(["float32", "float16"])),
    }
    if prompt:
        size |= {"H": int(rng.integers(4, 7)), "D": int(rng.choice([37, 48, 64])), "T": S + 12}
    arrays = test_sparse_attention.operands(rng, B=B, S=S, Z=Z, L=L, dtype=dtype, norm=bool(rng.integers(2)), **size)
    chosen = {"layer": layer, "kv": str(rng.choice(["all", "active"])), "few_digits": rounding}
    return SPARSE_ATTENTION, arrays, chosen


def predicting(rng: np.random.Generator, **rows: int) -> tuple[OpSpec, Arrays, dict[str, object]]:
    """Operands of PredictUnits."""
    size = {name: int(rng.integers(1, high)) for name, high in (("E", 80), ("P", 40), ("N", 60), ("K", 4))}
    kind = {
        "dtype": str(rng.choice(NETWORK_TYPES)),
        "norm": bool(rng.integers(2)),
        "rows": int(rng.choice([1, rows["B"]])),
    }
    arrays = test_predict_units.operands(rng, **rows, **size, **kind)
    chosen = {"select": str(rng.choice(["density", "threshold"])), "relu": int(rng.integers(2))}
    chosen |= {
        "column": int(rng.integers(size["K"])),
        "exempt": int(rng.integers(2)),
        "min_active": int(rng.integers(5)),
    }
    return PREDICT_UNITS, arrays, chosen


def spoil(rng: np.random.Generator, arrays: Arrays, attributes: dict[str, object]) -> None:
    """Change one to three things about a call."""
    for _ in range(rng.integers(1, 4)):
        kind = rng.integers(5)
        if kind == 0 and {"past", "tail"} & set(arrays):
            name = str(rng.choice(["past", "start"] if "past" in arrays else ["tail"]))
            arrays[name] = rng.choice(np.array(POSITIONS, np.int64), arrays[name].shape)
        elif kind == 1:
            name = str(rng.choice([name for name in arrays if arrays[name].ndim]))
            shape = list(arrays[name].shape)
            axis = rng.integers(len(shape))
            shape[axis] = max(shape[axis] + int(rng.choice([-1, 1, -shape[axis]])), 0)
            arrays[name] = np.resize(arrays[name], shape) if arrays[name].size else np.zeros(shape, arrays[name].dtype)
        elif kind == 2 and set(attributes) & {"layer", "block", "min_active", "column"}:
            name = str(rng.choice(sorted(set(attributes) & {"layer", "block", "min_active", "column"})))
            attributes[name] = int(rng.choice(np.array(NUMBERS, np.int64)))
        elif kind == 3 and "scope" in attributes:
            attributes["exempt"] = [int(rng.choice(np.array(NUMBERS, np.int64))) for _ in range(rng.integers(1, 4))]
        else:
            name = str(rng.choice([name for name in FLOATS if name in arrays]))
            arrays[name] = bits(rng, arrays[name])
    if rng.random() < 0.1:
        arrays.pop(str(rng.choice(["norm_scale", "norm_bias"])), None)


def bits(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """The array with bit patterns in some places: any, or those that are special."""
    word = np.dtype(f"u{array.dtype.itemsize}")
    pool = np.array(BITS, np.uint32)
    special = (pool >> (32 - 8 * word.itemsize)).astype(word)
    patterns = (
        rng.choice(special, array.shape)
        if rng.random() < 0.5
        else rng.integers(0, 2 ** (8 * word.itemsize), array.shape, word)
    )
    return np.where(rng.random(array.shape) < rng.random(), patterns.view(array.dtype), array)


def run(spec: OpSpec, arrays: Arrays, attributes: dict[str, object], at_end: bool, defect: str) -> bool:
    """Call the operator between fences; whether it answered, False if it refused in its own words."""
    fences = {name: Fence(array, at_end) for name, array in (arrays | outputs(spec, arrays)).items()}
    plant(defect, fences)
    try:
        made = session(spec, arrays, attributes)
        binding = made.io_binding()
        for name in arrays:
            binding.bind_ortvalue_input(name, kernels.ort_value(fences[name].array))
        for operand in spec.outputs:
            binding.bind_ortvalue_output(operand.name, kernels.ort_value(fences[operand.name].array))
        if defect:
            print("bound", flush=True)
        made.run_with_iobinding(binding)
    except Exception as error:
        if spec.name not in str(error):
            raise RuntimeError(f"not refused by the operator: {error}") from error
        return False
    finally:
        for name, fence in fences.items():
            fence.require_whole(name)
    return True


def plant(defect: str, fences: dict[str, Fence]) -> None:
    """Let an operand of SelectThreshold reach into a forbidden page, or change a byte beside an output."""
    name = {"read": "scores", "write": "threshold"}.get(defect)
    if name is not None:
        shape = fences[name].array.shape
        short = Fence(np.zeros(1, np.float32), at_end=True)
        short.array = np.lib.stride_tricks.as_strided(
            short.array, shape, [4 * int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
        )
        fences[name] = short
    if defect == "beside":
        fences["threshold"]._slack[0] ^= 1


def session(spec: OpSpec, arrays: Arrays, attributes: dict[str, object]) -> onnxruntime.InferenceSession:
    """A session for operands of these types; kept."""
    return kernels._session(
        spec,
        tuple((name, arrays[name].dtype) for name in kernels.given(spec, arrays)),
        tuple((name, arrays[name].ndim) for name in kernels.given(spec, arrays)),
        tuple(sorted((name, kernels._freeze(value)) for name, value in attributes.items())),
        2,
        True,
    )


def outputs(spec: OpSpec, arrays: Arrays) -> Arrays:
    """Arrays of the shapes that the outputs have where the operands are valid."""
    if spec is SELECT_THRESHOLD:
        shape = arrays["scores"].shape[:3]
        return {"threshold": np.zeros(shape, np.float32), "active": np.zeros(shape, np.int32)}
    if spec is PREDICT_UNITS:
        B, Z, N = (
            arrays["x"].shape[0],
            max(int(arrays["tail"].flat[0]), 0) if arrays["tail"].size else 0,
            arrays["b2"].size,
        )
        shapes = {"scores": (B, min(Z, arrays["x"].shape[1]), 1, N), "last_scores": (B, 1, 1, N)}
        made = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        rows = shapes["scores"][:3]
        return made | {"threshold": np.zeros(rows, np.float32), "active": np.zeros(rows, np.int32)}
    if spec is MATMUL_ROWS:
        return {"y": np.zeros((*arrays["x"].shape[:2], arrays["w"].shape[0]), np.float32)}
    made = {"y": np.zeros_like(arrays["x"]), "read": np.zeros(2, np.int64)}
    if spec is SPARSE_ATTENTION:
        made |= {"context": np.zeros_like(arrays["x"])}
        made |= {f"present_{kind}": np.zeros_like(arrays[f"past_{kind}"]) for kind in ("key", "value")}
    return made


def main(seed: int, count: int, defect: str = "") -> None:
    rng = np.random.default_rng(seed)
    answered = refused = 0
    while answered + refused < count:
        spec, arrays, attributes = call(rng)
        if defect:
            if spec is not SELECT_THRESHOLD or arrays["scores"][..., 0].size < 2:
                continue
        elif rng.random() < 0.9:
            spoil(rng, arrays, attributes)
        if run(spec, arrays, attributes, bool(rng.integers(2)), defect):
            answered += 1
        else:
            refused += 1
    print(json.dumps({"answered": answered, "refused": refused}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
