# SPDX-License-Identifier: Apache-2.0
"""Chains compute what their steps compute one by one, to the bit, and refuse what they cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from shadowc.measure import resources
from shadowc.runtime import session as sessions
from shadowc.runtime.chains import chained
from shadowc.runtime.library import REINSTALL, OpLibrary
from shadowc.runtime.load import load
from shadowc.spec.errors import IncompatibleEngineError
from shadowc.spec.ops import CHAIN, CPU_OPS, DOMAIN

WIDTH = 8
STANDARD = ("Add", "Sub", "Max", "Div", "Relu", "Slice", "ReduceMax", "ReduceMin", "Reshape")


def step_names(chain: onnx.NodeProto) -> list[str]:
    return next(attribute.s.decode() for attribute in chain.attribute if attribute.name == "names").split("\n")


def product(x: str, y: str) -> onnx.NodeProto:
    return helper.make_node("MatMulRows", [x, "w", "scales"], [y], y, domain=DOMAIN)


def model_of(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    weights = {
        "w": rng.integers(-127, 128, (WIDTH, WIDTH), np.int8),
        "scales": np.full(WIDTH, 0.003, np.float32),
        "half": np.array([0.5], np.float32),
    }
    shape = ["B", "S", "E"]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session_of(model: onnx.ModelProto, folder: Path | None = None) -> onnxruntime.InferenceSession:
    """`folder`: where the weights lie that are not in the model."""
    options = onnxruntime.SessionOptions()
    if folder is not None:
        options.add_session_config_entry(sessions._EXTERNAL_FOLDER, str(folder))
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(str(OpLibrary.installed().path))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, x: np.ndarray, folder: Path | None = None) -> list[np.ndarray]:
    found: list[Any] = session_of(model, folder).run(None, {"x": x})
    return found


def stored(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model, whose w and scales lie in a file of the folder, 64 bytes apart."""
    copy, content = onnx.ModelProto(), b""
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in ("w", "scales"):
            start, raw = len(content), tensor.raw_data
            content += raw + bytes(-len(raw) % 64)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights.bin"), ("offset", start), ("length", len(raw))):
                tensor.external_data.add(key=key, value=str(value))
    (folder / "weights.bin").write_bytes(content)
    return copy


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """Products, thresholds, joins and ONNX's own operators on what there is by then; some values are outputs.

    Neg is no step, the others are where they read what steps have made.
    """
    nodes, values, flat, joined, others = [], ["x"], [], [], []  # joined: of the same width
    for number in range(draw(st.integers(1, 14))):
        name, of = f"v{number}", draw(st.sampled_from(values))
        kind = draw(st.sampled_from(["product", "product", "Neg", *STANDARD, "select", "Concat", "of_join"]))
        if kind == "product":
            nodes.append(product(of, name))
        elif kind == "select":
            nodes.append(helper.make_node("Unsqueeze", [of, "axis"], [f"{name}.scores"]))
            made = [f"{name}.threshold", f"{name}.active"]
            nodes.append(helper.make_node("SelectThreshold", [f"{name}.scores", "half"], made, name, domain=DOMAIN))
            flat.append(made[0])
            continue
        elif kind == "Concat":
            axis, more = draw(st.integers(-3, 2)), draw(st.lists(st.sampled_from([*values, *flat]), max_size=3))
            parts = [of, *(other for other in more if axis in (-1, 2) or other not in flat)]
            nodes.append(helper.make_node(kind, parts, [name], axis=axis))
            (others if axis in (-1, 2) else joined).append(name)
            continue
        elif kind == "of_join" and joined:  # steps and joins that read one
            of = draw(st.sampled_from(joined))
            again = helper.make_node("Concat", [of, of], [name], axis=draw(st.integers(0, 2)))
            nodes.append(draw(st.sampled_from([product(of, name), again])))
            (others if nodes[-1] is again else joined).append(name)
            continue
        elif kind == "Div":
            nodes.append(helper.make_node(kind, [of, draw(st.sampled_from(["row", "number"]))], [name]))
        elif kind in ("Add", "Sub", "Max"):
            other = draw(st.sampled_from([*values, *flat, "row", "number"]))
            nodes.append(helper.make_node(kind, draw(st.permutations([of, other])), [name]))
        elif kind == "Slice":  # all, or one, which is as good as all
            start, axis = draw(st.sampled_from(["i0", "i-1"])), draw(st.sampled_from(["i0", "i1"]))
            nodes.append(helper.make_node(kind, [of, start, "i5", axis], [f"{name}.part"]))
            nodes.append(helper.make_node("Add", [of, f"{name}.part"], [name]))
        elif kind in ("ReduceMax", "ReduceMin"):
            nodes.append(helper.make_node(kind, [of, "i-1"], [f"{name}.of_row"], keepdims=1))
            nodes.append(helper.make_node("Sub", [of, f"{name}.of_row"], [name]))
        elif kind == "Reshape":
            nodes.append(helper.make_node(kind, [of, "as_columns"], [f"{name}.flat"]))
            nodes.append(helper.make_node("Shape", [of], [f"{name}.shape"]))
            nodes.append(helper.make_node(kind, [f"{name}.flat", f"{name}.shape"], [name]))
        else:
            nodes.append(helper.make_node("Neg" if kind == "of_join" else kind, [of], [name]))
        values.append(name)
    outputs = draw(
        st.lists(st.sampled_from([*values[1:], *flat, *joined, *others] or ["x"]), min_size=1, max_size=4, unique=True)
    )
    if outputs == ["x"]:
        nodes, outputs = [product("x", "v")], ["v"]
    model = model_of(nodes, outputs)
    numbers = {"row": np.linspace(0.5, 2, WIDTH, dtype=np.float32), "number": np.array(0.3, np.float32)}
    numbers |= {f"i{index}": np.array([index]) for index in (-1, 0, 1, 5)}
    numbers |= {"axis": np.array([2]), "as_columns": np.array([WIDTH, -1, 1])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in numbers.items())
    return model


