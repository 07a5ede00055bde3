# SPDX-License-Identifier: Apache-2.0
"""Lets emit permute the neurons of each predicted layer, so that those that fire together share a block.

Legal cases:
1. Blocks of more than one neuron: the recipes of the layer's records, scales and fc1 bias name the layer's order. An
   exact rewrite: the same permutation of fc1's rows, of its bias and of fc2's columns changes no sum but its order.

The graph does not change, only the recipes. Layer 0 is dense and keeps its order.
"""

from __future__ import annotations

from dataclasses import replace

from shadowc.spec.errors import InternalError
from shadowc.spec.program import PassReport, Program

NAME = "cluster_neurons"
_ORDERED = ("w", "scales", "b1")


def apply(program: Program) -> PassReport:
    """Set `order` in the FFN recipes."""
    if program.plan is None or program.plan.block == 1:
        return PassReport(NAME, {"layers": 0}, ("single neurons keep their order: there are no blocks to fill",))
    requires(program)
    count = 0
    for layer in range(1, program.facts.layers):
        for name in _names(layer):
            recipe = program.weights[name]
            if recipe.order == _order(layer):
                continue
            program.weights[name] = replace(recipe, order=_order(layer))
            count += 1
    ensures(program)
    return PassReport(NAME, {"layers": count // len(_ORDERED)})


def requires(program: Program) -> None:
    """The pass sparsify_ffn has run."""
    for layer in range(1, program.facts.layers):
        missing = [name for name in _names(layer) if name not in program.weights]
        if missing:
            raise InternalError(f"{NAME}: layer {layer} has no weight {missing[0]}; sparsify_ffn has to run first")


def ensures(program: Program) -> None:
    """The three recipes of a layer name the same order; no other recipe names one."""
    expected = {name: _order(layer) for layer in range(1, program.facts.layers) for name in _names(layer)}
    for name, recipe in program.weights.items():
        if recipe.order != expected.get(name, ""):
            raise InternalError(f"{NAME}: {name} is in order {recipe.order!r}, expected {expected.get(name, '')!r}")


def _names(layer: int) -> list[str]:
    return [f"layers.{layer}.ffn.{part}" for part in _ORDERED]


def _order(layer: int) -> str:
    return f"predictor.order.{layer}"
