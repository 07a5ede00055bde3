# SPDX-License-Identifier: Apache-2.0
"""Rewrites of a finished engine graph, ModelProto to ModelProto: outputs, scores, digits, no sparsity.

The input stays as it is; weights stay references into weights.bin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableSequence, Sequence
from typing import TYPE_CHECKING, TypeVar

from shadowc.spec.density import UNIT_KINDS
from shadowc.spec.errors import InputError, UnsupportedError
from shadowc.spec.ops import DOMAIN, PREDICT_UNITS, SELECT_THRESHOLD, SPARSE_ATTENTION, SPARSE_FFN
from shadowc.spec.tensors import MASK, PAST, START, TAIL, TOKEN, rows_of_tables, scores_of_one_layer

if TYPE_CHECKING:
    import onnx

_SCORES, _THRESHOLD = 1, 2
"""Positions of these operands in both sparse operators."""
CONTEXT_READ = "layers.0.attention.read"
"""What layer 0's attention read, records and bytes [2]."""
_OPERATOR = {"heads": SPARSE_ATTENTION.name, "neurons": SPARSE_FFN.name}

_Item = TypeVar("_Item")


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The graph with further inner tensors as outputs; those that are outputs already stay single.

    Raises:
        InputError: a name is no tensor of the graph.
    """
    copy = _copy(model)
    made = {name for node in copy.graph.node for name in node.output}
    unknown = [name for name in names if name not in made]
    if unknown:
        raise InputError(f"no such tensor in the engine's graph: {', '.join(unknown)}", hint="shadowc inspect ENGINE")
    present = {value.name for value in copy.graph.output}
    for name in dict.fromkeys(names):
        if name not in present:
            copy.graph.output.add(name=name)
    return copy


def with_skip_zeros(model: onnx.ModelProto, on: bool) -> onnx.ModelProto:
    """The graph with `skip_zeros` of every FFN switched on or off."""
    copy = _copy(model)
    for node in copy.graph.node:
        if node.domain == DOMAIN and node.op_type == SPARSE_FFN.name:
            _set_int(node, "skip_zeros", int(on))
    return copy


def with_exact_prompts(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph whose operators compute with all digits, whatever meets them (`give_prompts_few_digits` in emit)."""
    from shadowc.spec.oracle import drop_few_digits

    copy = _copy(model)
    drop_few_digits(copy.graph)
    return copy


def with_scope(model: onnx.ModelProto, scope: str) -> onnx.ModelProto:
    """The graph with units ranked within each layer ("local") or over all ("global").

    Raises:
        UnsupportedError: "global" for a graph whose layers have selections of their own.
    """
    copy = _copy(model)
    if scope == "global" and _layers_of_their_own(copy):
        raise UnsupportedError(
            "this engine was compiled with a predictor for each layer (--style dejavu or shadow+): every layer ranks "
            "its own units, and no ranking over all layers is possible",
            hint="shadowc compile --style shadow --scope global",
        )
    for node in copy.graph.node:
        if node.domain == DOMAIN and node.op_type == SELECT_THRESHOLD.name:
            for attribute in node.attribute:
                if attribute.name == "scope":
                    attribute.s = scope.encode()
    return copy


