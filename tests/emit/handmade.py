# SPDX-License-Identifier: Apache-2.0
"""A final graph written by hand, as the passes are to leave it: emit and runtime are tested without a trace.

Letters: B batch, S new tokens, P slots of the mask, Z masked tokens, T cache capacity, E hidden, H heads, D head
size, F neurons, N units of neurons, L predicted layers, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper

from shadowc.checkpoint.opt import EMBEDDING, FINAL_NORM, HEAD, POSITIONS, OptFacts, layer_names
from shadowc.spec.ops import DOMAIN, INT4_GROUP, MATMUL_ROWS
from shadowc.spec.program import Program, SparsityPlan, WeightRecipe

WIDTH = 24
RECORDS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "int4": "uint8"}


class Tensors:
    """A TensorSource over a dictionary."""

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        self.values = values

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.values))

    def tensor(self, name: str) -> np.ndarray:
        return self.values[name]


def predictor_tensors(facts: OptFacts, block: int, seed: int = 1) -> dict[str, np.ndarray]:
    """A random predictor under the names of a trained one, with neuron orders where units are blocks."""
    rng = np.random.default_rng(seed)
    units = {"heads": facts.heads, "neurons": -(-facts.ffn // block)}
    tensors: dict[str, np.ndarray] = {}
    for kind, count in units.items():
        shapes = {"fc1.weight": (WIDTH, facts.hidden), "fc1.bias": (WIDTH,)}
        shapes |= {"fc2.weight": (facts.predicted_layers * count, WIDTH), "fc2.bias": (facts.predicted_layers * count,)}
        tensors |= {
            f"predictor.{kind}.{name}": rng.standard_normal(shape, dtype=np.float32) / 2
            for name, shape in shapes.items()
        }
    if block > 1:
        for layer in range(1, facts.layers):
            tensors[f"predictor.order.{layer}"] = rng.permutation(facts.ffn).astype(np.int32)
    return tensors


class Builder:
    """Collects nodes, inputs, recipes; `program` makes the final Program."""

    def __init__(self, facts: OptFacts, *, block: int, kind: str, sparse: bool, skip_zeros: bool) -> None:
        self.facts, self.block, self.kind, self.sparse, self.skip_zeros = facts, block, kind, sparse, skip_zeros
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.weights: dict[str, WeightRecipe] = {}

    def node(self, op: str, inputs: list[str], outputs: list[str] | str, **attributes: Any) -> str:
        names = [outputs] if isinstance(outputs, str) else outputs
        self.nodes.append(helper.make_node(op, inputs, names, name=attributes.pop("name", names[0]), **attributes))
        return names[0]

    def const(self, name: str, value: Any, dtype: Any = np.int64) -> str:
        self.constants[name] = np.array(value, dtype)
        return name

    def weight(self, name: str, kind: Any, sources: tuple[str, ...], shape: tuple[int, ...], **more: Any) -> str:
        self.weights[name] = WeightRecipe(kind, sources, shape, **more)
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(self.weights[name].dtype))
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def records(
        self, part: str, family: str, sources: tuple[str, ...], shape: tuple[int, ...], order: str = ""
    ) -> list[str]:
        """Records and scales of one operator, in the type that is built."""
        more: dict[str, Any] = {"order": order, "quantised": self.kind in ("int8", "int4")}
        rows, width = shape[:-1], shape[-1]
        scales = rows
        if self.kind == "int4":
            more["block"] = INT4_GROUP
            shape, scales = (*rows, width // 2), (*rows, width // INT4_GROUP)
        return [
            self.weight(f"{part}.w", f"{family}_records", sources, shape, dtype=RECORDS[self.kind], **more),
            self.weight(f"{part}.scales", f"{family}_scales", sources, scales, **more),
        ]

    def copy(self, name: str, *shape: int) -> str:
        return self.weight(name, "copy", (name,), shape)

    def norm(self, x: str, scope: str, out: str) -> str:
        names = [self.copy(f"{scope}.{part}", self.facts.hidden) for part in ("weight", "bias")]
        return self.node("LayerNormalization", [x, *names], out, axis=-1, epsilon=self.facts.norm_eps)

    def program(self) -> Program:
        facts, units = self.facts, -(-self.facts.ffn // self.block)
        E, H, D, V = facts.hidden, facts.heads, facts.head_size, facts.vocab
        for name, shape in (("input_ids", ["B", "S"]), ("attention_mask", ["B", "P"])):
            self.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, shape))
        self._positions()
        self.node("Gather", [self.copy(EMBEDDING, V, E), "input_ids"], "words")
        self.node("Gather", [self.copy(POSITIONS, facts.positions + facts.position_offset, E), "position"], "places")
        residual = self.node("Add", ["words", "places"], "residual.0")
        self.const("dense.scores.heads", np.zeros((1, 1, 1, H)), np.float32)
        self.const("dense.scores.neurons", np.zeros((1, 1, 1, units)), np.float32)
        self.const("dense.threshold", np.full((1, 1, 1), -np.inf), np.float32)
        reads: list[str] = []
        self.outputs.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "S", V]))
        for layer in range(facts.layers):
            for part in ("key", "value"):
                cache = ["B", H, "T", D]
                dtype = TensorProto.FLOAT if self.kind == "fp32" else TensorProto.FLOAT16
                for end, where in (("past_key_values", self.inputs), ("present", self.outputs)):
                    where.append(helper.make_tensor_value_info(f"{end}.{layer}.{part}", dtype, cache))
            residual = self._layer(layer, residual, reads)
            if layer == 0 and self.sparse:
                self._predictor(units)
        self.norm(residual, FINAL_NORM, "final")
        self._head()
        self.node("Concat", reads, "read", axis=0)
        self.outputs.append(helper.make_tensor_value_info("read", TensorProto.INT64, [facts.layers, 2, 2]))
        graph = helper.make_graph(
            self.nodes,
            facts.name,
            self.inputs,
            self.outputs,
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        opsets = [("", 20), (DOMAIN, 1)]
        model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid(*opset) for opset in opsets])
        plan = SparsityPlan(WIDTH, WIDTH, self.block, "global") if self.sparse else None
        return Program(graph=gs.import_onnx(model), facts=facts, weights=self.weights, plan=plan)

    def _positions(self) -> None:
        for name, value in (("zero", 0), ("one", 1), ("lowest", -1)):
            self.const(f"c.{name}", value)
        self.const("c.axis1", [1])
        self.const("c.offset", self.facts.position_offset)
        self.node("Shape", ["input_ids"], "batch", start=0, end=1)
        self.node("Shape", ["input_ids"], "tokens", start=1, end=2)
        self.node("Shape", ["attention_mask"], "slots", start=1, end=2)
        self.node("Sub", ["slots", "tokens"], "past1")
        self.node("Expand", ["past1", "batch"], "past")
        self.node("ReduceSum", ["attention_mask", "c.axis1"], "real", keepdims=0)
        self.node("Sub", ["slots", "real"], "start")
        self.node("Squeeze", ["tokens"], "tokens0")
        self.node("Range", ["c.zero", "tokens0", "c.one"], "new")
        self.node("Unsqueeze", ["past", "c.axis1"], "past_B1")
        self.node("Unsqueeze", ["start", "c.axis1"], "start_B1")
        self.node("Add", ["past_B1", "new"], "slot")
        self.node("Sub", ["slot", "start_B1"], "index")
        self.node("Max", ["index", "c.lowest"], "index0")
        self.node("Add", ["index0", "c.offset"], "position")

    def _layer(self, layer: int, residual: str, reads: list[str]) -> str:
        facts, names = self.facts, layer_names(layer)
        E, H, D, F = facts.hidden, facts.heads, facts.head_size, facts.ffn
        scored = layer > 0 and self.sparse
        at, ffn = f"layers.{layer}.attention", f"layers.{layer}.ffn"
        projections = tuple(names_.weight for names_ in (names.q, names.k, names.v, names.out))
        biases = tuple(names_.bias for names_ in (names.q, names.k, names.v))
        self.norm(residual, names.attention_norm.weight.removesuffix(".weight"), f"{at}.x")
        self.node(
            "SparseAttention",
            [
                f"{at}.x",
                *(("scores.heads", "threshold.heads") if scored else ("dense.scores.heads", "dense.threshold")),
                *self.records(at, "attention", projections, (H, 4, D, E)),
                self.weight(f"{at}.bqkv", "qkv_bias", biases, (H, 3, D)),
                self.weight(f"{at}.bo", "copy", (names.out.bias,), (E,)),
                f"past_key_values.{layer}.key",
                f"past_key_values.{layer}.value",
                "start",
                "past",
            ],
            [f"{at}.y", f"present.{layer}.key", f"present.{layer}.value", f"context.{layer}", f"{at}.read"],
            name=at,
            domain=DOMAIN,
            layer=layer - 1 if scored else 0,
        )
        self.node("Add", [residual, f"{at}.y"], f"middle.{layer}")
        self.norm(f"middle.{layer}", names.ffn_norm.weight.removesuffix(".weight"), f"{ffn}.x")
        order = f"predictor.order.{layer}" if scored and self.block > 1 else ""
        both = (names.fc1.weight, names.fc2.weight)
        self.node(
            "SparseFFN",
            [
                f"{ffn}.x",
                *(("scores.neurons", "threshold.neurons") if scored else ("dense.scores.neurons", "dense.threshold")),
                *self.records(ffn, "ffn", both, (F, 2, E), order),
                self.weight(f"{ffn}.b1", "ffn_bias", (names.fc1.bias,), (F,), order=order),
                self.weight(f"{ffn}.b2", "copy", (names.fc2.bias,), (E,)),
            ],
            [f"{ffn}.y", f"{ffn}.read"],
            name=ffn,
            domain=DOMAIN,
            layer=layer - 1 if scored else 0,
            block=self.block,
            skip_zeros=int(self.skip_zeros),
        )
        for part in (at, ffn):
            self.node("Unsqueeze", [f"{part}.read", self.const("c.axes01", [0, 1])], f"{part}.read3")
        self.node("Concat", [f"{at}.read3", f"{ffn}.read3"], f"layers.{layer}.read", axis=1)
        reads.append(f"layers.{layer}.read")
        return self.node("Add", [f"middle.{layer}", f"{ffn}.y"], f"residual.{layer + 1}")

    def _predictor(self, units: int) -> None:
        facts, L = self.facts, self.facts.predicted_layers
        for name, shape, dtype in (
            ("density_heads", ["Bd"], TensorProto.FLOAT),
            ("density_neurons", ["Bn"], TensorProto.FLOAT),
            ("sparse_tail", [1], TensorProto.INT64),
        ):
            self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        self.const("c.ones", [1])
        self.node("Equal", ["tokens", "c.ones"], "single")
        self.node("Cast", ["single"], "automatic", to=TensorProto.INT64)
        self.node("Less", ["sparse_tail", "c.zero"], "is_automatic")
        self.node("Where", ["is_automatic", "automatic", "sparse_tail"], "asked")
        self.node("Min", ["asked", "tokens"], "tail")
        self.node("Max", ["tail", "c.ones"], "rows")
        self.node("Sub", ["tokens", "rows"], "rows_from")
        self.node("Slice", ["context.0", "rows_from", "tokens", "c.axis1"], "z")
        axis = self.const("c.last", [-1])
        self.node("ReduceMin", ["z", axis], "low")
        self.node("ReduceMax", ["z", axis], "high")
        self.node("Sub", ["high", "low"], "range0")
        self.node("Max", ["range0", self.const("c.tiny", 1e-12, np.float32)], "range")
        self.node("Sub", ["z", "low"], "shifted")
        self.node("Div", ["shifted", "range"], "scaled")
        self.node("Sub", ["rows", "tail"], "tail_from")
        self.node("Sub", ["rows", "c.ones"], "last_from")
        for kind, count in (("heads", facts.heads), ("neurons", units)):
            scope = f"predictor.{kind}"
            x = "scaled"
            for part, ins, outs in (("fc1", facts.hidden, WIDTH), ("fc2", WIDTH, L * count)):
                weight = self.weight(f"{scope}.{part}.weight", "transpose", (f"{scope}.{part}.weight",), (ins, outs))
                self.node("MatMul", [x, weight], f"{scope}.{part}.product")
                x = self.node(
                    "Add", [f"{scope}.{part}.product", self.copy(f"{scope}.{part}.bias", outs)], f"{scope}.{part}.sum"
                )
                x = self.node("Relu", [x], f"{scope}.relu") if part == "fc1" else x
            self.node("Reshape", [x, self.const(f"c.shape.{kind}", [0, 0, L, count])], f"{scope}.rows")
            self.node("Slice", [f"{scope}.rows", "tail_from", "rows", "c.axis1"], f"scores.{kind}")
            self.node("Slice", [f"{scope}.rows", "last_from", "rows", "c.axis1"], f"mask_scores.{kind}")
            self.node(
                "SelectThreshold",
                [f"scores.{kind}", f"density_{kind}"],
                [f"threshold.{kind}", f"active.{kind}"],
                name=f"select.{kind}",
                domain=DOMAIN,
                scope="global",
                exempt=[-1],
                min_active=0,
            )
            for name, dtype, shape in (
                (f"scores.{kind}", TensorProto.FLOAT, ["B", "Z", L, count]),
                (f"mask_scores.{kind}", TensorProto.FLOAT, ["B", 1, L, count]),
                (f"threshold.{kind}", TensorProto.FLOAT, ["B", "Z", L]),
                (f"active.{kind}", TensorProto.INT32, ["B", "Z", L]),
            ):
                self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def _head(self) -> None:
        E, V = self.facts.hidden, self.facts.vocab
        if self.kind == "fp32":
            self.node("MatMul", ["final", self.weight("lm_head", "transpose", (HEAD,), (E, V))], "logits")
            return
        rows = self.weight("lm_head", "network_rows", (HEAD,), (V, E), dtype="int8", quantised=True)
        scales = self.weight("lm_head.scales", "network_scales", (HEAD,), (V,), quantised=True)
        self.node(MATMUL_ROWS.name, ["final", rows, scales], "logits", domain=DOMAIN)


def build(
    facts: OptFacts, *, block: int = 16, weights: str = "fp32", sparse: bool = True, skip_zeros: bool = True
) -> Program:
    """The final graph of a model."""
    return Builder(facts, block=block, kind=weights, sparse=sparse, skip_zeros=skip_zeros).program()
