# SPDX-License-Identifier: Apache-2.0
"""A decode graph of the three operators, built by hand from a transformers model, and a driver for it.

The product makes such a graph from a trace; this one is written down directly, so that what the operators mean is
tested without trace, passes and emit. Names of inputs and outputs are those of an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from transformers import OPTForCausalLM

from shadowc.sparsity.predictor import Predictor
from shadowc.spec.nodes import Nodes
from shadowc.spec.ops import DOMAIN, OPS
from shadowc.spec.program import SparsityPlan
from tests.spec.sessions import graph_model, session

Array = npt.NDArray[np.generic]
OP_NAMES = {spec.name for spec in OPS}
NORM_EPSILON = 1e-5


class GraphNodes(Nodes):
    """Nodes of a graph: operators of our domain, and weights as initialisers."""

    def __init__(self) -> None:
        super().__init__()
        self.initialisers: list[onnx.TensorProto] = []

    def add(self, op_type: str, *inputs: str, out: str = "", **attributes: object) -> str:
        result = super().add(op_type, *inputs, out=out, **attributes)
        if op_type in OP_NAMES:
            self.protos[-1].domain = DOMAIN
        return result

    def op(self, op_type: str, *inputs: str, outputs: Sequence[str], **attributes: object) -> None:
        """An operator node, `outputs` in place of the single result."""
        self.add(op_type, *inputs, out=outputs[0], **attributes)
        self.protos[-1].output[:] = outputs

    def weight(self, name: str, value: Array) -> str:
        self.initialisers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name


def build(model: OPTForCausalLM, predictor: Predictor, plan: SparsityPlan, *, kv: str = "all") -> onnx.ModelProto:
    """The graph with operator nodes, `read` outputs included and functions not: for `oracle.attach`."""
    config = model.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    units = {"heads": heads, "neurons": -(-config.ffn_dim // plan.block)}
    state = {name: value.numpy() for name, value in model.state_dict().items()} | predictor.tensors()
    n = GraphNodes()
    residual = _embed(n, state)
    _dense_rows(n, units)
    for layer in range(layers):
        scores = {kind: (f"scores.{kind}", f"threshold.{kind}") for kind in units}
        if layer == 0:
            scores = {kind: (f"dense.scores.{kind}", "dense.threshold") for kind in units}
        residual = _attention(n, state, layer, residual, scores["heads"], heads, kv)
        if layer == 0:
            _predict(n, predictor, plan, layers - 1)
        residual = _ffn(n, state, layer, residual, scores["neurons"], plan.block)
    final = _norm(n, state, "model.decoder.final_layer_norm", residual)
    n.MatMul(final, n.weight("lm_head", state["lm_head.weight"].T), out="logits")
    reads = [f"read.{layer}.{part}" for layer in range(layers) for part in ("attention", "ffn")]
    n.Reshape(n.Concat(*reads, axis=0), n.ints(layers, 2, 2), out="read")
    return graph_model(helper.make_graph(n.protos, "opt", *_interface(config), n.initialisers))


def _embed(n: GraphNodes, state: dict[str, Array]) -> str:
    """Embeddings; and `past`, `start`, `tail` (S') from the masks and shapes."""
    tokens, filled = n.sizes("input_ids", 1, 2), n.sizes("attention_mask", 1, 2)
    n.Expand(n.Sub(filled, tokens), n.sizes("input_ids", 0, 1), out="past")
    n.Sub(filled, n.ReduceSum("attention_mask", n.ints(1), keepdims=0), out="start")
    index_S = n.Range(n.integer(0), n.Squeeze(tokens), n.integer(1))
    slot_BS = n.Add(n.Unsqueeze("past", n.ints(1)), index_S)
    position = n.Max(n.Sub(slot_BS, n.Unsqueeze("start", n.ints(1))), n.integer(-1))
    offset = n.weight("position_offset", np.array(2, np.int64))
    text = n.Gather(n.weight("embed_tokens", state["model.decoder.embed_tokens.weight"]), "input_ids")
    table = n.weight("embed_positions", state["model.decoder.embed_positions.weight"])
    single = n.Cast(n.Equal(tokens, n.ints(1)), to=TensorProto.INT64)
    wanted = n.Where(n.Less("sparse_tail", n.integer(0)), single, "sparse_tail")
    n.Min(wanted, tokens, out="tail")
    return n.Add(text, n.Gather(table, n.Add(position, offset)), out="residual.0")


def _dense_rows(n: GraphNodes, units: dict[str, int]) -> None:
    for kind, count in units.items():
        n.weight(f"dense.scores.{kind}", np.zeros((1, 1, 1, count), np.float32))
    n.weight("dense.threshold", np.full((1, 1, 1), -np.inf, np.float32))


def _norm(n: GraphNodes, state: dict[str, Array], name: str, x: str) -> str:
    weight, bias = (n.weight(f"{name}.{part}", state[f"{name}.{part}"]) for part in ("weight", "bias"))
    return n.LayerNormalization(x, weight, bias, axis=-1, epsilon=NORM_EPSILON)


def _attention(n, state, layer, residual, scores, heads, kv) -> str:
    scope, w = f"model.decoder.layers.{layer}", f"layers.{layer}.attention"

    def per_head(name: str) -> Array:
        value = state[f"{scope}.self_attn.{name}"]
        return value.reshape(heads, len(value) // heads, *value.shape[1:])

    rows = [per_head(f"{part}_proj.weight") for part in "qkv"]
    rows.append(state[f"{scope}.self_attn.out_proj.weight"].T.reshape(rows[0].shape))
    records = np.stack(rows, axis=1)
    n.op(
        "SparseAttention",
        _norm(n, state, f"{scope}.self_attn_layer_norm", residual),
        *scores,
        n.weight(f"{w}.w", records),
        n.weight(f"{w}.scales", np.ones(records.shape[:3], np.float32)),
        n.weight(f"{w}.bqkv", np.stack([per_head(f"{part}_proj.bias") for part in "qkv"], axis=1)),
        n.weight(f"{w}.bo", state[f"{scope}.self_attn.out_proj.bias"]),
        f"past_key_values.{layer}.key",
        f"past_key_values.{layer}.value",
        "start",
        "past",
        outputs=[w, f"present.{layer}.key", f"present.{layer}.value", f"context.{layer}", f"read.{layer}.attention"],
        layer=max(layer - 1, 0),
        kv=kv,
    )
    return n.Add(residual, w)


def _ffn(n, state, layer, residual, scores, block) -> str:
    scope, w = f"model.decoder.layers.{layer}", f"layers.{layer}.ffn"
    order_F = state.get(f"order.{layer}", np.arange(len(state[f"{scope}.fc1.bias"])))  # none for layer 0 and block 1
    records = np.stack([state[f"{scope}.fc1.weight"], state[f"{scope}.fc2.weight"].T], axis=1)[order_F]
    n.op(
        "SparseFFN",
        _norm(n, state, f"{scope}.final_layer_norm", residual),
        *scores,
        n.weight(f"{w}.w", records),
        n.weight(f"{w}.scales", np.ones(records.shape[:2], np.float32)),
        n.weight(f"{w}.b1", state[f"{scope}.fc1.bias"][order_F]),
        n.weight(f"{w}.b2", state[f"{scope}.fc2.bias"]),
        outputs=[w, f"read.{layer}.ffn"],
        layer=max(layer - 1, 0),
        block=block,
    )
    return n.Add(residual, w, out=f"residual.{layer + 1}")


def _predict(n: GraphNodes, predictor: Predictor, plan: SparsityPlan, layers: int) -> None:
    """Scores of the last max(S', 1) tokens, of which the operators get the last S'."""
    rows = n.Max("tail", n.ints(1))
    tokens = n.sizes("input_ids", 1, 2)
    source = n.Slice("context.0", n.Sub(tokens, rows), tokens, n.ints(1))
    low = n.ReduceMin(source, n.ints(-1))
    span = n.Max(n.Sub(n.ReduceMax(source, n.ints(-1)), low), n.float32(1e-12))
    scaled = n.Div(n.Sub(source, low), span, out="predictor.input")
    tensors = predictor.tensors()
    for kind, least in (("heads", plan.min_active_heads), ("neurons", plan.min_active_neurons)):

        def linear(x: str, name: str, kind: str = kind) -> str:
            weight = n.weight(f"predictor.{kind}.{name}.weight", tensors[f"{kind}.{name}.weight"].T)
            return n.Add(n.MatMul(x, weight), n.weight(f"predictor.{kind}.{name}.bias", tensors[f"{kind}.{name}.bias"]))

        flat = linear(n.Relu(linear(scaled, "fc1")), "fc2")
        all_rows = n.Reshape(flat, n.ints(0, 0, layers, -1))
        count = n.sizes(all_rows, 1, 2)
        n.Slice(all_rows, n.ints(-1), count, n.ints(1), out=f"mask_scores.{kind}")
        n.Slice(all_rows, n.Sub(count, "tail"), count, n.ints(1), out=f"scores.{kind}")
        n.op(
            "SelectThreshold",
            f"scores.{kind}",
            f"density_{kind}",
            outputs=[f"threshold.{kind}", f"active.{kind}"],
            scope=plan.scope,
            exempt=plan.exempt or (-1,),
            min_active=least,
        )


def _interface(config) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    size = config.hidden_size // heads
    value = helper.make_tensor_value_info
    caches = [(layer, part) for layer in range(layers) for part in ("key", "value")]
    inputs = [
        value("input_ids", TensorProto.INT64, ["B", "S"]),
        value("attention_mask", TensorProto.INT64, ["B", "P"]),
        *(value(f"past_key_values.{c}.{p}", TensorProto.FLOAT, ["B", heads, "T", size]) for c, p in caches),
        value("density_heads", TensorProto.FLOAT, ["Bh"]),
        value("density_neurons", TensorProto.FLOAT, ["Bn"]),
        value("sparse_tail", TensorProto.INT64, [1]),
    ]
    outputs = [
        value("logits", TensorProto.FLOAT, ["B", "S", config.vocab_size]),
        *(value(f"present.{c}.{p}", TensorProto.FLOAT, ["B", heads, "T", size]) for c, p in caches),
        value("read", TensorProto.INT64, [layers, 2, 2]),
    ]
    for kind in ("heads", "neurons"):
        outputs += [
            value(f"mask_scores.{kind}", TensorProto.FLOAT, ["B", 1, "L", f"N_{kind}"]),
            value(f"scores.{kind}", TensorProto.FLOAT, ["B", "Z", "L", f"N_{kind}"]),
            value(f"threshold.{kind}", TensorProto.FLOAT, ["B", "Z", "L"]),
            value(f"active.{kind}", TensorProto.INT32, ["B", "Z", "L"]),
        ]
    return inputs, outputs


@dataclass
class Decoder:
    """Feeds a graph piece by piece. The cache starts as NaN everywhere: nobody may read what was never written."""

    model: onnx.ModelProto
    rows: int
    capacity: int = 24
    cache: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._session = session(self.model)
        self._outputs = [output.name for output in self._session.get_outputs()]
        for entry in self._session.get_inputs():
            if entry.name.startswith("past_key_values."):
                shape = (self.rows, entry.shape[1], self.capacity, entry.shape[3])
                self.cache[entry.name.removeprefix("past_key_values.")] = np.full(shape, np.nan, np.float32)

    def __call__(
        self, ids: Array, attention_mask: Array, heads: Sequence[float], neurons: Sequence[float], tail: int = -1
    ) -> dict[str, Array]:
        feeds = {
            "input_ids": ids,
            "attention_mask": attention_mask,
            "density_heads": np.array(heads, np.float32),
            "density_neurons": np.array(neurons, np.float32),
            "sparse_tail": np.array([tail], np.int64),
            **{f"past_key_values.{name}": value for name, value in self.cache.items()},
        }
        found = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        self.cache = {name: found[f"present.{name}"] for name in self.cache}
        return found
