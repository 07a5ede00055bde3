# SPDX-License-Identifier: Apache-2.0
"""The meaning of the operators of ops.py, written as ONNX functions of standard operators (opset 20).

In: nothing, or a graph that uses the operators. Out: the functions, or the graph together with them, which any
stock ONNX Runtime executes. Every kernel is tested against these functions; speed is no concern here.

Rules that come from the runtimes: every node has a name (ORT 1.23 requires it), no function is overloaded (old
runtimes ignore the overload silently), and no TopK sees an empty tensor (ORT 1.23 crashes).

Letters as in ops.py: B batch, S new tokens, Z sparse tail, T cache capacity, E hidden, H heads, D head size,
F neurons, N units of a layer, L predicted layers, G neurons of a unit. A 1 is an axis that broadcasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableSequence
from typing import TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper

from shadowc.spec.errors import InternalError
from shadowc.spec.nodes import ATTRIBUTE_TYPES, OPSET, Nodes
from shadowc.spec.ops import DOMAIN, FEW_DIGITS, OPS, SELECT_THRESHOLD, SPARSE_ATTENTION, SPARSE_FFN, VERSION, OpSpec
from shadowc.spec.unfold import unfold_norms, unfold_products

_Proto = TypeVar("_Proto")
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
_LOWEST = float(np.finfo(np.float32).min)


def functions() -> list[onnx.FunctionProto]:
    """One function for each operator, in the order of ops.OPS."""
    bodies = {
        SELECT_THRESHOLD.name: select_threshold_body,
        SPARSE_ATTENTION.name: sparse_attention_body,
        SPARSE_FFN.name: sparse_ffn_body,
    }
    return [_function(spec, bodies[spec.name]) for spec in OPS]


def attach(model: onnx.ModelProto, bodies: Iterable[onnx.FunctionProto] | None = None) -> onnx.ModelProto:
    """Return a copy of the model that carries the functions (or `bodies` instead of them).

    Functions cannot count what a kernel reads: outputs of role "kernel" leave the nodes, and with them goes every
    node and graph output that depends on them. What operators for the CPU do besides becomes nodes (unfold.py).

    Raises:
        InternalError: no output of the graph is left.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    unfold_norms(copy.graph)
    unfold_products(copy.graph)
    drop_few_digits(copy.graph)
    counted = {output for node in copy.graph.node for output in _drop_kernel_outputs(node)}
    _prune(copy.graph, counted)
    if not copy.graph.output:
        raise InternalError("every output of the graph depends on what the kernels count; nothing is left to run")
    del copy.functions[:]
    copy.functions.extend(functions() if bodies is None else bodies)
    if all(entry.domain != DOMAIN for entry in copy.opset_import):
        copy.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return copy


def drop_few_digits(graph: onnx.GraphProto) -> None:
    """Let no operator round, whatever the graph was compiled for."""
    for node in graph.node:
        if node.domain == DOMAIN:
            kept = [attribute for attribute in node.attribute if attribute.name != FEW_DIGITS]
            del node.attribute[:]
            node.attribute.extend(kept)


def _function(spec: OpSpec, body: Callable[[Nodes], None]) -> onnx.FunctionProto:
    nodes = Nodes()
    body(nodes)
    return helper.make_function(
        DOMAIN,
        spec.name,
        [operand.name for operand in spec.inputs],
        [operand.name for operand in spec.outputs if operand.role == "always"],
        nodes.protos,
        [helper.make_opsetid("", OPSET)],
        attribute_protos=[
            helper.make_attribute(attribute.name, attribute.default, attr_type=ATTRIBUTE_TYPES[attribute.kind])
            for attribute in spec.attributes
        ],
        doc_string=spec.promise,
    )


# --- SelectThreshold ---------------------------------------------------------------------------------------