@given(graphs(), st.integers(1, 3), st.integers(1, 3))
def test_any_graph_gives_the_same_bits_with_chains_and_without(model: onnx.ModelProto, rows: int, tokens: int) -> None:
    x = np.random.default_rng(2).standard_normal((rows, tokens, WIDTH), np.float32)
    before = model.SerializeToString()
    rewritten = chained(model)
    assert model.SerializeToString() == before  # it got a copy
    for found, wanted in zip(run(rewritten, x), run(model, x), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_steps_one_behind_the_other_are_one_node_and_what_is_between_them_stays_inside() -> None:
    nodes = [product("x", "a"), product("a", "b"), helper.make_node("Neg", ["b"], ["c"]), product("c", "d")]
    (chain, neg, last) = chained(model_of(nodes, ["d"])).graph.node
    assert (chain.op_type, step_names(chain), list(chain.output)) == (CHAIN, ["a", "b"], ["b"])
    assert (neg.op_type, last.op_type) == ("Neg", "MatMulRows")  # one step alone stays as it is


def test_onnxs_own_operators_are_steps_where_they_read_what_steps_have_made() -> None:
    def join(values: list[str], y: str) -> onnx.NodeProto:
        return helper.make_node("Concat", values, [y], y, axis=-1)

    neg = helper.make_node("Neg", ["b"], ["n"])
    nodes = [product("x", "a"), product("a", "b"), join(["a", "b"], "of_steps"), neg, join(["b", "n"], "of_others")]
    (chain, *others) = chained(model_of(nodes, ["of_steps", "of_others"])).graph.node
    assert (step_names(chain), list(chain.output)) == (["a", "b", "of_steps"], ["b", "of_steps"])
    assert [node.op_type for node in others] == ["Neg", "Concat"]


def test_a_graph_is_one_chain_if_all_its_nodes_can_be_steps() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["r"]), product("r", "b"), helper.make_node("Add", ["b", "x"], ["c"])]
    (chain,) = chained(model_of(nodes, ["c"])).graph.node
    assert step_names(chain) == ["r", "b", "c"]
    besides = [*nodes, helper.make_node("Neg", ["x"], ["n"])]
    assert [node.op_type for node in chained(model_of(besides, ["c", "n"])).graph.node] == ["Relu", "Neg", CHAIN]


