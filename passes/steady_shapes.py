# SPDX-License-Identifier: Apache-2.0
"""Makes every decode step look alike: no size of an input grows from one step to the next.

Legal cases:
1. `past` and `start`, which the graph derives from the growing attention_mask, become inputs [B] of their own.
2. The sparse tail is all new tokens (Z = S): the slices that cut it out go, and with them sparse_tail and
   mask_scores. A caller that wants dense tokens feeds them with density 1.
3. `scores` and `threshold` are no outputs any more; the operators are their only readers.

A CUDA graph of a step is then captured once. Letters: B batch, S new tokens.
"""

from __future__ import annotations

import numpy as np

from shadowc.passes.surgery import Builder, replace_uses, tidy
from shadowc.spec.density import UNIT_KINDS
from shadowc.spec.errors import InternalError
from shadowc.spec.program import PassReport, Program
from shadowc.spec.tensors import MASK, PAST, START

NAME = "steady_shapes"
TIMES = (PAST, START)
_INNER = ("mask_scores", "scores", "threshold")


def apply(program: Program) -> PassReport:
    """Rewrite inputs, outputs and slices, in place."""
    requires(program)
    counts = {"times": _times_as_inputs(program), "slices": _whole_tail(program), "outputs": _drop_outputs(program)}
    tidy(program)
    program.graph.inputs = [value for value in program.graph.inputs if value.name not in (MASK, "sparse_tail")]
    ensures(program)
    return PassReport(NAME, counts)


def requires(program: Program) -> None:
    """The pass canonicalise has run, and the operators are the only readers of the cache."""
    builder = Builder(program)
    for name in TIMES:
        builder.tensor(name, "canonicalise")
    for layer in range(program.facts.layers):
        if not any(node.name == f"layers.{layer}.attention" for node in program.graph.nodes):
            raise InternalError(f"{NAME}: layer {layer} has no operator; sparsify_attention has to run first")


def ensures(program: Program) -> None:
    """Nothing depends on a mask or on the length of one."""
    names = [value.name for value in program.graph.inputs]
    wrong = [name for name in (MASK, "sparse_tail") if name in names]
    wrong += [name for name in TIMES if names.count(name) != 1]
    if wrong:
        raise InternalError(f"{NAME}: the inputs are not as promised: {', '.join(wrong)}")
    readers = [node.name for node in program.graph.nodes for value in node.inputs if value.name == MASK]
    if readers:
        raise InternalError(f"{NAME}: {readers[0]} still reads {MASK}")


def _times_as_inputs(program: Program) -> int:
    graph, builder = program.graph, Builder(program)
    inputs = {value.name for value in graph.inputs}
    count = 0
    for name in TIMES:
        if name in inputs:
            continue
        value = builder.tensor(name, "canonicalise")
        value.inputs.clear()
        value.dtype, value.shape = np.dtype(np.int64), ("B",)
        graph.inputs.append(value)
        count += 1
    return count


def _whole_tail(program: Program) -> int:
    """Bypass the slices around the predictor's networks: all tokens go in, all scores come out."""
    count, sliced = 0, {"predictor.context", *(f"scores.{kind}" for kind in UNIT_KINDS)}
    for node in program.graph.nodes:
        if node.op != "Slice" or node.outputs[0].name not in sliced:
            continue
        cut, whole = node.outputs[0], node.inputs[0]
        replace_uses(cut, whole)
        name, cut.name = cut.name, f"{cut.name}.cut"
        if name.startswith("scores."):
            whole.name, whole.shape = name, ("B", "S", *whole.shape[2:])
            program.graph.outputs = [value for value in program.graph.outputs if value is not cut]
        count += 1
    for node in program.graph.nodes if count else ():
        for value in node.outputs:
            if value.shape is not None and any(size in ("Y", "Z") for size in value.shape):
                value.shape = tuple("S" if size in ("Y", "Z") else size for size in value.shape)
    return count


def _drop_outputs(program: Program) -> int:
    inner = {f"{part}.{kind}" for part in _INNER for kind in UNIT_KINDS}
    kept = [value for value in program.graph.outputs if value.name not in inner]
    count = len(program.graph.outputs) - len(kept)
    program.graph.outputs = kept
    return count