def with_scores_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without its predictor: `scores.heads` and `scores.neurons` [B,Z,L,N] come from the caller.

    Selection and kernels stay the same, so controls (static, random) are measured on the same code. Where every layer
    has a selection of its own, it gets that layer's part.

    Raises:
        InputError: a dense engine has no scores.
    """
    import onnx

    from shadowc.spec.ops import PREDICT_UNITS
    from shadowc.spec.unfold import unfold_products

    copy = _copy(model)
    names = {f"scores.{kind}" for kind in UNIT_KINDS}
    found = {name for node in copy.graph.node for name in node.output if name in names}
    if found != names:
        raise InputError("a dense engine has no scores", hint="shadowc compile without --predictor none")
    unfold_products(copy.graph, (PREDICT_UNITS,))
    gone = names | {f"mask_scores.{kind}" for kind in UNIT_KINDS}
    shapes = {value.name: value.type.tensor_type.shape.dim for value in copy.graph.output}
    for name in sorted(names):
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * 4)
        for axis, size in enumerate(shapes.get(name, ())):
            if axis >= 2 and size.HasField("dim_value"):
                value.type.tensor_type.shape.dim[axis].dim_value = size.dim_value
        copy.graph.input.append(value)
    for node in copy.graph.node:
        node.output[:] = [f"{name}.predicted" if name in names else name for name in node.output]
    _keep(copy.graph.output, lambda value: value.name not in gone)
    _give_layers_their_scores(copy)
    _prune(copy.graph)
    return copy


def _layers_of_their_own(model: onnx.ModelProto) -> dict[str, tuple[str, int]]:
    return scores_of_one_layer(name for node in model.graph.node for name in node.output)


def _give_layers_their_scores(model: onnx.ModelProto) -> None:
    """Let `scores.{kind}.{layer}` be a part of the input `scores.{kind}`."""
    import onnx

    graph, parts = model.graph, _layers_of_their_own(model)
    for node in graph.node:
        node.output[:] = [f"{name}.predicted" if name in parts else name for name in node.output]
    first = []
    for name, (kind, layer) in parts.items():
        given = [f"{name}.{bound}" for bound in ("from", "to", "axis")]
        for constant, value in zip(given, (layer - 1, layer, 2), strict=True):
            graph.initializer.append(onnx.helper.make_tensor(constant, onnx.TensorProto.INT64, [1], [value]))
        first.append(onnx.helper.make_node("Slice", [f"scores.{kind}", *given], [name], name))
    rest = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*first, *rest])


def without_joined_scores(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph that puts out no scores and thresholds, where those of all layers are joined for that alone.

    Nobody looks at them while text is made. Where all layers share one selection they cost nothing, and stay.
    """
    copy = _copy(model)
    if not _layers_of_their_own(copy):
        return copy
    gone = {f"{part}.{kind}" for part in ("scores", "mask_scores", "threshold") for kind in UNIT_KINDS}
    _keep(copy.graph.output, lambda value: value.name not in gone)
    _prune(copy.graph)
    needed = {name for node in copy.graph.node for name in inputs_of(node)} | {
        value.name for value in copy.graph.output
    }
    for node in copy.graph.node:
        if node.domain == DOMAIN and node.op_type == PREDICT_UNITS.name and node.output[-1] not in needed:
            node.output.pop()
    return copy