def select_threshold_body(n: Nodes) -> None:
    """Write SelectThreshold: a unit is active unless it is below its layer's threshold, the k-th largest in scope."""
    one_token = n.Concat(n.sizes("scores", 0, 1), n.ints(1), n.sizes("scores", 2, 4), axis=0)
    dummy = n.Expand(n.float32(0.0), one_token)
    scores = n.Concat("scores", dummy, axis=1, out="scores_and_dummy")  # Z + 1 tokens: never empty
    rank = n.Where(n.IsNaN(scores), n.float32(np.inf), scores, out="rank")
    units, layers = n.Squeeze(n.sizes("scores", 3, 4)), n.Squeeze(n.sizes("scores", 2, 3))
    exempt_L = _exempt_layers(n, layers)
    exempt_L1 = n.Unsqueeze(exempt_L, n.ints(1))
    is_global = n.Equal(n.attribute("scope", "string"), n.constant("global", np.array("global", object)))

    ranked_layers = n.ReduceSum(n.Cast(n.Not(exempt_L), to=TensorProto.INT64), keepdims=0)
    population = n.Where(is_global, n.Mul(units, ranked_layers), units, out="population")
    wanted_B = n.Expand(_wanted(n, population), n.sizes("scores", 0, 1), out="wanted")
    wanted_B111 = n.Unsqueeze(wanted_B, n.ints(1, 2, 3))

    # local: sort the units of each layer; global: those of all layers that are not exempt, the rest behind them
    descending = n.TopK(rank, n.sizes("scores", 3, 4), axis=3, ignored=1, out="descending")
    ranked = n.Where(exempt_L1, n.float32(-np.inf), rank)
    together = n.Concat(n.sizes(scores, 0, 2), n.ints(1, -1), axis=0)
    all_units = n.Mul(n.sizes("scores", 3, 4), n.sizes("scores", 2, 3))
    descending_global = n.TopK(n.Reshape(ranked, together), all_units, axis=3, ignored=1)
    per_layer = n.Concat(n.sizes(scores, 0, 3), n.ints(1), axis=0)
    per_token = n.Concat(n.sizes(scores, 0, 2), n.ints(1, 1), axis=0)
    local_kth = _kth(n, descending, wanted_B111, units, per_layer)
    global_kth = n.Expand(_kth(n, descending_global, wanted_B111, population, per_token), per_layer)
    kth_BZL = n.Squeeze(n.Where(is_global, global_kth, local_kth), n.ints(3), out="kth")

    wanted_B11 = n.Unsqueeze(wanted_B, n.ints(1, 2))
    or_none = n.Where(n.LessOrEqual(wanted_B11, n.integer(0)), n.float32(np.inf), kth_BZL)
    or_all = n.Where(n.GreaterOrEqual(wanted_B11, population), n.float32(-np.inf), or_none)
    at_least = n.attribute("min_active", "int")
    last = n.Sub(units, n.integer(1))
    floor_BZL = n.Gather(descending, n.Clip(n.Sub(at_least, n.integer(1)), n.integer(0), last), axis=3)
    floored = n.Where(n.Greater(at_least, n.integer(0)), n.Min(or_all, floor_BZL), or_all, out="floored")
    threshold = n.Where(exempt_L, n.float32(-np.inf), floored)

    below = n.Less(scores, n.Unsqueeze(threshold, n.ints(3)))
    active = n.ReduceSum(n.Cast(n.Not(below), to=TensorProto.INT32), n.ints(3), keepdims=0)
    for tensor, out in ((threshold, "threshold"), (active, "active")):
        n.Slice(tensor, n.ints(0), n.sizes("scores", 1, 2), n.ints(1), out=out)  # without the dummy token


def _exempt_layers(n: Nodes, layers: str) -> str:
    """[L] bool; indices that are no layer (-1) exempt nothing."""
    index_L = n.Range(n.integer(0), layers, n.integer(1))
    same_XL = n.Equal(n.Unsqueeze(n.attribute("exempt", "ints"), n.ints(1)), index_L)
    hits_L = n.ReduceSum(n.Cast(same_XL, to=TensorProto.INT64), n.ints(0), keepdims=0)
    return n.Greater(hits_L, n.integer(0), out="exempt_layers")


