# SPDX-License-Identifier: Apache-2.0
"""The checkpoint as the engine rounds it: the weights that the torch side of parity uses.

Written from the parameters' names, not from the packing code, so that a mistake in the packing
(two heads swapped, a wrong transpose) shows up as a difference.

Letters: M tokens, E hidden, L predicted layers, K inner dimension of a product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import ml_dtypes  # noqa: F401 (makes "bfloat16" a numpy type)
import numpy as np

from shadowc.sparsity.networks import LayerNetworks
from shadowc.sparsity.styles import network_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy.typing as npt

    from shadowc.sparsity.networks import Network
    from shadowc.sparsity.predictor import Networks, Predictor
    from shadowc.spec.program import TensorSource

INT8_LIMIT = 127.0
INT4_LIMIT = 7.0
INT4_GROUP = 64
"""Values of a record row that share a scale in int4."""
_PER_ROW = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "fc1.weight")
_PER_COLUMN = ("out_proj.weight", "fc2.weight")
_OUTSIDE = (
    "embed_tokens.weight", "embed_positions.weight", "lm_head.weight", "project_in.weight", "project_out.weight"
)  # fmt: skip
"""Matrices outside the layers that take the type of 16-bit activations."""


def round_to_int8(matrix: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    """Symmetric int8 rounding and back, one scale max|w| / 127 per slice along `axis`; same shape, float32."""
    return _in_steps(matrix, axis, INT8_LIMIT)


def round_to_int4(matrix: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    """Symmetric int4 rounding and back, one scale max|w| / 7 per group of 64 values along `axis`; same shape, float32.

    Args:
        matrix: [rows, columns].
        axis: 0 or 1; 64 divides its length.
    """
    groups = (-1, INT4_GROUP, matrix.shape[1]) if axis == 0 else (matrix.shape[0], -1, INT4_GROUP)
    return _in_steps(matrix.reshape(groups), axis + 1, INT4_LIMIT).reshape(matrix.shape)


def round_to(dtype: str, matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rounding to a 16-bit type and back; same shape, float32."""
    return matrix.astype(np.dtype(dtype)).astype(np.float32)


def _in_steps(values: npt.NDArray[np.float32], axis: int, limit: float) -> npt.NDArray[np.float32]:
    low, high = values.min(axis=axis, keepdims=True), values.max(axis=axis, keepdims=True)
    scale = np.maximum(high, -low) / np.float32(limit)
    scale[scale == 0] = 1
    steps: npt.NDArray[np.float32] = np.asarray(values / scale, dtype=np.float32)  # then in place: it may be a gigabyte
    np.rint(steps, out=steps)
    np.clip(steps, -limit, limit, out=steps)
    steps *= scale
    return steps


_ROUNDINGS: dict[str, Callable[[npt.NDArray[np.float32], int], npt.NDArray[np.float32]]] = {
    "int8": round_to_int8,
    "int4": round_to_int4,
    "bf16": lambda matrix, _: round_to("bfloat16", matrix),
}


@dataclass(frozen=True, slots=True)
class DequantisedSource:
    """A TensorSource whose matrices carry the rounding of an engine's weights.

    Args:
        source: the checkpoint's tensors.
        weights: "bf16", "int8" or "int4", the type of the matrices of attention and FFN.
        head: the LM head is int8 too, whatever they are.
    """

    source: TensorSource
    weights: str = "int8"
    head: bool = True

    def names(self) -> tuple[str, ...]:
        """The names of the checkpoint."""
        return self.source.names()

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """One float32 tensor after rounding and back; tensors that stay float32 pass through."""
        value = self.source.tensor(name)
        if name.endswith(_PER_ROW):
            return _ROUNDINGS[self.weights](value, 1)
        if name.endswith(_PER_COLUMN):
            return _ROUNDINGS[self.weights](value, 0)
        if name == "lm_head.weight" and self.head:
            return round_to_int8(value, 1)
        return value


