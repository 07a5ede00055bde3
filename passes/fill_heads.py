# SPDX-License-Identifier: Apache-2.0
"""Lets a skipped head leave its mean context behind instead of zero; only biases change, and nothing else is read.

A head's attention weights sum to 1, so a constant that is taken from all its values is taken from its context. The
mean m_h of head h comes off its value bias, and sum_h W_o[:,h] m_h is added to the output projection's bias: with all
heads active the layer computes what it did, and a head that is skipped has put out m_h.

Legal cases:
1. A plan with fill "mean": every predicted layer, in all graphs alike, since they share biases and the K/V cache.
2. A plan with fill "zero" and layer 0: nothing changes.

The product W_o m is taken before the weights are rounded: what rounding does to a head's mean is put right on the way.

Letters: E hidden, H heads, D head size.
"""

from __future__ import annotations

from dataclasses import replace

from shadowc.checkpoint.opt import layer_names
from shadowc.sparsity.means import PREFIX
from shadowc.spec.errors import InternalError
from shadowc.spec.program import PassReport, Program

NAME = "fill_heads"


def apply(program: Program) -> PassReport:
    """Change the recipes of both biases in every predicted layer, in place."""
    requires(program)
    filled = 0
    if program.plan is not None and program.plan.fill == "mean":
        filled = sum(_fill(program, layer) for layer in range(1, program.facts.layers))
    ensures(program)
    zero = program.plan is None or program.plan.fill == "zero"
    return PassReport(NAME, {"layers": filled}, ("skipped heads leave zero",) if zero else ())


def requires(program: Program) -> None:
    """The pass sparsify_attention has run."""
    for layer in range(program.facts.layers):
        if f"layers.{layer}.attention.bqkv" not in program.weights:
            raise InternalError(
                f"{NAME}: layer {layer} has no operator with biases; sparsify_attention has to run first"
            )


def ensures(program: Program) -> None:
    """With fill "mean" both biases of every predicted layer are changed by its own mean; no other is."""
    mean = program.plan is not None and program.plan.fill == "mean"
    for layer in range(program.facts.layers):
        kinds = [program.weights[f"layers.{layer}.attention.{part}"] for part in ("bqkv", "bo")]
        means = [recipe.sources[-1] for recipe in kinds if recipe.kind in ("centred_qkv_bias", "filled_bias")]
        if means != ([mean_name(layer)] * 2 if mean and layer > 0 else []):
            raise InternalError(f"{NAME}: the biases of layer {layer} use the means {', '.join(means) or '(none)'}")


def mean_name(layer: int) -> str:
    """What the means of a model layer's heads [H,D] are called among the predictor's tensors."""
    return f"predictor.{PREFIX}{layer}"


def _fill(program: Program, layer: int) -> bool:
    """Change both recipes; whether they were as sparsify_attention leaves them."""
    weights, mean, out = program.weights, mean_name(layer), layer_names(layer).out
    bqkv, bo = (f"layers.{layer}.attention.{part}" for part in ("bqkv", "bo"))
    if (weights[bqkv].kind, weights[bo].kind) == ("centred_qkv_bias", "filled_bias"):
        return False
    for name, kind in ((bqkv, "qkv_bias"), (bo, "copy")):
        if weights[name].kind != kind:
            raise InternalError(f"{NAME}: {name} is made by {weights[name].kind}, expected {kind}")
    weights[bqkv] = replace(weights[bqkv], kind="centred_qkv_bias", sources=(*weights[bqkv].sources, mean))
    weights[bo] = replace(weights[bo], kind="filled_bias", sources=(out.bias, out.weight, mean))
    return True
