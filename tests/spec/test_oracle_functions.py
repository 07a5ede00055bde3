# SPDX-License-Identifier: Apache-2.0
"""The functions as ONNX sees them: they match the table, are well formed, and attach cleanly to a graph."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from shadowc.spec import oracle
from shadowc.spec.errors import InternalError
from shadowc.spec.ops import DOMAIN, FEW_DIGITS, OPS, OpSpec
from tests.spec.sessions import graph_model, op_model, session

FUNCTIONS = {function.name: function for function in oracle.functions()}
EACH_OP = pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)


@EACH_OP
def test_function_has_the_operands_of_the_table(spec: OpSpec) -> None:
    function = FUNCTIONS[spec.name]
    assert function.domain == DOMAIN
    assert list(function.input) == [operand.name for operand in spec.inputs]
    assert list(function.output) == [operand.name for operand in spec.outputs if operand.role == "always"]


@EACH_OP
def test_function_has_the_attributes_and_defaults_of_the_table(spec: OpSpec) -> None:
    function = FUNCTIONS[spec.name]
    assert not function.attribute, "every attribute has a default"
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in function.attribute_proto}
    expected = {
        attribute.name: attribute.default.encode() if isinstance(attribute.default, str) else attribute.default
        for attribute in spec.attributes
    }
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()} == expected


@EACH_OP
def test_function_reads_every_attribute_that_has_a_meaning(spec: OpSpec) -> None:
    read = {attribute.ref_attr_name for node in FUNCTIONS[spec.name].node for attribute in node.attribute} - {""}
    exact = {"skip_zeros"}  # decides what a kernel reads, never what comes out
    assert read == {attribute.name for attribute in spec.attributes} - exact


@EACH_OP
def test_function_suits_old_runtimes(spec: OpSpec) -> None:
    function = FUNCTIONS[spec.name]
    names = [node.name for node in function.node]
    assert all(names), "ORT 1.23 needs a name on every node of a function"
    assert len(set(names)) == len(names)
    assert not function.overload, "old runtimes ignore overloads without a word"
    assert {(entry.domain, entry.version) for entry in function.opset_import} == {("", oracle.OPSET)}
    assert all(node.domain == "" for node in function.node)


@EACH_OP
def test_attached_model_is_valid_and_leaves_the_original_alone(spec: OpSpec) -> None:
    model = op_model(spec.name)
    before = model.SerializeToString()
    attached = oracle.attach(model)
    onnx.checker.check_model(attached, full_check=True)
    assert model.SerializeToString() == before
    assert [function.name for function in attached.functions] == [spec.name for spec in OPS]
    assert "read" not in {output.name for output in attached.graph.output}


def test_attach_repeated_changes_nothing() -> None:
    once = oracle.attach(op_model("SparseFFN"))
    assert oracle.attach(once) == once


def test_the_function_of_an_operator_that_may_round_does_not_round() -> None:
    model = op_model("SparseFFN")
    exact = oracle.attach(model)
    model.graph.node[0].attribute.append(helper.make_attribute(FEW_DIGITS, 1))
    assert oracle.attach(model) == exact


def test_attach_adds_the_operator_domain_when_it_is_missing() -> None:
    model = op_model("SelectThreshold")
    del model.opset_import[1]
    session(oracle.attach(model))


def _counting_model() -> onnx.ModelProto:
    """SparseFFN whose `read` is reshaped, and doubled inside a branch, before it becomes an output."""
    graph = op_model("SparseFFN").graph
    branch = helper.make_graph(
        [helper.make_node("Add", ["read", "read"], ["twice"], name="add")],
        "branch",
        [],
        [helper.make_tensor_value_info("twice", TensorProto.INT64, [2])],
    )
    graph.node.extend(
        [
            helper.make_node("Reshape", ["read", "row"], ["table"], name="reshape"),
            helper.make_node("Shape", ["scales"], ["unused"], name="shape"),
            helper.make_node("Gather", ["unused", "first"], ["kept"], name="gather"),
            helper.make_node("Reshape", ["kept", "first"], ["served"], name="served"),
            helper.make_node("Concat", ["table", "served"], ["joined"], name="concat", axis=0),
            helper.make_node("If", ["yes"], ["chosen"], name="if", then_branch=branch, else_branch=branch),
        ]
    )
    graph.initializer.extend(
        [
            helper.make_tensor("row", TensorProto.INT64, [1], [2]),
            helper.make_tensor("first", TensorProto.INT64, [1], [1]),
            helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
        ]
    )
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.INT64, [2]) for name in ("joined", "chosen"))
    return graph_model(graph)


def test_attach_prunes_what_depends_on_counts_and_what_only_served_that() -> None:
    graph = oracle.attach(_counting_model()).graph
    assert [node.name for node in graph.node] == ["SparseFFN"]
    assert list(graph.node[0].output) == ["y"]
    assert [output.name for output in graph.output] == ["y"]
    assert not graph.initializer


def test_attach_refuses_a_graph_of_nothing_but_counts() -> None:
    model = op_model("SparseFFN")
    del model.graph.output[0]
    with pytest.raises(InternalError, match="nothing is left"):
        oracle.attach(model)
