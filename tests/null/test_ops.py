# SPDX-License-Identifier: Apache-2.0
"""The operator table is consistent in itself: everything else is derived from it or checked against it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shadowc.spec.ops import CHAIN, CPU_OPS, DOMAIN, INT4_GROUP, OPS, VERSION, WEIGHT_TYPES, OpSpec

EACH_OP = pytest.mark.parametrize("spec", CPU_OPS, ids=lambda spec: spec.name)
LETTERS = set("BSZTEHDFNLPK")
ELEMENT_TYPES = {"float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64"}
PYTHON_TYPES = {"int": int, "ints": tuple, "float": float, "string": str}


def test_there_are_three_operators_of_version_one() -> None:
    assert (DOMAIN, VERSION) == ("shadowc", 1)
    assert [spec.name for spec in OPS] == ["SelectThreshold", "SparseAttention", "SparseFFN"]


def test_the_library_for_the_cpu_registers_the_operators_of_the_table() -> None:
    source = (Path(__file__).parents[2] / "plugins" / "cpu" / "register.cc").read_text("utf-8")
    made = {name.lower() for name in re.findall(r"made\.Add\(shadowc::(\w+?)(?:Float16)?Op\(\)\)", source)}
    assert made == {spec.name.lower() for spec in CPU_OPS} | {CHAIN.lower()}


@EACH_OP
def test_names_of_operands_and_attributes_are_unique(spec: OpSpec) -> None:
    names = [part.name for part in (*spec.inputs, *spec.outputs, *spec.attributes)]
    assert len(names) == len(set(names))


@EACH_OP
def test_shapes_are_letters_or_sizes(spec: OpSpec) -> None:
    for operand in (*spec.inputs, *spec.outputs):
        for axis in operand.shape:
            assert axis.isdigit() or axis == "B|1" or axis in LETTERS, f"{operand.name}: {axis}"


@EACH_OP
def test_outputs_have_no_letter_that_the_inputs_lack(spec: OpSpec) -> None:
    known = {axis.removesuffix("|1") for operand in spec.inputs for axis in operand.shape}
    made = {axis for operand in spec.outputs for axis in operand.shape if not axis.isdigit()}
    if any(operand.name == "tail" for operand in spec.inputs):
        known.add("Z")  # its value
    assert made <= known


@EACH_OP
def test_element_types_are_known_and_every_operand_is_explained(spec: OpSpec) -> None:
    for operand in (*spec.inputs, *spec.outputs):
        assert operand.types
        assert set(operand.types) <= ELEMENT_TYPES
        assert operand.meaning


@EACH_OP
def test_defaults_fit_the_kind_and_the_choices(spec: OpSpec) -> None:
    for attribute in spec.attributes:
        assert isinstance(attribute.default, PYTHON_TYPES[attribute.kind])
        assert attribute.default != (), "onnx-graphsurgeon cannot carry an empty list"
        assert not attribute.choices or attribute.default in attribute.choices


@EACH_OP
def test_what_only_kernels_produce_comes_last(spec: OpSpec) -> None:
    roles = [operand.role for operand in spec.outputs]
    assert roles == sorted(roles), "a function drops kernel outputs from the end"
    assert all(operand.role == "always" for operand in spec.inputs)


@EACH_OP
def test_operands_of_a_norm_are_explained_and_are_none_of_the_operators_own(spec: OpSpec) -> None:
    if spec.norm is None:
        assert spec.name in ("SelectThreshold", "MatMulRows")
        return
    own = {part.name for part in (*spec.inputs, *spec.outputs, *spec.attributes)}
    parts = (*spec.norm.inputs, *spec.norm.attributes)
    assert len({part.name for part in parts} - own) == len(parts) == 3
    assert all(part.meaning for part in parts)
    assert all(isinstance(attribute.default, PYTHON_TYPES[attribute.kind]) for attribute in spec.norm.attributes)


def test_weights_come_with_one_scale_per_record_row() -> None:
    for spec in OPS[1:]:
        operands = {operand.name: operand for operand in spec.inputs}
        assert operands["w"].types == WEIGHT_TYPES
        assert operands["scales"].shape == operands["w"].shape[:-1]


def test_int4_comes_in_pairs_with_one_scale_per_group() -> None:
    for spec in OPS[1:]:
        operands = {operand.name: operand for operand in spec.inputs}
        *rows, width = operands["w"].shape
        assert operands["w"].packed == (*rows, f"{width}/2")
        assert operands["scales"].packed == (*rows, f"{width}/{INT4_GROUP}")
        assert [name for name, operand in operands.items() if operand.packed] == ["w", "scales"]