def _wanted(n: Nodes, population: str) -> str:
    """floor(density * population + 0.5) per row, in float64 so that every implementation rounds alike."""
    density = n.Where(n.IsNaN("density"), n.float32(1.0), "density")
    share = n.Clip(n.Cast(density, to=TensorProto.DOUBLE), n.float64(0.0), n.float64(1.0))
    exact = n.Mul(share, n.Cast(population, to=TensorProto.DOUBLE))
    return n.Cast(n.Floor(n.Add(exact, n.float64(0.5))), to=TensorProto.INT64)


def _kth(n: Nodes, descending: str, wanted_B111: str, population: str, shape: str) -> str:
    """The wanted-th largest; what is returned for "none" or "all" wanted is replaced by the caller."""
    last = n.Sub(population, n.integer(1))
    index = n.Clip(n.Sub(wanted_B111, n.integer(1)), n.integer(0), last)
    return n.GatherElements(descending, n.Expand(index, shape), axis=3)


# --- what both sparse operators share ----------------------------------------------------------------------


def _unit_mask(n: Nodes) -> str:
    """[B,S,N] bool: everything is active before the sparse tail; inside it, what is not below the threshold."""
    layer = n.attribute("layer", "int")
    threshold_BZ1 = n.Unsqueeze(n.Gather("threshold", layer, axis=2), n.ints(2))
    tail_BZN = n.Not(n.Less(n.Gather("scores", layer, axis=2, out="scores_of_layer"), threshold_BZ1))
    batch, tail, units = n.sizes("x", 0, 1), n.sizes("scores", 1, 2), n.sizes("scores", 3, 4)
    tail_BZN = n.Expand(tail_BZN, n.Concat(batch, tail, units, axis=0))
    before = n.Concat(batch, n.Sub(n.sizes("x", 1, 2), tail), units, axis=0)
    dense = n.Expand(n.constant("true", np.bool_(True)), before)
    return n.Concat(dense, tail_BZN, axis=1, out="unit_mask")


def _records(n: Nodes, *, int4: bool) -> str:
    """`w` as float32, times the scale of each record row or group: [..,E]."""
    if not int4:
        return n.Mul(n.Cast("w", to=TensorProto.FLOAT), n.Unsqueeze("scales", n.ints(-1)), out="records")
    # [.., groups, stored values]: a row of any other type is one group, and stores each of its values
    rows = n.Concat(n.Shape("w", start=0, end=-1), n.ints(-1), axis=0)
    scales = n.Reshape("scales", rows)
    stored = n.Reshape("w", n.Concat(n.Shape(scales), n.ints(-1), axis=0))
    share = n.Div(n.sizes("x", 2, 3), n.Shape("w", start=-1), out="values_in_one")  # 2: pairs of int4, else 1
    pairs = n.Equal(share, n.ints(2), out="pairs")
    # arithmetic in place of shifts, which the other types do not have
    both = n.Cast(stored, to=TensorProto.FLOAT)
    high = n.Where(pairs, n.Floor(n.Div(both, n.float32(16.0))), n.float32(0.0))
    low = n.Sub(both, n.Mul(high, n.float32(16.0)))
    end = n.Mul(share, n.Shape(stored, start=-1))
    values = n.Slice(n.Concat(low, high, axis=-1), n.ints(0), end, n.ints(-1))
    signed = n.Sub(values, n.Where(pairs, n.float32(8.0), n.float32(0.0)))
    return n.Reshape(n.Mul(signed, n.Unsqueeze(scales, n.ints(-1))), rows, out="records")


# --- SparseFFN ---------------------------------------------------------------------------------------------