def test_results_of_which_the_graph_says_no_type_are_joined_with_their_own() -> None:
    nodes = [helper.make_node("Unsqueeze", ["x", "axis"], ["s"])]
    for name in ("t", "u"):
        made = [name, f"{name}.active"]
        nodes.append(helper.make_node("SelectThreshold", ["s", "half"], made, name, domain=DOMAIN))
    nodes.append(helper.make_node("Concat", ["t.active", "u.active"], ["active"], "active", axis=2))
    nodes.append(helper.make_node("Cast", ["active"], ["y"], to=TensorProto.FLOAT))
    model = model_of(nodes, ["y"])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2]), "axis"))
    x = np.random.default_rng(3).standard_normal((2, 3, WIDTH), np.float32)
    (y,) = run(chained(model), x)
    assert [node.op_type for node in chained(model).graph.node] == ["Unsqueeze", CHAIN, "Cast"]
    np.testing.assert_array_equal(y, np.full((2, 3, 2), WIDTH // 2, np.float32))


def test_a_part_that_a_step_alone_has_made_tells_its_type() -> None:
    join = helper.make_node("Concat", ["a", "b"], ["j"], "j", axis=-1)
    nodes = [product("x", "a"), helper.make_node("Neg", ["a"], ["r"]), product("r", "b"), join]
    cast = helper.make_node("Cast", ["j"], ["y"], to=TensorProto.FLOAT)
    model, x = model_of([*nodes, cast], ["y"]), np.random.default_rng(3).standard_normal((1, 2, WIDTH), np.float32)
    assert [node.op_type for node in chained(model).graph.node] == ["MatMulRows", "Neg", CHAIN, "Cast"]
    np.testing.assert_array_equal(run(chained(model), x), run(model, x))


def test_what_is_counted_holds_no_memory_that_layers_compute_in() -> None:
    nodes = [helper.make_node("Slice", ["x", "zero", "one", "one"], ["first"])]
    nodes.append(helper.make_node("Unsqueeze", ["first", "one"], ["s"]))
    last, layers, tokens = "x", 150, 1 << 16
    for layer in range(layers):
        nodes.append(product(last, f"y{layer}"))
        counts = [f"t{layer}", f"n{layer}"]
        nodes.append(helper.make_node("SelectThreshold", ["s", "half"], counts, counts[0], domain=DOMAIN))
        last = f"y{layer}"
    nodes.append(helper.make_node("Concat", [f"t{layer}" for layer in range(layers)], ["thresholds"], axis=2))
    model = model_of(nodes, [last, "thresholds"])
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array([n]), name) for n, name in enumerate(("zero", "one"))
    )
    chain = session_of(chained(model))
    x = np.random.default_rng(3).standard_normal((1, tokens, WIDTH), np.float32)
    chain.run(None, {"x": x[:, :1]})
    try:
        resources._CLEAR_PEAK.write_text("5")  # not `_reset_peak`, which goes on where it cannot
    except OSError as error:
        pytest.skip(f"the peak of memory cannot be reset here: {error}")
    before = resources._peak_bytes()
    assert chain.run(None, {"x": x})[1].shape == (1, 1, layers)
    assert resources._peak_bytes() - before < 12 * x.nbytes


def test_weights_in_a_file_reach_a_chain_as_one_input(tmp_path: Path) -> None:
    model = model_of([product("x", "a"), product("a", "b"), helper.make_node("Mul", ["b", "scales"], ["c"])], ["c"])
    rewritten, x = chained(stored(model, tmp_path)), np.random.default_rng(3).standard_normal((1, 2, WIDTH), np.float32)
    assert list(rewritten.graph.node[0].input) == ["x", "chain.weights"]
    in_file = {tensor.name for tensor in rewritten.graph.initializer if tensor.external_data}
    assert in_file == {"chain.weights", "scales"}  # Mul reads it too
    np.testing.assert_array_equal(run(rewritten, x, tmp_path), run(model, x))


def test_weights_that_a_caller_may_give_or_that_lie_in_two_files_stay_inputs_of_their_own(tmp_path: Path) -> None:
    steps = [product("x", "a"), product("a", "b")]
    by_caller = stored(model_of(steps, ["b"]), tmp_path)
    by_caller.graph.input.append(helper.make_tensor_value_info("scales", TensorProto.FLOAT, [WIDTH]))
    assert list(chained(by_caller).graph.node[0].input) == ["x", "scales", "chain.weights"]
    unread = stored(model_of(steps, ["b"]), tmp_path)
    unread.graph.input.append(helper.make_tensor_value_info("half", TensorProto.FLOAT, [1]))
    assert "half" in {tensor.name for tensor in chained(unread).graph.initializer}  # an input without one must be given
    two = stored(model_of(steps, ["b"]), tmp_path)
    two.graph.initializer[0].external_data[0].value = "others.bin"
    assert list(chained(two).graph.node[0].input) == ["x", "w", "scales"]