def told(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph that is told what the loop over tokens knows, where it derived that anew for every token.

    Inputs take the place of `attention_mask` (PAST, START and TOKEN), of `sparse_tail` (TAIL) and of a density that is
    looked up in a table (`rows_of_tables`). Each node that goes takes some 10 us of a token: behind hundreds of MB of
    weights nothing that ONNX Runtime needs for it is in the caches. Where something else needs the mask, as an output
    of the graph may, it stays as it is.
    """
    import onnx

    copy = _copy(model)
    made = {name for node in copy.graph.node for name in node.output}
    int64, float32 = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    times: dict[str, list[str | int]] = {PAST: ["B"], START: ["B"], TOKEN: ["B", "S"], TAIL: [1]}
    tables = {tensor.name: list(tensor.dims) for tensor in copy.graph.initializer}
    inputs = [onnx.helper.make_tensor_value_info(name, int64, times[name]) for name in times if name in made]
    for name, table in rows_of_tables(made).items():
        inputs.append(onnx.helper.make_tensor_value_info(name, float32, ["B", tables[table][1]]))
    known = {value.name for value in inputs}
    for node in copy.graph.node:
        node.output[:] = [f"{name}.derived" if name in known else name for name in node.output]
    copy.graph.input.extend(inputs)
    _prune(copy.graph)
    return _copy(model) if any(value.name == MASK for value in copy.graph.input) else copy


def predicting(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph up to its scores: embedding, layer 0's attention and the predictor, without a selection.

    Its outputs are the cache of layer 0, `scores.*` and, where kernels count, CONTEXT_READ.
    """
    copy = _copy(model)
    made = {name for node in copy.graph.node for name in node.output}
    wanted = {*(f"scores.{kind}" for kind in UNIT_KINDS), "present.0.key", "present.0.value"}
    _keep(copy.graph.output, lambda value: value.name in wanted)
    if CONTEXT_READ in made:
        copy.graph.output.add(name=CONTEXT_READ)
    _prune(copy.graph)
    return copy


def selecting(model: onnx.ModelProto) -> onnx.ModelProto:
    """The selections of a graph whose scores are inputs, alone: `threshold.*` and `active.*` come out."""
    copy = _copy(model)
    wanted = {f"{part}.{kind}" for part in ("threshold", "active") for kind in UNIT_KINDS}
    _keep(copy.graph.output, lambda value: value.name in wanted)
    _prune(copy.graph)
    return copy


def with_thresholds_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without its selections: `threshold.*` [B,Z,L] come from the caller, and nothing counts `active.*`."""
    copy = _copy(model)
    _keep(copy.graph.node, lambda node: node.op_type != SELECT_THRESHOLD.name)
    selected = [value for value in copy.graph.output if value.name.startswith("threshold.")]
    copy.graph.input.extend(selected)
    _keep(copy.graph.output, lambda value: not value.name.startswith(("threshold.", "active.")))
    _prune(copy.graph)
    return copy


def with_kv(model: onnx.ModelProto, kv: str) -> onnx.ModelProto:
    """The graph that writes K/V of "all" heads, or of "active" ones only."""
    import onnx

    copy = _copy(model)
    for node in copy.graph.node:
        if node.domain == DOMAIN and node.op_type == SPARSE_ATTENTION.name:
            _keep(node.attribute, lambda attribute: attribute.name != "kv")
            node.attribute.append(onnx.helper.make_attribute("kv", kv))
    return copy


def dense(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without predictor and masks, every layer as layer 0 is: the twin that speed is held against."""
    copy = _copy(model)
    for node in copy.graph.node:
        for kind, operator in _OPERATOR.items():
            if node.domain == DOMAIN and node.op_type == operator:
                node.input[_SCORES], node.input[_THRESHOLD] = f"dense.scores.{kind}", "dense.threshold"
                _set_int(node, "layer", 0)
    gone = {f"{part}.{kind}" for part in ("scores", "mask_scores", "threshold", "active") for kind in UNIT_KINDS}
    _keep(copy.graph.output, lambda value: value.name not in gone)
    _prune(copy.graph)
    return copy


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = type(model)()
    copy.CopyFrom(model)
    return copy


def _set_int(node: onnx.NodeProto, name: str, value: int) -> None:
    import onnx

    _keep(node.attribute, lambda attribute: attribute.name != name)
    node.attribute.append(onnx.helper.make_attribute(name, value))


def _prune(graph: onnx.GraphProto) -> None:
    """Drop nodes, initialisers and inputs that no output depends on."""
    needed = {value.name for value in graph.output}
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(inputs_of(node))
    _keep(graph.node, lambda node: bool(needed.intersection(node.output)))
    _keep(graph.initializer, lambda tensor: tensor.name in needed)
    _keep(graph.input, lambda value: value.name in needed)
    _keep(graph.value_info, lambda value: value.name in needed)


def inputs_of(node: onnx.NodeProto) -> Iterable[str]:
    """What a node reads, the graphs inside it included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from inputs_of(inner)


def _keep(field: MutableSequence[_Item], wanted: Callable[[_Item], bool]) -> None:
    kept = [item for item in field if wanted(item)]
    if len(kept) != len(field):
        del field[:]
        field.extend(kept)
