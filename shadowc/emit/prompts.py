# SPDX-License-Identifier: Apache-2.0
"""What makes prompts fast in a graph of target cpu, whatever program runs it.

Logits that nobody asks for are left out, and operators may round; where no mask depends on it, int4 tokens do too.
Letters: B rows, S new tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shadowc.spec.ops import DOMAIN, FEW_DIGITS, SPARSE_ATTENTION, SPARSE_FFN
from shadowc.spec.tensors import LOGITS_FROM, scores_of_one_layer

if TYPE_CHECKING:
    import onnx

FREELY, FINELY, FREELY_IN_PROMPTS = 1, 2, 3
"""Values of the attribute FEW_DIGITS."""
_FREELY_FROM = {SPARSE_FFN.name: 3 / 8, SPARSE_ATTENTION.name: 5 / 8}
_INT4_FREELY_FROM = {SPARSE_FFN.name: 4 / 8, SPARSE_ATTENTION.name: 6 / 8}
"""Share of the layers in front of the first that rounds freely where each makes its masks; int4 rounds weights too."""


def give_logits_a_start(model: onnx.ModelProto) -> None:
    """Give the graph a further input LOGITS_FROM [1], default 0: the first token whose logits are computed.

    Below 0 it counts from the end. `logits` is then [B,S-from,V]. A graph that makes no logits stays as it is.
    """
    import onnx

    found = [(at, node) for at, node in enumerate(model.graph.node) if "logits" in node.output]
    if not found:
        return
    at, head = found[0]
    for name, value in ((LOGITS_FROM, 0), ("logits_cut.end", np.iinfo(np.int64).max), ("logits_cut.axis", 1)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), name))
    model.graph.input.append(onnx.helper.make_tensor_value_info(LOGITS_FROM, onnx.TensorProto.INT64, [1]))
    whole, cut = head.input[0], f"{head.input[0]}.cut"
    slicing = onnx.helper.make_node("Slice", [whole, LOGITS_FROM, "logits_cut.end", "logits_cut.axis"], [cut], name=cut)
    head.input[0] = cut
    model.graph.node.insert(at, slicing)


def give_prompts_few_digits(model: onnx.ModelProto) -> None:
    """Let operators compute prompts in blocks that may round (plugins/cpu/panels.h), and int4 tokens with 8 bits.

    Layer 0's attention does not: what it gives decides the masks. Where every layer makes masks of its own (styles
    dejavu and shadow+), what a layer rounds reaches only the masks behind it: the first layers round finely, attention,
    whose rounding changes most masks, in more of them than FFNs; int4 tokens do not round.
    """
    import onnx

    kinds = (SPARSE_ATTENTION.name, SPARSE_FFN.name)
    sparse = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in kinds]
    own = bool(scores_of_one_layer(name for node in model.graph.node for name in node.output))
    layers = sum(node.op_type == SPARSE_ATTENTION.name for node in sparse)
    packed = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.UINT8}
    layer = -1
    for node in sparse:
        layer += node.op_type == SPARSE_ATTENTION.name
        if not own and layer == 0 and node.op_type == SPARSE_ATTENTION.name:
            continue
        int4 = bool(packed & set(node.input))
        share = (_INT4_FREELY_FROM if int4 else _FREELY_FROM)[node.op_type]
        freely = FREELY_IN_PROMPTS if own and int4 else FREELY
        rounding = freely if not own or layer >= share * layers else FINELY
        node.attribute.append(onnx.helper.make_attribute(FEW_DIGITS, rounding))