def sparse_ffn_body(n: Nodes, *, int4: bool = True) -> None:
    """Write SparseFFN over the record tensor `w`, which may be packed int4 unless the caller knows better."""
    mask_BSF = _neuron_mask(n, _unit_mask(n))
    records = _records(n, int4=int4)
    fc1_EF = n.Transpose(n.row(records, 0), perm=[1, 0])
    fired_BSF = n.Relu(n.Add(n.MatMul("x", fc1_EF), "b1"), out="fired")
    kept_BSF = n.Where(mask_BSF, fired_BSF, n.float32(0.0), out="kept")
    n.Add(n.MatMul(kept_BSF, n.row(records, 1)), "b2", out="y")


def _neuron_mask(n: Nodes, mask_BSN: str) -> str:
    """[B,S,F]: the mask of a unit for each of its G neurons; the last unit may have fewer."""
    block = n.Unsqueeze(n.attribute("block", "int"), n.ints(0))
    mask_BSN1 = n.Unsqueeze(mask_BSN, n.ints(3))
    mask_BSNG = n.Expand(mask_BSN1, n.Concat(n.Shape(mask_BSN), block, axis=0))
    flat = n.Concat(n.sizes(mask_BSN, 0, 2), n.ints(-1), axis=0)
    return n.Slice(n.Reshape(mask_BSNG, flat), n.ints(0), n.sizes("w", 0, 1), n.ints(2), out="neuron_mask")


# --- SparseAttention ---------------------------------------------------------------------------------------


def sparse_attention_body(n: Nodes, *, int4: bool = True) -> None:
    """Write SparseAttention over the record tensor `w`, which may be packed int4 unless the caller knows better."""
    mask_BHS = n.Transpose(_unit_mask(n), perm=[0, 2, 1], out="head_mask")
    mask_BHS1 = n.Unsqueeze(mask_BHS, n.ints(3))
    records = _records(n, int4=int4)
    query, key, value = (_projection(n, records, row, out) for row, out in enumerate(("query", "key", "value")))
    slot_T = n.Range(n.integer(0), n.Squeeze(n.sizes("past_key", 2, 3)), n.integer(1), out="slot")
    past_B1, start_B1 = n.Unsqueeze("past", n.ints(1)), n.Unsqueeze("start", n.ints(1))

    source_BT, written_BHT1 = _writes(n, mask_BHS, slot_T, past_B1)
    for fresh, past, present in ((key, "past_key", "present_key"), (value, "past_value", "present_value")):
        fresh_BHTD = n.GatherElements(fresh, n.Expand(source_BT, n.Shape(past)), axis=2)
        n.Where(written_BHT1, n.CastLike(fresh_BHTD, past), past, out=present)

    # what a query sees: slots start .. past + its own index; a slot that no query sees may hold anything
    token_S = n.Range(n.integer(0), n.Squeeze(n.sizes("x", 1, 2)), n.integer(1))
    own_slot_BS1 = n.Unsqueeze(n.Add(past_B1, token_S), n.ints(2))
    real_BT = n.GreaterOrEqual(slot_T, start_B1)
    seen_BST = n.And(n.LessOrEqual(slot_T, own_slot_BS1), n.Unsqueeze(real_BT, n.ints(1)))
    seen_B1ST = n.Unsqueeze(seen_BST, n.ints(1), out="seen")
    keys_BHDT = n.Transpose(n.Cast("present_key", to=TensorProto.FLOAT), perm=[0, 1, 3, 2], out="keys")
    logits = n.Where(seen_B1ST, n.MatMul(query, keys_BHDT), n.float32(_LOWEST))
    shares = n.Where(seen_B1ST, n.Softmax(logits, axis=-1), n.float32(0.0), out="shares")  # 0: sees nothing
    live_BT = n.And(real_BT, n.Less(slot_T, n.Add(past_B1, n.sizes("x", 1, 2))))
    live_B1T1 = n.Unsqueeze(live_BT, n.ints(1, 3))
    values = n.Where(live_B1T1, n.Cast("present_value", to=TensorProto.FLOAT), n.float32(0.0), out="values")  # 0 * NaN
    context_BHSD = n.Where(mask_BHS1, n.MatMul(shares, values), n.float32(0.0), out="head_context")

    flat = n.Concat(n.sizes("x", 0, 2), n.ints(-1), axis=0)
    n.Reshape(n.Transpose(context_BHSD, perm=[0, 2, 1, 3]), flat, out="context")
    rows = n.Concat(n.ints(-1), n.sizes("x", 2, 3), axis=0)
    n.Add(n.MatMul("context", n.Reshape(n.row(records, 3), rows)), "bo", out="y")


