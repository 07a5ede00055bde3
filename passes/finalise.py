# SPDX-License-Identifier: Apache-2.0
"""Gives the graph its public face: names, order of inputs and outputs, and what the kernels read.

Legal cases:
1. Tensors along the residual stream, norm outputs and operator results get the names that tools and tests rely on;
   a node that was traced is called as its first result.
2. The `read` results of all operators become one output, [layers, 2, 2]: attention and FFN, records and bytes.
3. Inputs, outputs and operator domains are put in their order; weights follow the run-time inputs, sorted.

Letters: B batch, S new tokens, P mask length, E hidden, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from shadowc.checkpoint.opt import FINAL_NORM, POSITIONS, layer_names
from shadowc.passes.surgery import Builder, scope_of, tidy
from shadowc.spec.density import UNIT_KINDS
from shadowc.spec.errors import InternalError
from shadowc.spec.ops import DOMAIN, VERSION
from shadowc.spec.program import PassReport, Program

NAME = "finalise"
IR_VERSION = 10


def apply(program: Program) -> PassReport:
    """Rename, collect and order, in place."""
    requires(program)
    counts = {"tensors": name_tensors(program), "read": collect_read(program)}
    counts["removed"] = tidy(program)
    counts["nodes"] = name_nodes(program)
    order_interface(program, input_names(program), output_names(program))
    ensures(program)
    return PassReport(NAME, counts)


def requires(program: Program) -> None:
    """Both sparsify passes have run."""
    require_operators(program, NAME)


def require_operators(program: Program, name: str) -> None:
    """Both sparsify passes have run, which pass `name` needs."""
    done = {node.name for node in program.graph.nodes}
    for layer in range(program.facts.layers):
        for part in ("attention", "ffn"):
            if f"layers.{layer}.{part}" not in done:
                raise InternalError(f"{name}: layer {layer} has no {part} operator; sparsify_{part} has to run first")


def ensures(program: Program) -> None:
    """Names are unique, every weight has a recipe, the interface is complete, and nothing is left of the trace."""
    check_interface(program, input_names(program), output_names(program))


def check_interface(program: Program, inputs: list[str], outputs: list[str]) -> None:
    """Refuse a graph whose names, types or interface are not as promised.

    Raises:
        InternalError: with the first thing that is wrong.
    """
    graph = program.graph
    found = [value.name for value in graph.inputs]
    expected = [*inputs, *sorted(program.weights)]
    if found != expected:
        raise InternalError(f"{NAME}: inputs differ from the expected in {sorted(set(found) ^ set(expected))[:5]}")
    if (found := [value.name for value in graph.outputs]) != outputs:
        raise InternalError(f"{NAME}: outputs are {found}")
    names = [node.name for node in graph.nodes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InternalError(f"{NAME}: several nodes are called {twice[0]}")
    if traced := [name for name in names if "#" in name]:
        raise InternalError(f"{NAME}: {traced[0]} kept the name of the trace")
    untyped = [value.name for node in graph.nodes for value in node.outputs if value.dtype is None]
    if untyped:
        raise InternalError(f"{NAME}: tensor {untyped[0]} has no element type")
    tensors = graph.tensors()
    for layer in range(program.facts.layers + 1):
        if f"residual.{layer}" not in tensors:
            raise InternalError(f"{NAME}: tensor residual.{layer} is missing")


def input_names(program: Program) -> list[str]:
    """Run-time inputs in graph order."""
    dials: list[str] = []
    if program.plan:
        last = mask_inputs(program) or ["sparse_tail"]
        dials = ["density_heads", "density_neurons", *last]
    return ["input_ids", "attention_mask", *cache_names(program, "past_key_values"), *dials]


def output_names(program: Program) -> list[str]:
    """Graph outputs in order."""
    masks: tuple[str, ...] = ()
    if program.plan:
        masks = ("threshold", "active") if mask_inputs(program) else ("mask_scores", "scores", "threshold", "active")
    return [
        "logits",
        *cache_names(program, "present"),
        *(f"{part}.{kind}" for part in masks for kind in UNIT_KINDS),
        "read",
    ]


def mask_inputs(program: Program) -> list[str]:
    """Inputs that hold a fixed mask; empty where a predictor makes the masks."""
    inputs = {value.name for value in program.graph.inputs}
    return [name for kind in UNIT_KINDS if (name := f"mask_scores.{kind}") in inputs]


def cache_names(program: Program, side: str) -> list[str]:
    """Names of the cache tensors of one side, past_key_values or present, in layer order."""
    return [f"{side}.{layer}.{kind}" for layer in range(program.facts.layers) for kind in ("key", "value")]


def name_tensors(program: Program) -> int:
    """Name the boundary tensors of every layer; returns how many got a new name."""
    graph = program.graph
    norms = {node.inputs[1].name: node for node in graph.nodes if node.op == "LayerNormalization"}
    operators = {node.name: node for node in graph.nodes}
    names: list[tuple[gs.Tensor, str]] = []
    for layer in range(program.facts.layers):
        names += _layer_tensors(program, norms, layer)
        for part in ("attention", "ffn"):
            if f"layers.{layer}.{part}" in operators:  # the prefill has none
                names += [(operators[f"layers.{layer}.{part}"].outputs[0], f"layers.{layer}.{part}.y")]
    names += _last_tensors(program, norms)
    changed = 0
    for tensor, name in names:
        changed += tensor.name != name
        tensor.name, tensor.shape = name, ("B", "S", program.facts.hidden)
    return changed


def _layer_tensors(program: Program, norms: dict[str, gs.Node], layer: int) -> list[tuple[gs.Tensor, str]]:
    """What goes into a layer, what stands between its blocks, and what the blocks read where that is neither."""
    parameters = layer_names(layer)
    first, second = norms[parameters.attention_norm.weight], norms[parameters.ffn_norm.weight]
    if not program.facts.norm_first:  # blocks read the residual, which the norm after the last block has made
        ends = [(second.outputs[0], f"residual.{layer + 1}"), (first.outputs[0], f"layers.{layer}.middle")]
        sums = [(first.inputs[0], f"layers.{layer}.attention.sum"), (second.inputs[0], f"layers.{layer}.ffn.sum")]
        return [*ends, *sums]
    ends = [(first.inputs[0], f"residual.{layer}"), (second.inputs[0], f"layers.{layer}.middle")]
    return [*ends, (first.outputs[0], f"layers.{layer}.attention.x"), (second.outputs[0], f"layers.{layer}.ffn.x")]


def _last_tensors(program: Program, norms: dict[str, gs.Node]) -> list[tuple[gs.Tensor, str]]:
    """What goes into the first layer or comes out of the last, where no norm of a layer shows it."""
    facts = program.facts
    if not facts.norm_first:
        (lookup,) = Builder(program).tensor(POSITIONS, "trace").outputs
        return [(lookup.outputs[0].outputs[0].outputs[0], "residual.0")]
    last = norms[f"{FINAL_NORM}.weight"]
    return [(last.inputs[0], f"residual.{facts.layers}"), (last.outputs[0], f"{FINAL_NORM}.y")]


def collect_read(program: Program) -> int:
    """Join what all operators read into one output; returns how many there are."""
    builder = Builder(program)
    if "read" in builder:
        return 0
    parts = [
        builder.tensor(f"layers.{layer}.{part}.read", f"sparsify_{part}")
        for layer in range(program.facts.layers)
        for part in ("attention", "ffn")
    ]
    n = program.facts.layers
    flat = builder.node("Concat", parts, "read.flat", np.int64, (4 * n,), axis=0)
    program.graph.outputs.append(builder.node("Reshape", [flat, builder.ints(n, 2, 2)], "read", np.int64, (n, 2, 2)))
    return len(parts)


def name_nodes(program: Program) -> int:
    """Call every node as its first result; returns how many got a new name."""
    changed = 0
    for node in program.graph.nodes:
        if (node.domain != DOMAIN or scope_of(node)) and node.name != node.outputs[0].name:
            if scope_of(node) and not node.outputs[0].name.startswith(("residual.", "layers.", "model.", "logits")):
                node.outputs[0].name = f"{scope_of(node)}.y"
            node.name = node.outputs[0].name
            changed += 1
    return changed


def order_interface(program: Program, inputs: list[str], outputs: list[str]) -> None:
    """Put inputs, outputs and operator domains in order and give the graph its name."""
    graph, facts = program.graph, program.facts
    tensors = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    tensors["logits"].shape = ("B", tensors["logits"].shape[1] if tensors["logits"].shape[1] == 1 else "S", facts.vocab)
    tensors["input_ids"].shape = ("B", "S")
    if "attention_mask" in tensors:
        tensors["attention_mask"].shape = ("B", "P")
    names = [*inputs, *sorted(program.weights)]
    for name in (*names, *outputs):
        if name not in tensors:
            raise InternalError(f"{NAME}: {name} is neither input nor output of the graph")
    graph.inputs = [tensors[name] for name in names]
    graph.outputs = [tensors[name] for name in outputs]
    graph.name, graph.doc_string, graph.ir_version = "opt", "", IR_VERSION
    graph.producer_name, graph.producer_version = "shadowc", ""
    used = {node.domain for node in graph.nodes}
    domains = {"": graph.opset, DOMAIN: VERSION}
    # listed here, in order: GraphSurgeon would add missing domains in the order of a set
    graph.import_domains = [
        onnx.helper.make_opsetid(domain, version) for domain, version in domains.items() if not domain or domain in used
    ]