def test_every_operator_of_the_cpu_can_be_a_step() -> None:
    source = (Path(__file__).parents[2] / "plugins" / "cpu" / "ort_chain.cc").read_text(encoding="utf-8")
    assert [spec.name for spec in CPU_OPS if f'"{spec.name}"' not in source] == []


# ---- what is refused


def two_products() -> tuple[onnx.ModelProto, onnx.NodeProto]:
    model = chained(model_of([product("x", "a"), product("a", "b")], ["b"]))
    return model, model.graph.node[0]


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    (old,) = (attribute for attribute in node.attribute if attribute.name == name)
    old.CopyFrom(helper.make_attribute(name, value))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("0.inputs", [3, 1, 2], "a value that no earlier step makes"),
        ("1.inputs", [9, 1, 2], "a value that no earlier step makes"),
        ("results", [7], "a value that no earlier step makes"),
        ("results", [0], "a value that no earlier step makes"),
        ("0.outputs", [4], "have to number what they make in order"),
        ("1.outputs", [-1], "step 'b' lacks an output"),
        ("results", [4, 4], "as many as outputs"),
        ("operators", "MatMulRows", "every step has an operator and a name"),
        ("operators", "MatMulRows\nNeg", "no step can be 'Neg'"),
        ("1.inputs", [3], r"MatMulRows node 'b': w must be \[N, E\], found \[\]"),
    ],
)
def test_a_chain_whose_wiring_is_wrong_is_refused(name: str, value: Any, says: str) -> None:
    model, chain = two_products()
    set_attribute(chain, name, value)
    with pytest.raises(Exception, match=says):
        run(model, np.ones((1, 1, WIDTH), np.float32))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("stored.0", [TensorProto.INT8, 33, 8, 8], "weights number 0 do not lie in its constant"),
        ("stored.0", [TensorProto.INT8, -1, 8, 8], "weights have a type, a first byte and at most 6 axes"),
        ("stored.0", [TensorProto.INT8, 0, 8, -8], "weights number 0 do not lie in its constant"),
        ("stored.0", [TensorProto.INT8, 97], "weights number 0 do not lie in its constant"),
        ("stored.0", [TensorProto.FLOAT, 2, 8], "weights number 0 do not lie in its constant"),
        ("stored.0", [TensorProto.INT8, 0, 1 << 62, 4], "weights number 0 do not lie in its constant"),
        ("stored.0", [TensorProto.INT8, 0, *[1] * 7], "weights have a type, a first byte and at most 6 axes"),
        ("stored.0", [TensorProto.STRING, 0, 8], "no operator has elements of type string"),
        ("stored.1", [TensorProto.INT8, 64, 8], "node 'a': input 2 must be float32, found int8"),
        ("stored", 0, r"weights have to lie in a constant of uint8 \[bytes\]"),
        ("stored", 2, r"weights have to lie in a constant of uint8 \[bytes\]"),
        ("stored", -1, "a value that no earlier step makes"),
    ],
)
def test_weights_that_are_not_where_a_chain_looks_are_refused(tmp_path: Path, name: str, value: Any, says: str) -> None:
    model = chained(stored(model_of([product("x", "a"), product("a", "b")], ["b"]), tmp_path))
    set_attribute(model.graph.node[0], name, value)
    with pytest.raises(Exception, match=says):
        run(model, np.ones((1, 1, WIDTH), np.float32), tmp_path)


def test_a_step_refuses_shapes_under_its_own_name_as_a_node_does() -> None:
    model, _ = two_products()
    with pytest.raises(Exception, match=r"MatMulRows node 'a': w must be \[N, E\] = \[8, 7\], found \[8, 8\]"):
        run(model, np.ones((1, 1, WIDTH - 1), np.float32))


