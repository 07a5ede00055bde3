# SPDX-License-Identifier: Apache-2.0
"""A graph that makes text, one token a call, as one that can go on by itself.

Between two calls Python and ONNX Runtime take some 0.4 ms, because behind hundreds of MB of weights nothing that they
need is in the caches. A chain runs its steps several times instead: the id of the largest logit is the next token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shadowc.spec.ops import DOMAIN, NEXT_TOKEN
from shadowc.spec.tensors import BANNED, COUNTED, END, NEXT, PAST, RUNS, TOKEN

if TYPE_CHECKING:
    import onnx

_IDS, _LOGITS, _ONE = "input_ids", "logits", "runs.one"


@dataclass(frozen=True, slots=True)
class TokenRuns:
    """What a chain of such a graph is told, see plugins/cpu/ort_chain.cc."""

    each: tuple[str, ...]
    """Outputs that have the values of all runs."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the chain reads for it."""
        return (RUNS, END)

    def attributes(self, values: Mapping[str, int]) -> dict[str, int | list[int]]:
        """The chain's attributes; `values`: its numbers of names."""
        carried = {_IDS: NEXT, PAST: f"{PAST}.next", TOKEN: f"{TOKEN}.next"}
        return {
            "times": values[RUNS],
            "carried": [values[name] for pair in carried.items() for name in pair],
            "each": [values[name] for name in self.each],
            "until": [values[NEXT], values[END]],
        }


def add_token_runs(graph: onnx.GraphProto) -> TokenRuns | None:
    """Let the graph choose the next token, and count; None: it is none that makes text and is told where it is."""
    import onnx

    inputs, outputs = {value.name for value in graph.input}, {value.name for value in graph.output}
    read = {name for node in graph.node for name in node.input}
    if not {_IDS, PAST, TOKEN} <= inputs & read or _LOGITS not in outputs:
        return None
    int64, make = onnx.TensorProto.INT64, onnx.helper.make_node
    for name, usual in ((RUNS, [1, 1]), (BANNED, [-1]), (END, [-1])):
        graph.input.append(onnx.helper.make_tensor_value_info(name, int64, [len(usual)]))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(usual), name))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), _ONE))
    graph.node.append(make(NEXT_TOKEN, [_LOGITS, BANNED], [NEXT], NEXT, domain=DOMAIN))
    for name in (PAST, TOKEN):
        graph.node.append(make("Add", [name, _ONE], [f"{name}.next"], f"{name}.next"))
    graph.output.append(onnx.helper.make_tensor_value_info(NEXT, int64, None))
    each = (NEXT, *(name for name in COUNTED if name in outputs))
    for value in (*graph.output, *graph.value_info):
        if value.name in each:
            value.type.tensor_type.ClearField("shape")  # the first size depends on how many runs there are
    return TokenRuns(each)
