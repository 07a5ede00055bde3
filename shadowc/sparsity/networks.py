# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N815 - fields carry their shape letters
"""The networks of a predictor, in numpy: one for all layers (style shadow), or one for each (styles dejavu, shadow+).

Letters: M tokens, E hidden, P width, Lp predicted layers (model layers 1..L-1), U units of a kind per layer,
O outputs of a network, N blocks of neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowc.spec.options import Style
from shadowc.spec.program import SMALLEST_SPAN

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.checkpoint.facts import ModelFacts

    Floats = npt.NDArray[np.float32]

BUDGET = 0.03
"""Share of a dense token's parameters that the predictor may cost."""
WIDTH_STEP = 32
"""ONNX Runtime's products of 8 bits, which style shadow has, take blocks of 32 rows at least; dejavu keeps to it so
that widths of both can be equal."""
SMALL_STEP = 8
ROW_GROUP = 16
SCALE_AND_BIAS = 8
"""Bytes of a row of int8 weights beside its weights."""
LARGEST_WIDTH = 1024
PARTS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


@dataclass(frozen=True, slots=True)
class Network:
    """fc2(relu(fc1(z))), or fc2(fc1(z)) if `linear`: weights as torch.nn.Linear stores them, [out, in]."""

    fc1_weight_PE: Floats
    fc1_bias_P: Floats
    fc2_weight_OP: Floats
    fc2_bias_O: Floats
    linear: bool = False

    @property
    def width(self) -> int:
        """Hidden width P."""
        return int(self.fc1_weight_PE.shape[0])

    @property
    def inputs(self) -> int:
        """Size E of an input."""
        return int(self.fc1_weight_PE.shape[-1])

    @property
    def outputs(self) -> int:
        """Number O of scores."""
        return len(self.fc2_bias_O)

    def __call__(self, input_ME: Floats) -> Floats:
        """Return the scores [M, O] of inputs."""
        scores: Floats = (
            self.activated(input_ME @ self.fc1_weight_PE.T + self.fc1_bias_P) @ self.fc2_weight_OP.T + self.fc2_bias_O
        )
        return scores

    def activated(self, hidden_MP: Floats) -> Floats:
        """Return what fc2 reads of what fc1 gives."""
        return hidden_MP if self.linear else np.maximum(hidden_MP, 0)

    def tensors(self, name: str) -> dict[str, Floats]:
        """Return the four tensors under `name.fc1.weight` and so on."""
        values = (self.fc1_weight_PE, self.fc1_bias_P, self.fc2_weight_OP, self.fc2_bias_O)
        return {f"{name}.{part}": value for part, value in zip(PARTS, values, strict=True)}

    def problems(self, name: str, inputs: int, outputs: int) -> list[str]:
        """Return what is wrong with shapes and numbers, given what there should be."""
        width, found = len(self.fc1_bias_P), []
        shapes = ((width, inputs), (width,), (outputs, width), (outputs,))
        for (key, value), shape in zip(self.tensors(name).items(), shapes, strict=True):
            if value.shape != shape:
                found.append(f"{key} has shape {list(value.shape)}, expected {list(shape)}")
            elif not np.isfinite(value).all():
                found.append(f"{key} has numbers that are not finite")
        return found

    @staticmethod
    def read(tensors: Mapping[str, npt.NDArray[Any]], name: str, *, linear: bool = False) -> Network:
        """Return the network under a name.

        Raises:
            KeyError: a tensor is missing.
        """
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = (tensors[f"{name}.{part}"] for part in PARTS)
        return Network(fc1_weight, fc1_bias, fc2_weight, fc2_bias, linear)

    @staticmethod
    def random(
        generator: np.random.Generator, inputs: int, width: int, outputs: int, *, linear: bool = False
    ) -> Network:
        """Return seeded random weights whose scores differ from token to token."""

        def normal(rows: int, columns: int) -> Floats:
            return generator.standard_normal((rows, columns), dtype=np.float32) / np.float32(np.sqrt(columns))

        fc1_weight_PE = normal(width, inputs)
        zeros = np.zeros
        biases = zeros(width, np.float32), zeros(outputs, np.float32)
        return Network(fc1_weight_PE, biases[0], normal(outputs, width), biases[1], linear)


