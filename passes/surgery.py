# SPDX-License-Identifier: Apache-2.0
"""What the passes share: finding nodes by module scope, reading a linear layer, new nodes, dead code, order.

A traced node is called `scope#index`; scopes are compared as whole names, never as substrings (layers.1 is a
prefix of layers.10). Nodes that a pass adds carry no scope.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from shadowc.spec.errors import InternalError
from shadowc.spec.program import Program, WeightRecipe

Dim = int | str | None
"""A size, a letter for a size that is known at run time, or None for one that has no name."""


def scope_of(node: gs.Node) -> str:
    """Name of the module that a node was traced in; empty for nodes that a pass added."""
    return str(node.name.rpartition("#")[0])


def is_inside(scope: str, block: str) -> bool:
    """True for the module `block` itself and for every module below it."""
    return scope == block or scope.startswith(f"{block}.")


def units_of(program: Program) -> dict[str, int]:
    """Units per layer of each kind: heads, and blocks of neurons (single neurons in a dense engine)."""
    block = program.plan.block if program.plan else 1
    return {"heads": program.facts.heads, "neurons": -(-program.facts.ffn // block)}


@dataclass(frozen=True, slots=True)
class Linear:
    """One traced linear layer, y = x W^T + b, as boundary tensors."""

    x: gs.Variable
    y: gs.Variable
    matmul: gs.Node


class Scopes:
    """The nodes of a graph by scope, as they are when it is made."""

    def __init__(self, graph: gs.Graph) -> None:
        self._nodes: defaultdict[str, list[gs.Node]] = defaultdict(list)
        for node in graph.nodes:
            self._nodes[scope_of(node)].append(node)

    def nodes(self, scope: str) -> list[gs.Node]:
        """Nodes of exactly this scope, in graph order."""
        return list(self._nodes.get(scope, ()))

    def inside(self, block: str) -> Iterator[gs.Node]:
        """Nodes of a module and of all modules below it."""
        for scope, nodes in self._nodes.items():
            if is_inside(scope, block):
                yield from nodes

    def one(self, scope: str, op: str) -> gs.Node:
        """The only node of a kind in a scope.

        Raises:
            InternalError: there is none, or there are several.
        """
        found = [node for node in self.nodes(scope) if node.op == op]
        if len(found) != 1:
            there = ", ".join(sorted({node.op for node in self.nodes(scope)})) or "no node at all"
            raise InternalError(f"expected one {op} in {scope}, found {len(found)}; the scope holds {there}")
        return found[0]

    def linear(self, weight: str) -> Linear:
        """The linear layer of the module that a weight's name belongs to; needs the form that canonicalise leaves."""
        scope = weight.removesuffix(".weight")
        matmul, add = self.one(scope, "MatMul"), self.one(scope, "Add")
        if not any(value is matmul.outputs[0] for value in add.inputs):
            raise InternalError(f"{scope}: {add.name} does not add a bias to {matmul.name}")
        return Linear(x=matmul.inputs[0], y=add.outputs[0], matmul=matmul)


class Builder:
    """Adds nodes, small constants and weights to a program; a node is called as its first result."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._graph = program.graph
        self._tensors: dict[str, gs.Tensor] = dict(program.graph.tensors())
        self._tensors.update((value.name, value) for value in program.graph.inputs)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str, made_by: str) -> gs.Tensor:
        """A tensor that an earlier pass has made.

        Raises:
            InternalError: it is not there.
        """
        if name not in self._tensors:
            raise InternalError(f"tensor {name} is missing; {made_by} has to run first")
        return self._tensors[name]

    def constant(self, name: str, values: npt.NDArray[np.generic]) -> gs.Constant:
        """A constant that stays in the graph; the same name is the same constant."""
        if name not in self._tensors:
            self._tensors[name] = gs.Constant(name, np.asarray(values, order="C"))  # keeps scalars scalar
        return self._tensors[name]

    def ints(self, *values: int) -> gs.Constant:
        """An int64 vector."""
        return self.constant(f"ints.{'_'.join(map(str, values))}", np.array(values, np.int64))

    def integer(self, value: int) -> gs.Constant:
        """An int64 scalar."""
        return self.constant(f"integer.{value}", np.array(value, np.int64))

    def input(self, name: str, dtype: npt.DTypeLike, shape: tuple[Dim, ...]) -> gs.Variable:
        """A new run-time input of the graph."""
        value = gs.Variable(name, np.dtype(dtype), shape)
        self._graph.inputs.append(value)
        self._tensors[name] = value
        return value

    def weight(self, name: str, recipe: WeightRecipe) -> gs.Variable:
        """A new initialiser: a graph input with a recipe."""
        self._program.weights[name] = recipe
        return self.input(name, recipe.dtype, recipe.shape)

    def variable(self, name: str, dtype: npt.DTypeLike, shape: tuple[Dim, ...]) -> gs.Variable:
        """A new tensor for the result of a node."""
        if name in self._tensors:
            raise InternalError(f"the graph already has a tensor {name}")
        self._tensors[name] = gs.Variable(name, np.dtype(dtype), shape)
        return self._tensors[name]

    def node(
        self,
        op: str,
        inputs: list[gs.Tensor],
        name: str,
        dtype: npt.DTypeLike,
        shape: tuple[Dim, ...],
        **attributes: object,
    ) -> gs.Variable:
        """Append a standard node with one result, and return the result."""
        result = self.variable(name, dtype, shape)
        self._graph.nodes.append(gs.Node(op, name=name, attrs=attributes, inputs=inputs, outputs=[result]))
        return result


def replace_uses(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every consumer of `old` read `new`."""
    for consumer in list(old.outputs):
        for position, value in enumerate(consumer.inputs):
            if value is old:
                consumer.inputs[position] = new


def produce(node: gs.Node, outputs: list[gs.Tensor]) -> None:
    """Make `node` the only producer of existing tensors."""
    for value in outputs:
        value.inputs.clear()
    node.outputs = outputs


def tidy(program: Program) -> int:
    """Remove what no graph output needs, weights and their recipes included; sort; return the number of nodes gone."""
    graph = program.graph
    before = len(graph.nodes)
    graph.cleanup()
    used = {value.name for node in graph.nodes for value in node.inputs}
    for name in [name for name in program.weights if name not in used]:
        del program.weights[name]
        graph.inputs = [value for value in graph.inputs if value.name != name]
    sort_nodes(graph)
    return before - len(graph.nodes)


def sort_nodes(graph: gs.Graph) -> None:
    """Topological order that keeps the present order; a node that has to move stands before its first consumer.

    GraphSurgeon's own sort orders by depth, which tears blocks apart, and recurses.
    """
    done: set[int] = set()
    ordered: list[gs.Node] = []
    for root in graph.nodes:
        stack = [root]
        open_: set[int] = set()
        while stack:
            node = stack[-1]
            if id(node) in done:
                stack.pop()
                continue
            waiting = [maker for value in node.inputs for maker in value.inputs if id(maker) not in done]
            if not waiting:
                done.add(id(node))
                ordered.append(stack.pop())
            elif id(node) in open_:
                raise InternalError(f"the graph has a cycle through {node.name}")
            else:
                open_.add(id(node))
                stack.extend(reversed(waiting))
    graph.nodes = ordered
