# SPDX-License-Identifier: Apache-2.0
"""Weight packing: layouts, rounding, and what ONNX Runtime makes of the packed LM head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shadowc.emit import records
from shadowc.measure.dequantised import round_to, round_to_int4
from shadowc.spec.errors import InputError, InternalError
from shadowc.spec.ops import INT4_GROUP
from shadowc.spec.program import WeightRecipe
from tests.emit import unpack

E, H, D, F = 128, 4, 32, 70
HALF_STEP = 0.5 + 1e-3
"""A rounded value is at most half a step away; the excess covers float32 division."""
SMALLEST_HALF = 2.0**-150
"""A step below the normal numbers is rounded to a multiple of twice this."""


class Tensors:
    """Random tensors by name."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        shapes = {"q": (E, E), "k": (E, E), "v": (E, E), "o": (E, E), "fc1": (F, E), "fc2": (E, F)}
        shapes |= {"bq": (E,), "bk": (E,), "bv": (E,), "b1": (F,), "lm": (50, 20)}
        self.values = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
        self.values["order"] = rng.permutation(F).astype(np.int32)  # type: ignore[assignment]

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.values))

    def tensor(self, name: str) -> np.ndarray:
        return self.values[name]


def recipes(
    *, quantised: bool, order: str = "", dtype: Literal["bfloat16", "uint8"] | None = None
) -> dict[str, WeightRecipe]:
    """`dtype`: of the records, if they are not float32 or int8."""
    block = INT4_GROUP if dtype == "uint8" else 0
    width, per_row = (E // 2, (E // block,)) if block else (E, ())
    kind = dtype or ("int8" if quantised else "float32")
    how, scaled = (kind, quantised, order, block), ("float32", quantised, order, block)
    heads, heads_scaled = (kind, quantised, "", block), ("float32", quantised, "", block)
    return {
        "layers.10.ffn.w": WeightRecipe("ffn_records", ("fc1", "fc2"), (F, 2, width), *how),
        "layers.10.ffn.scales": WeightRecipe("ffn_scales", ("fc1", "fc2"), (F, 2, *per_row), *scaled),
        "layers.10.ffn.b1": WeightRecipe("ffn_bias", ("b1",), (F,), order=order),
        "layers.2.attention.w": WeightRecipe("attention_records", tuple("qkvo"), (H, 4, D, width), *heads),
        "layers.2.attention.scales": WeightRecipe(
            "attention_scales", tuple("qkvo"), (H, 4, D, *per_row), *heads_scaled
        ),
        "layers.2.attention.bqkv": WeightRecipe("qkv_bias", ("bq", "bk", "bv"), (H, 3, D)),
        "wte": WeightRecipe("copy", ("lm",), (50, 20)),
        "lm_head": WeightRecipe("transpose", ("lm",), (20, 50)),
    }


def pack(source: Tensors, made_from: dict[str, WeightRecipe]) -> dict[str, np.ndarray]:
    return {
        name: array
        for names in records.groups(made_from)
        for name, array in records.materialise(made_from, source, names).items()
    }


def test_groups_join_records_with_their_scales_in_layer_order() -> None:
    order = [names[0].rsplit(".", 1)[0] for names in records.groups(recipes(quantised=True))]
    assert order == ["layers.2.attention", "layers.2.attention", "layers.10.ffn", "layers.10.ffn", "lm_head", "wte"]
    assert ("layers.2.attention.scales", "layers.2.attention.w") in records.groups(recipes(quantised=True))


def test_groups_do_not_depend_on_the_order_of_the_mapping() -> None:
    forward = recipes(quantised=True)
    assert records.groups(dict(reversed(forward.items()))) == records.groups(forward)


def test_attention_records_hold_rows_of_their_head() -> None:
    source = Tensors()
    packed = pack(source, recipes(quantised=False))["layers.2.attention.w"]
    for head in range(H):
        rows = slice(head * D, (head + 1) * D)
        np.testing.assert_array_equal(packed[head, 1], source.tensor("k")[rows])
        np.testing.assert_array_equal(packed[head, 3], source.tensor("o")[:, rows].T)


def test_ffn_records_follow_the_neuron_order() -> None:
    source = Tensors()
    packed = pack(source, recipes(quantised=False, order="order"))
    order = source.tensor("order")
    np.testing.assert_array_equal(packed["layers.10.ffn.w"][5, 0], source.tensor("fc1")[order[5]])
    np.testing.assert_array_equal(packed["layers.10.ffn.w"][5, 1], source.tensor("fc2")[:, order[5]])
    np.testing.assert_array_equal(packed["layers.10.ffn.b1"], source.tensor("b1")[order])
    assert (packed["layers.10.ffn.scales"] == 1).all()


@pytest.mark.parametrize("order", ["", "order"])
def test_unpacking_gives_the_checkpoint_back_when_weights_are_float(order: str) -> None:
    source = Tensors()
    packed = pack(source, recipes(quantised=False, order=order))
    attention = unpack.unpack_attention(packed["layers.2.attention.w"], packed["layers.2.attention.scales"])
    for name, weight in zip("qkvo", attention, strict=True):
        np.testing.assert_array_equal(weight, source.tensor(name))
    permutation = source.tensor("order") if order else None
    fc1, fc2 = unpack.unpack_ffn(packed["layers.10.ffn.w"], packed["layers.10.ffn.scales"], permutation)
    np.testing.assert_array_equal(fc1, source.tensor("fc1"))
    np.testing.assert_array_equal(fc2, source.tensor("fc2"))


def test_int8_packing_equals_rounding_in_the_checkpoints_layout() -> None:
    source = Tensors()
    packed = pack(source, recipes(quantised=True, order="order"))
    attention = unpack.unpack_attention(packed["layers.2.attention.w"], packed["layers.2.attention.scales"])
    for name, weight in zip("qkvo", attention, strict=True):
        np.testing.assert_array_equal(weight, unpack.round_trip(source.tensor(name), axis=0 if name == "o" else 1))
    unpacked = unpack.unpack_ffn(packed["layers.10.ffn.w"], packed["layers.10.ffn.scales"], source.tensor("order"))
    np.testing.assert_array_equal(unpacked[0], unpack.round_trip(source.tensor("fc1")))
    np.testing.assert_array_equal(unpacked[1], unpack.round_trip(source.tensor("fc2"), axis=0))


ROUNDINGS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "uint8": round_to_int4,
    "bfloat16": lambda weight, _: round_to("bfloat16", weight),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "uint8"])