def _projection(n: Nodes, records: str, row: int, out: str) -> str:
    """Query (scaled by 1 / sqrt(D)), key or value of every head: [B,H,S,D]."""
    weight_HED = n.Transpose(n.row(records, row), perm=[0, 2, 1])
    bias_H1D = n.Unsqueeze(n.row("bqkv", row), n.ints(1))
    projected = n.MatMul(n.Unsqueeze("x", n.ints(1)), weight_HED)
    if out != "query":
        return n.Add(projected, bias_H1D, out=out)
    size = n.Sqrt(n.Cast(n.sizes("w", 2, 3), to=TensorProto.FLOAT))
    return n.Div(n.Add(projected, bias_H1D), size, out=out)


def _writes(n: Nodes, mask_BHS: str, slot_T: str, past_B1: str) -> tuple[str, str]:
    """For each slot the new token it would take, [B,1,T,1], and whether it takes it, [B,H,T,1]."""
    token_BT = n.Sub(slot_T, past_B1)
    tokens = n.sizes("x", 1, 2)
    new_BT = n.And(n.GreaterOrEqual(token_BT, n.integer(0)), n.Less(token_BT, tokens))
    source_BT = n.Clip(token_BT, n.integer(0), n.Sub(n.Squeeze(tokens), n.integer(1)))
    every_head = n.Equal(n.attribute("kv", "string"), n.constant("all", np.array("all", object)))
    source_BHT = n.Expand(n.Unsqueeze(source_BT, n.ints(1)), n.sizes("past_key", 0, 3))
    active_BHT = n.GatherElements(n.Cast(mask_BHS, to=TensorProto.INT32), source_BHT, axis=2)
    allowed_BHT = n.Or(every_head, n.Cast(active_BHT, to=TensorProto.BOOL))
    written_BHT = n.And(n.Unsqueeze(new_BT, n.ints(1)), allowed_BHT)
    return n.Unsqueeze(source_BT, n.ints(1, 3)), n.Unsqueeze(written_BHT, n.ints(3), out="written")


# --- attach ------------------------------------------------------------------------------------------------


def _drop_kernel_outputs(node: onnx.NodeProto) -> Iterator[str]:
    """Shorten the node's outputs to what a function produces; yield the names that went."""
    spec = next((spec for spec in OPS if node.domain == DOMAIN and node.op_type == spec.name), None)
    if spec is None:
        return
    kept = sum(operand.role == "always" for operand in spec.outputs)
    yield from filter(None, node.output[kept:])
    del node.output[kept:]
    while node.output and not node.output[-1]:
        del node.output[-1]


def _prune(graph: onnx.GraphProto, gone: set[str]) -> None:
    """Remove what depends on the `gone` tensors, then what only served the removed."""
    for node in graph.node:
        if gone.intersection(_read_by(node)):
            gone.update(node.output)
    _keep(graph.output, lambda output: output.name not in gone)
    _keep(graph.node, lambda node: not gone.intersection(_read_by(node)))
    needed = {output.name for output in graph.output}
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(_read_by(node))
    _keep(graph.node, lambda node: bool(needed.intersection(node.output)))
    _keep(graph.initializer, lambda tensor: tensor.name in needed)
    _keep(graph.value_info, lambda value: value.name in needed)


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those inside its branches and loop bodies included."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs) if attribute.type in _GRAPHS else ():
            yield from (name for inner in body.node for name in _read_by(inner))
            yield from (output.name for output in body.output)


def _keep(field: MutableSequence[_Proto], wanted: Callable[[_Proto], bool]) -> None:
    kept = [item for item in field if wanted(item)]
    del field[:]
    field.extend(kept)