@dataclass(frozen=True, slots=True)
class LayerNetworks:
    """A network for every predicted layer, each with an input of its own; all of one shape."""

    networks: tuple[Network, ...]

    @property
    def width(self) -> int:
        """Hidden width P of each."""
        return self.networks[0].width

    @property
    def inputs(self) -> int:
        """Size E of an input."""
        return self.networks[0].inputs

    @property
    def outputs(self) -> int:
        """Number Lp * U of scores of all layers."""
        return sum(network.outputs for network in self.networks)

    def tensors(self, name: str) -> dict[str, Floats]:
        """Return the tensors of all layers, under `name.{model layer}.fc1.weight` and so on."""
        made: dict[str, Floats] = {}
        for layer, network in enumerate(self.networks, start=1):
            made |= network.tensors(f"{name}.{layer}")
        return made

    def problems(self, name: str, inputs: int, outputs: int) -> list[str]:
        """As `Network.problems`; `outputs` are those of all layers."""
        share = outputs // len(self.networks)
        numbered = enumerate(self.networks, start=1)
        return [text for layer, one in numbered for text in one.problems(f"{name}.{layer}", inputs, share)]

    @staticmethod
    def read(tensors: Mapping[str, npt.NDArray[Any]], name: str, layers: int, *, linear: bool = False) -> LayerNetworks:
        """Return the networks under a name.

        Raises:
            KeyError: a tensor is missing.
        """
        numbers = range(1, layers + 1)
        return LayerNetworks(tuple(Network.read(tensors, f"{name}.{layer}", linear=linear) for layer in numbers))


def minmax_scaled(context_ME: Floats) -> Floats:
    """Scale each row to 0..1 over its entries, exactly as the engine does."""
    low_M1 = context_ME.min(axis=-1, keepdims=True)
    span_M1 = np.maximum(context_ME.max(axis=-1, keepdims=True) - low_M1, np.float32(SMALLEST_SPAN))
    scaled: Floats = (context_ME - low_M1) / span_M1
    return scaled


def blocks_of(neurons: int, block: int) -> int:
    """Return the number of blocks; the last one may be short."""
    return -(-neurons // block)


def widths(facts: ModelFacts, block: int, width: int, style: Style) -> tuple[int, int]:
    """Return the widths of the networks of heads and of neurons.

    Those of style shadow+ are linear: more width than 32 finds little in as many heads, and none in fewer.
    """
    return (min(facts.heads, WIDTH_STEP) if style == "shadow+" else width), width


def cost_share(facts: ModelFacts, block: int, width: int, style: Style = "shadow") -> float:
    """Return the parameters of a predictor as a share of those that a dense token reads (layers and LM head)."""
    layers = facts.predicted_layers
    readers = 1 if style == "shadow" else layers
    found = 0
    for units, wide in zip((facts.heads, blocks_of(facts.ffn, block)), widths(facts, block, width, style), strict=True):
        found += wide * (readers * (facts.hidden + 1) + layers * units) + layers * units
    return found / facts.token_parameters


def byte_share(facts: ModelFacts, block: int, width: int) -> float:
    """Return the bytes of a predictor of style shadow+ as a share of those of a dense token, in an engine of int8.

    Its weights have a scale for each row (passes/quantise.py), rows of fc2 lie in groups of 16; scales and biases are
    float32. The model counts one byte a parameter, a little less than it is.
    """
    found = 0
    units = facts.heads, blocks_of(facts.ffn, block)
    for outputs, wide in zip(units, widths(facts, block, width, "shadow+"), strict=True):
        fc1 = wide * (facts.hidden + SCALE_AND_BIAS)
        fc2 = -(-outputs // ROW_GROUP) * ROW_GROUP * wide + outputs * SCALE_AND_BIAS
        found += fc1 + fc2
    return facts.predicted_layers * found / facts.token_parameters


def default_width(facts: ModelFacts, block: int, style: Style = "shadow") -> int:
    """Return the largest width, at most 1024, with which a predictor costs at most 3 % of a dense token.

    Counted in parameters, since the predictor is quantised as the model is; of style shadow+ in bytes too, scales and
    biases included. Widths are multiples of 32, those of style shadow+ below 128 of 8: 32 would leave up to half of a
    small model's budget unused. A model whose bytes do not allow 32 gets the largest multiple of 8 below that fits its
    parameters; one that is too small for that, 32, and of style shadow+ 8.
    """
    if style != "shadow+":
        found = range(WIDTH_STEP, LARGEST_WIDTH + 1, WIDTH_STEP)
        return max((width for width in found if cost_share(facts, block, width, style) <= BUDGET), default=WIDTH_STEP)
    fine = 4 * WIDTH_STEP
    widest = (*range(SMALL_STEP, fine, SMALL_STEP), *range(fine, LARGEST_WIDTH + 1, WIDTH_STEP))
    within = [width for width in widest if cost_share(facts, block, width, style) <= BUDGET]
    in_bytes = [width for width in within if width >= WIDTH_STEP and byte_share(facts, block, width) <= BUDGET]
    narrow = [width for width in within if width < WIDTH_STEP]
    return max(in_bytes or narrow, default=SMALL_STEP)