def test_narrow_packing_equals_rounding_in_the_checkpoints_layout(dtype: Literal["bfloat16", "uint8"]) -> None:
    source, rounded = Tensors(), ROUNDINGS[dtype]
    packed = pack(source, recipes(quantised=dtype == "uint8", order="order", dtype=dtype))
    attention = unpack.unpack_attention(packed["layers.2.attention.w"], packed["layers.2.attention.scales"])
    for name, weight in zip("qkvo", attention, strict=True):
        np.testing.assert_array_equal(weight, rounded(source.tensor(name), 0 if name == "o" else 1))
    unpacked = unpack.unpack_ffn(packed["layers.10.ffn.w"], packed["layers.10.ffn.scales"], source.tensor("order"))
    np.testing.assert_array_equal(unpacked[0], rounded(source.tensor("fc1"), 1))
    np.testing.assert_array_equal(unpacked[1], rounded(source.tensor("fc2"), 0))


def int4_rows(weight_FE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs [F, E/2] and scales [F, E/group] of rows that are packed as the first ones of neurons."""
    (neurons, width), source = weight_FE.shape, Tensors()
    source.values |= {"fc1": weight_FE, "fc2": np.zeros((width, neurons), np.float32)}
    records_shape, scales_shape = (neurons, 2, width // 2), (neurons, 2, width // INT4_GROUP)
    packed = pack(
        source,
        {
            "records": WeightRecipe("ffn_records", ("fc1", "fc2"), records_shape, "uint8", True, "", INT4_GROUP),
            "scales": WeightRecipe("ffn_scales", ("fc1", "fc2"), scales_shape, "float32", True, "", INT4_GROUP),
        },
    )
    return packed["records"][:, 0], packed["scales"][:, 0]


def test_int4_puts_the_first_half_of_a_group_into_the_low_halves_of_its_bytes() -> None:
    row = np.zeros((1, 2 * INT4_GROUP), np.float32)
    row[0, :3], row[0, 32:35] = (7, -7, 1), (-1, 2, 0)
    row[0, 64], row[0, 127] = 14, -14
    pairs, scales = int4_rows(row)
    assert scales.tolist() == [[1, 2]]
    assert pairs[0, :4].tolist() == [0x7F, 0xA1, 0x89, 0x88]
    assert (pairs[0, 32], pairs[0, 63]) == (0x8F, 0x18)


def test_a_group_of_zeros_gets_scale_one_in_int4() -> None:
    pairs, scales = int4_rows(np.zeros((2, INT4_GROUP), np.float32))
    assert (scales == 1).all()
    assert (pairs == 0x88).all()


@settings(max_examples=60)
@given(hnp.arrays(np.float32, (3, 2 * INT4_GROUP), elements=st.floats(-(2.0**40), 2.0**40, width=32)))
def test_int4_rounding_stays_within_half_a_step_and_never_uses_minus_eight(weight: np.ndarray) -> None:
    pairs, scales = int4_rows(weight)
    assert min((pairs & 15).min(), (pairs >> 4).min()) >= 1
    error = np.abs(unpack.dequantise(pairs, scales).astype(np.float64) - weight)
    rounding = HALF_STEP * scales.astype(np.float64).repeat(INT4_GROUP, axis=1)
    assert (error <= rounding + records.INT4_LIMIT * SMALLEST_HALF).all()


def test_a_head_swapped_in_the_packing_is_caught_by_the_round_trip() -> None:
    source = Tensors()
    packed = pack(source, recipes(quantised=True))
    planted = packed["layers.2.attention.w"].copy()
    planted[[0, 1]] = planted[[1, 0]]
    query = unpack.unpack_attention(planted, packed["layers.2.attention.scales"])[0]
    assert not np.array_equal(query, unpack.round_trip(source.tensor("q")))


@settings(max_examples=60)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
        elements=st.floats(-(2.0**40), 2.0**40, width=32),
    )
)
def test_int8_rounding_stays_within_half_a_step(weight: np.ndarray) -> None:
    values, scales = records.quantise_rows(weight)
    assert np.abs(values.astype(np.int32)).max() <= records.INT8_LIMIT
    error = np.abs(unpack.dequantise(values, scales).astype(np.float64) - weight)
    assert (error <= HALF_STEP * scales[:, None].astype(np.float64) + records.INT8_LIMIT * SMALLEST_HALF).all()


def test_a_row_of_zeros_gets_scale_one_and_ties_go_to_even() -> None:
    values, scales = records.quantise_rows(np.array([[0, 0, 0], [127, 2.5, 3.5]], np.float32))
    assert scales.tolist() == [1, 1]
    assert values.tolist() == [[0, 0, 0], [127, 2, 4]]


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    source = Tensors()
    source.values["v"][3, 3] = np.nan
    with pytest.raises(InputError, match="v holds NaN"):
        pack(source, recipes(quantised=True))


def test_an_order_that_is_no_permutation_is_refused() -> None:
    source = Tensors()
    source.values["order"][0] = source.values["order"][1]
    with pytest.raises(InputError, match="not a permutation"):
        pack(source, recipes(quantised=False, order="order"))


def test_a_recipe_that_promises_another_shape_is_an_internal_error() -> None:
    with pytest.raises(InternalError, match="wte promises"):
        pack(Tensors(), {"wte": WeightRecipe("copy", ("lm",), (20, 50))})
