# SPDX-License-Identifier: Apache-2.0
"""A whole decode graph of the functions, in stock ONNX Runtime, against transformers and the masked torch model.

Then the same comparison with defects planted in the graph, the functions or the cache: each must be noticed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import DynamicCache, OPTForCausalLM

from shadowc.checkpoint.opt import OptFacts
from shadowc.sparsity.predictor import Predictor
from shadowc.sparsity.reference import MaskedModel, MaskedResult
from shadowc.spec import oracle
from shadowc.spec.density import Density
from tests.spec import decode_graph

FP32_TOLERANCE = 2e-5  # absolute, on logits of magnitude 10
DEFECT_FLOOR = 1e-2  # a planted defect moves some logit by at least this much

PROMPT, TEXT, PADS, CAPACITY = 7, 12, 3, 24
DEFAULT_TAIL = -1
PIECES = ((0, PROMPT, DEFAULT_TAIL), *((end - 1, end, DEFAULT_TAIL) for end in range(PROMPT + 1, TEXT + 1)))
GATE_PIECES = ((0, PROMPT + 2, 2), *PIECES[3:])  # the first masked tokens follow dense ones in one call
DENSE = Density(1.0, 1.0)
HALF_AND_FIFTH = (Density(0.5, 0.5), Density(0.2, 0.2))

Array = npt.NDArray[np.generic]


@pytest.fixture(scope="module")
def facts(tiny_model: OPTForCausalLM) -> OptFacts:
    return OptFacts.from_config(tiny_model.config.to_dict(), "opt-tiny")


@pytest.fixture(scope="module")
def text(facts: OptFacts) -> tuple[Array, Array]:
    """Two rows, the second one padded on the left: ids and attention mask."""
    ids = np.random.default_rng(3).integers(4, facts.vocab, (2, TEXT))
    mask = np.ones((2, TEXT), np.int64)
    mask[1, :PADS], ids[1, :PADS] = 0, facts.pad
    return ids, mask


def decode(model: onnx.ModelProto, text, densities=(DENSE, DENSE), pieces=PIECES, between=None):
    """Outputs of the graph for the text in pieces (begin, end, sparse tail), where they have a row per token joined."""
    ids, mask = text
    decoder = decode_graph.Decoder(model, rows=len(ids), capacity=CAPACITY)
    heads, neurons = [d.heads for d in densities], [d.neurons for d in densities]
    found = []
    for begin, end, tail in pieces:
        found.append(decoder(ids[:, begin:end], mask[:, :end], heads, neurons, tail))
        if between:
            between(decoder.cache, end)
    per_token = (
        "logits",
        *(f"{what}.{kind}" for what in ("scores", "threshold", "active") for kind in ("heads", "neurons")),
    )
    return {name: np.concatenate([piece[name] for piece in found], axis=1) for name in per_token}


def largest_difference(logits: Array, expected: Array, attention_mask: Array) -> float:
    """Over the tokens that are no pads; infinite if anything there is not finite."""
    live = attention_mask.astype(bool)
    difference = np.abs(logits - expected)[live].max()
    return float(difference) if np.isfinite(difference) else np.inf


def masked(tiny_model, predictor, plan, text, densities, masked_from=PROMPT) -> MaskedResult:
    return MaskedModel(tiny_model, plan, predictor).logits(*text, density=densities, masked_from=masked_from)


def test_graph_equals_transformers_when_density_is_one(tiny_model: OPTForCausalLM, facts: OptFacts, text) -> None:
    ids, mask = (torch.from_numpy(array) for array in text)
    cache, expected = DynamicCache(), []
    with torch.no_grad():
        for begin, end, _ in PIECES:
            known = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True}
            expected.append(tiny_model(input_ids=ids[:, begin:end], **known).logits.numpy())
    predictor = Predictor.dummy(facts, block=16, width=32)
    graph = oracle.attach(decode_graph.build(tiny_model, predictor, predictor.plan("global")))
    found = decode(graph, text)
    assert largest_difference(found["logits"], np.concatenate(expected, axis=1), text[1]) < FP32_TOLERANCE
    assert np.isfinite(found["logits"]).all(), "even pads see no poison"
    assert (found["active.heads"] == facts.heads).all()
    assert (found["active.neurons"] == facts.ffn // 16).all()


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("block", [1, 16, 48])  # 256 neurons: the last block of 48 is short
def test_graph_equals_the_masked_model(tiny_model, facts, text, scope: str, block: int) -> None:
    predictor = Predictor.dummy(facts, block=block, width=32)
    plan = predictor.plan(scope)
    expected = masked(tiny_model, predictor, plan, text, HALF_AND_FIFTH)
    graph = oracle.attach(decode_graph.build(tiny_model, predictor, plan))
    found = decode(graph, text, HALF_AND_FIFTH)
    assert largest_difference(found["logits"], expected.logits.numpy(), text[1]) < FP32_TOLERANCE
    for kind in ("heads", "neurons"):
        active = getattr(expected, f"mask_{kind}").sum(-1).numpy()
        np.testing.assert_array_equal(found[f"active.{kind}"], active)
        scores = getattr(expected, f"scores_{kind}").numpy()
        np.testing.assert_allclose(found[f"scores.{kind}"], scores, atol=FP32_TOLERANCE)


def test_graph_equals_the_masked_model_when_layers_are_exempt_or_have_a_floor(tiny_model, facts, text) -> None:
    predictor = Predictor.dummy(facts, block=16, width=32)
    plan = predictor.plan("global", exempt=(1,), min_active_heads=2, min_active_neurons=3)
    densities = (Density(0.0, 0.0), Density(0.2, 0.1))
    expected = masked(tiny_model, predictor, plan, text, densities)
    found = decode(oracle.attach(decode_graph.build(tiny_model, predictor, plan)), text, densities)
    assert largest_difference(found["logits"], expected.logits.numpy(), text[1]) < FP32_TOLERANCE
    assert (found["active.heads"][0] == [2, facts.heads, 2]).all()
    assert (found["active.neurons"][0] == [3, 16, 3]).all()


@pytest.mark.parametrize(
    ("pieces", "masked_from"),
    [(((0, TEXT, TEXT - PROMPT),), PROMPT), (((0, 5, 99), (5, TEXT, 99)), 0), (((0, 5, 3), (5, TEXT, 3)), None)],
    ids=["last tokens of one call", "all tokens, in pieces", "tail of every piece"],
)
def test_sparse_tail_says_which_tokens_are_masked(tiny_model, facts, text, pieces, masked_from) -> None:
    predictor = Predictor.dummy(facts, block=16, width=32)
    plan = predictor.plan("global")
    found = decode(oracle.attach(decode_graph.build(tiny_model, predictor, plan)), text, HALF_AND_FIFTH, pieces)
    if masked_from is not None:
        expected = masked(tiny_model, predictor, plan, text, HALF_AND_FIFTH, masked_from).logits
    else:  # dense, masked, dense, masked: forced masks that are all true where a piece is dense
        free = masked(tiny_model, predictor, plan, text, HALF_AND_FIFTH, masked_from=0)
        masks = free.mask_heads.clone(), free.mask_neurons.clone()
        for mask in masks:
            mask[:, : 5 - 3] = mask[:, 5 : TEXT - 3] = True
        expected = MaskedModel(tiny_model, plan, predictor).logits(*text, density=DENSE, masks=masks).logits
    assert largest_difference(found["logits"], expected.numpy(), text[1]) < FP32_TOLERANCE


def test_kv_active_equals_kv_all_when_the_mask_is_fixed(tiny_model, facts, text) -> None:
    predictor = Predictor.dummy(facts, block=16, width=32)
    for name in ("heads", "neurons"):
        getattr(predictor, name).fc2_weight_OP[:] = 0.0  # scores are the bias: the same for every token
        getattr(predictor, name).fc2_bias_O[:] = np.random.default_rng(5).permutation(
            len(getattr(predictor, name).fc2_bias_O)
        )
    graphs = [decode_graph.build(tiny_model, predictor, predictor.plan("local"), kv=kv) for kv in ("all", "active")]
    every, active = (decode(oracle.attach(graph), text, HALF_AND_FIFTH)["logits"] for graph in graphs)
    assert largest_difference(active, every, text[1]) < FP32_TOLERANCE


# --- planted defects ---------------------------------------------------------------------------------------


def function_node(model: onnx.ModelProto, function: str, output: str) -> onnx.NodeProto:
    """The node of a function that makes a named tensor."""
    body = next(f for f in model.functions if f.name == function)
    return next(node for node in body.node if output in node.output)


def reroute(model: onnx.ModelProto, function: str, old: str, new: str) -> None:
    """Let every reader of one tensor of a function read another."""
    readers = [n for f in model.functions if f.name == function for n in f.node if old in n.input]
    assert readers, f"{function} has no reader of {old}"
    for node in readers:
        node.input[:] = [new if name == old else name for name in node.input]


def edit_weight(model: onnx.ModelProto, name: str, change: Callable[[Array], Array]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))


def past_instead_of_present(model: onnx.ModelProto) -> None:
    reroute(model, "SparseAttention", "present_key", "past_key")
    reroute(model, "SparseAttention", "present_value", "past_value")


def values_of_dead_slots_not_cleared(model: onnx.ModelProto) -> None:
    uncleared = function_node(model, "SparseAttention", "values").input[1]
    reroute(model, "SparseAttention", "values", uncleared)


def left_padding_ignored(model: onnx.ModelProto) -> None:
    sees = function_node(model, "SparseAttention", "seen")
    both = function_node(model, "SparseAttention", sees.input[0])
    both.input[1] = both.input[0]


def head_mask_ignored(model: onnx.ModelProto) -> None:
    masked_context = function_node(model, "SparseAttention", "head_context")
    reroute(model, "SparseAttention", "head_context", masked_context.input[1])


def ffn_mask_ignored(model: onnx.ModelProto) -> None:
    reroute(model, "SparseFFN", "kept", "fired")


def mask_starts_too_early(model: onnx.ModelProto) -> None:
    """The first Z tokens instead of the last."""
    for function in ("SparseFFN", "SparseAttention"):
        joined = function_node(model, function, "unit_mask")
        joined.input[:] = reversed(joined.input)


def density_ignored(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "one"))
    for node in model.graph.node:
        node.input[:] = ["one" if name.startswith("density_") else name for name in node.input]


def densities_swapped(model: onnx.ModelProto) -> None:
    swap = {"density_heads": "density_neurons", "density_neurons": "density_heads"}
    for node in model.graph.node:
        node.input[:] = [swap.get(name, name) for name in node.input]


def scope_ignored(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "scope":
                attribute.s = b"local"


def positions_off_by_one(model: onnx.ModelProto) -> None:
    edit_weight(model, "position_offset", lambda offset: offset + 1)


def heads_swapped(model: onnx.ModelProto) -> None:
    """Two heads of one layer change places in the records but not in the biases."""
    edit_weight(model, "layers.2.attention.w", lambda w: w[[1, 0, 2, 3]])


def neuron_order_lost(model: onnx.ModelProto) -> None:
    """The records of one layer are moved by one neuron, biases too: dense it is the same layer."""
    for part in ("w", "b1"):
        edit_weight(model, f"layers.2.ffn.{part}", lambda rows: np.roll(rows, 8, axis=0))


def layer_off_by_one(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "layer" and attribute.i > 0:
                attribute.i -= 1


def ties_broken(model: onnx.ModelProto) -> None:
    """`score <= threshold` is inactive: one unit too few."""
    for function in ("SparseFFN", "SparseAttention"):
        body = next(f for f in model.functions if f.name == function)
        for node in body.node:
            if node.op_type == "Less" and "scores_of_layer" in node.input:
                node.op_type = "LessOrEqual"


GRAPH_DEFECTS = (
    past_instead_of_present,
    values_of_dead_slots_not_cleared,
    left_padding_ignored,
    head_mask_ignored,
    ffn_mask_ignored,
    mask_starts_too_early,
    density_ignored,
    densities_swapped,
    scope_ignored,
    positions_off_by_one,
    heads_swapped,
    neuron_order_lost,
    layer_off_by_one,
    ties_broken,
)


def stale_key(cache: dict[str, Array], filled: int) -> None:
    """The slot of the newest token still holds the token before it."""
    cache["2.key"][:, :, filled - 1] = cache["2.key"][:, :, filled - 2]


def stale_value(cache: dict[str, Array], filled: int) -> None:
    cache["1.value"][:, :, filled - 1] = cache["1.value"][:, :, filled - 2]


def rows_swapped(cache: dict[str, Array], filled: int) -> None:
    """The cache of one layer serves the wrong row of the batch."""
    cache["3.value"][:] = cache["3.value"][::-1]


CACHE_DEFECTS = (stale_key, stale_value, rows_swapped)


@pytest.fixture(scope="module")
def gate(tiny_model: OPTForCausalLM, facts: OptFacts, text):
    """The comparison under test: how far a graph is from the masked model, two rows of unlike density, global."""
    predictor = Predictor.dummy(facts, block=16, width=32)
    plan = predictor.plan("global")
    densities = (Density(0.5, 0.4), Density(0.25, 0.6))
    expected = masked(tiny_model, predictor, plan, text, densities).logits.numpy()
    sound = oracle.attach(decode_graph.build(tiny_model, predictor, plan))

    def difference(defect: Callable[[onnx.ModelProto], None] | None = None, between=None) -> float:
        model = onnx.ModelProto()
        model.CopyFrom(sound)
        if defect:
            defect(model)
        return largest_difference(decode(model, text, densities, GATE_PIECES, between)["logits"], expected, text[1])

    return difference


def test_gate_is_quiet_when_nothing_is_planted(gate) -> None:
    assert gate() < FP32_TOLERANCE


@pytest.mark.parametrize("defect", GRAPH_DEFECTS, ids=lambda defect: defect.__name__)
def test_gate_notices_a_defect_in_the_graph(gate, defect: Callable[[onnx.ModelProto], None]) -> None:
    assert gate(defect) > DEFECT_FLOOR


@pytest.mark.parametrize("defect", CACHE_DEFECTS, ids=lambda defect: defect.__name__)
def test_gate_notices_a_defect_in_the_cache(gate, defect: Callable[[dict[str, Array], int], None]) -> None:
    assert gate(between=defect) > DEFECT_FLOOR