@pytest.mark.parametrize(
    ("parts", "axis", "says"),
    [
        (
            ["a", "t"],
            1,
            r"Concat node 'j': input 1 must be \[1, 1, 8\], as input 0 but for the axis, found \[1, 1, 1\]",
        ),
        (["a", "t.active"], 2, r"Concat node 'j': the type of input 1 must be that of input 0, float32, found int32"),
        (["a", "b"], 3, r"Concat node 'j': attribute axis must be an axis of input 0, \[1, 1, 8\], found 3"),
        (["a", "b"], -4, r"found -4"),
    ],
)
def test_a_join_refuses_what_does_not_fit(parts: list[str], axis: int, says: str) -> None:
    select = helper.make_node("SelectThreshold", ["s", "half"], ["t", "t.active"], "t", domain=DOMAIN)
    steps = [product("x", "a"), product("a", "b"), helper.make_node("Unsqueeze", ["x", "axis"], ["s"]), select]
    join = helper.make_node("Concat", parts, ["j"], "j", axis=axis)
    model = model_of([*steps, join], ["j", "b"])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2]), "axis"))
    with pytest.raises(Exception, match=says):
        run(chained(model), np.ones((1, 1, WIDTH), np.float32))


def test_a_step_refuses_an_input_of_another_type() -> None:
    model, chain = two_products()
    set_attribute(chain, "1.inputs", [3, 2, 2])  # scales as w
    with pytest.raises(Exception, match="node 'b': input 1 must be int8, found float32"):
        run(model, np.ones((1, 1, WIDTH), np.float32))


def test_an_output_of_which_the_graph_says_another_type_is_refused() -> None:
    model, _ = two_products()
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    with pytest.raises(Exception, match="output 0 is of another type in the graph"):
        run(model, np.ones((1, 1, WIDTH), np.float32))


def test_a_result_is_there_once() -> None:
    model, chain = two_products()
    chain.output.append("c")
    model.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))
    set_attribute(chain, "results", [4, 4])
    with pytest.raises(Exception, match="a result is there twice"):
        run(model, np.ones((1, 1, WIDTH), np.float32))


def test_outputs_that_are_not_asked_for_and_say_no_type_are_none_of_a_chains_business() -> None:
    clip = helper.make_node("Clip", ["b", "", "limit"], ["c"])
    select = helper.make_node("SelectThreshold", ["s", "half"], ["t", "n"], "s", domain=DOMAIN)
    unsqueeze = helper.make_node("Unsqueeze", ["x", "axis"], ["s"])
    model = model_of([product("x", "a"), product("a", "b"), clip, unsqueeze, select], ["c", "b"])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2]), "axis"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.01, np.float32), "limit"))
    model.graph.output[1].ClearField("type")  # as those that `variants.with_outputs` adds
    x = np.random.default_rng(3).standard_normal((1, 2, WIDTH), np.float32)
    for found, wanted in zip(run(chained(model), x), run(model, x), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_step_without_a_name_is_called_by_what_it_makes() -> None:
    nodes = [product("x", "a"), product("a", "b")]
    nodes[1].ClearField("name")
    assert step_names(chained(model_of(nodes, ["b"])).graph.node[0]) == ["a", "b"]


def test_one_chain_may_be_called_by_many_at_once() -> None:
    model, _ = two_products()
    session = session_of(model)
    inputs = [np.random.default_rng(seed).standard_normal((1, 3, WIDTH), np.float32) for seed in range(8)]
    wanted = [session.run(None, {"x": x})[0] for x in inputs]

    def often(number: int) -> bool:
        x = inputs[number]
        return all(np.array_equal(session.run(None, {"x": x})[0], wanted[number]) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(often, range(len(inputs))))


def unknown(model: onnx.ModelProto) -> onnx.ModelProto:
    made = chained(model)
    next(node for node in made.graph.node if node.op_type == CHAIN).op_type = "Chains"
    return made


def of_another_version(model: onnx.ModelProto) -> onnx.ModelProto:
    made = chained(model)
    set_attribute(next(node for node in made.graph.node if node.op_type == CHAIN), "stored", -1)
    return made


@pytest.mark.parametrize(("spoilt", "name"), [(unknown, "Chains"), (of_another_version, "Chain")])
def test_a_chain_that_its_library_does_not_know_is_an_error_for_the_reader(
    spoilt: Any, name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "chained", spoilt)
    monkeypatch.setattr(sessions, "CHAIN", name)
    with pytest.raises(IncompatibleEngineError, match="Chain") as raised:
        load(folders["int8"]).generate(np.arange(4, 9)[None], max_new_tokens=1)
    assert raised.value.hint == REINSTALL