@dataclass(frozen=True, slots=True)
class FilledSource:
    """A TensorSource whose layers put out heads around their means: the same function, and skipped heads leave these.

    Written as `DequantisedSource` is, from the parameters' names. It comes before any rounding.

    Args:
        source: the checkpoint's tensors.
        means: model layer -> mean context of its heads [H,D]; layers that are not in it stay as they are.
    """

    source: TensorSource
    means: Mapping[int, npt.NDArray[np.float32]]

    def names(self) -> tuple[str, ...]:
        """The names of the checkpoint."""
        return self.source.names()

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """One float32 tensor; of layers with means the bias of v_proj is without them, and out_proj's has them."""
        value = self.source.tensor(name)
        scope, _, parameter = name.partition(".self_attn.")
        if parameter not in ("v_proj.bias", "out_proj.bias"):
            return value
        means_HD = self.means.get(int(scope.rpartition(".")[2]))
        if means_HD is None:
            return value
        if parameter == "v_proj.bias":
            return value - means_HD.reshape(-1)
        weight_EK = self.source.tensor(f"{scope}.self_attn.out_proj.weight")
        moved: npt.NDArray[np.float32] = (value + weight_EK @ means_HD.reshape(-1).astype(np.float64)).astype(
            np.float32
        )
        return moved


def filled_source(source: TensorSource, means: Mapping[int, npt.NDArray[np.float32]]) -> TensorSource:
    """The checkpoint with the means of heads that an engine has; as it is where skipped heads leave zero."""
    return FilledSource(source, means) if means else source


@dataclass(frozen=True, slots=True)
class NarrowSource:
    """A TensorSource whose matrices and embeddings carry the rounding of a 16-bit type; norms and biases do not.

    Args:
        source: the checkpoint's tensors.
        dtype: "float16" or "bfloat16".
        matrices: round the matrices of attention and FFN too (False: they are quantised by another source).
    """

    source: TensorSource
    dtype: str
    matrices: bool = True

    def names(self) -> tuple[str, ...]:
        """The names of the checkpoint."""
        return self.source.names()

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """One float32 tensor after rounding and back; tensors that stay float32 pass through."""
        value = self.source.tensor(name)
        if name.endswith(_OUTSIDE) or (self.matrices and name.endswith((*_PER_ROW, *_PER_COLUMN))):
            return round_to(self.dtype, value)
        return value


def truth_for_tensorrt(source: TensorSource, weights: str) -> TensorSource:
    """The checkpoint as an engine for TensorRT rounds it: 8-bit matrices keep 16-bit embeddings and a float32 rest."""
    if weights == "fp32":
        return source
    if weights == "int8":
        return NarrowSource(DequantisedSource(source, head=False), "float16", matrices=False)
    return NarrowSource(source, {"fp16": "float16", "bf16": "bfloat16"}[weights])


@dataclass(frozen=True, slots=True)
class RoundedPredictor:
    """A predictor with the rounding that every engine but fp32 has: weights are int8 with a scale per row."""

    predictor: Predictor

    def scores(self, inputs: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Scores of heads [M,L,H] and of neuron units [M,L,N], for inputs as `Predictor.scores` takes them."""
        pairs = zip(
            (self.predictor.heads, self.predictor.neurons),
            network_inputs(self.predictor.style, inputs),
            strict=True,
        )
        heads, neurons = (self._scores(part, read) for part, read in pairs)
        return heads, neurons

    def _scores(self, networks: Networks, scaled: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if isinstance(networks, LayerNetworks):
            layers = enumerate(networks.networks)
            return np.stack([_rounded_rows(one)(scaled[:, layer]) for layer, one in layers], axis=1)
        return _rounded_rows(networks)(scaled).reshape(len(scaled), self.predictor.layers, -1)


def _rounded_rows(network: Network) -> Network:
    return replace(
        network,
        fc1_weight_PE=round_to_int8(network.fc1_weight_PE, 1),
        fc2_weight_OP=round_to_int8(network.fc2_weight_OP, 1),
    )
