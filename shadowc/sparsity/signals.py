# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N815 - fields carry their shape letters
"""What a criterion sees of a model, whatever its family: what one layer did for a batch of texts, or at some positions.

Letters: B sequences, T tokens, H heads, D head size, F neurons, E hidden; of a text N sequences, R kept positions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from shadowc.spec.errors import InternalError

if TYPE_CHECKING:
    from torch import Tensor

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class NeuronRows:
    """A linear map with a row for every neuron: fc1, or gate and up of a gated FFN."""

    input_BTE: Tensor
    weight_FE: Tensor
    gradient_BTF: Tensor
    """Of what it returns."""


@dataclass(frozen=True, slots=True)
class LayerSignals:
    """One layer's activations, and their gradients if the criterion asked for them.

    A neuron has a value before its activation and one behind it. In OPT they are u (fc1 with its bias) and
    h = max(u, 0), which fc2 reads. A gated neuron has two rows and no single value before its activation: in Llama-type
    models u := h = silu(gate) * up, which down_proj reads, so u and h are the same tensor, and so are their gradients.
    """

    context_BTHD: Tensor
    """a: the attention context of each head, before out_proj or o_proj."""
    preactivation_BTF: Tensor
    """u"""
    hidden_BTF: Tensor
    """h"""
    context_gradient_BTHD: Tensor | None = None
    """g = dLoss/da"""
    preactivation_gradient_BTF: Tensor | None = None
    """q = dLoss/du"""
    hidden_gradient_BTF: Tensor | None = None
    """p = dLoss/dh"""
    context_curvature_BTHD: Tensor | None = None
    """The Hessian of the loss in all contexts and all u of the model together, times its gradient (g, q) there."""
    preactivation_curvature_BTF: Tensor | None = None
    rows: tuple[NeuronRows, ...] | None = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return g and q.

        Raises:
            InternalError: they were not recorded.
        """
        return _recorded(self.context_gradient_BTHD), _recorded(self.preactivation_gradient_BTF)

    def hidden_gradient(self) -> Tensor:
        """Return p.

        Raises:
            InternalError: it was not recorded.
        """
        return _recorded(self.hidden_gradient_BTF)

    def curvatures(self) -> tuple[Tensor, Tensor]:
        """Return the products of Hessian and gradient, at the contexts and at u.

        Raises:
            InternalError: they were not recorded.
        """
        return _recorded(self.context_curvature_BTHD), _recorded(self.preactivation_curvature_BTF)

    def neuron_rows(self) -> tuple[NeuronRows, ...]:
        """Return the linear maps whose rows are the neurons.

        Raises:
            InternalError: they were not recorded.
        """
        return _recorded(self.rows)


@dataclass(frozen=True, slots=True)
class WeightsByUnit:
    """The entries of one layer's weight matrices that belong to one unit alone; no biases."""

    heads_HW: Tensor
    neurons_FW: Tensor


@dataclass(frozen=True, slots=True)
class TextSample:
    """What one layer did at R positions of a text, and what the criterion asked for beside that."""

    layer: int
    heads: int
    neurons: int
    seed: int
    sequence_R: Tensor
    """Ascending; every sequence has as many positions, but for one more here and there."""
    label_R: Tensor
    """The token after the position."""
    context_RHD: Tensor | None = None
    preactivation_RF: Tensor | None = None
    context_gradient_RHD: Tensor | None = None
    weights: WeightsByUnit | None = None

    def context(self) -> Tensor:
        """Return a, [R,H,D].

        Raises:
            InternalError: it was not recorded.
        """
        return _recorded(self.context_RHD)

    def preactivation(self) -> Tensor:
        """Return u, [R,F].

        Raises:
            InternalError: it was not recorded.
        """
        return _recorded(self.preactivation_RF)

    def gradient(self) -> Tensor:
        """Return g, [R,H,D].

        Raises:
            InternalError: it was not recorded.
        """
        return _recorded(self.context_gradient_RHD)

    def unit_weights(self) -> WeightsByUnit:
        """Return the layer's weights by unit.

        Raises:
            InternalError: they were not recorded.
        """
        return _recorded(self.weights)

    def by_sequence(self, values_RUD: Tensor) -> Tensor:
        """Return values with a row for every sequence, [N,T,U,D]; T is the fewest positions that any has."""
        bounds = [0, *((self.sequence_R.diff() != 0).nonzero()[:, 0] + 1).tolist(), len(self.sequence_R)]
        spans = list(itertools.pairwise(bounds))
        length = min(end - begin for begin, end in spans)
        return _stacked([values_RUD[begin : begin + length] for begin, _ in spans])


def _stacked(parts: list[Tensor]) -> Tensor:
    import torch

    return torch.stack(parts)


def _recorded(found: Found | None) -> Found:
    if found is None:
        raise InternalError("a criterion used something that it did not ask for when it was registered")
    return found
