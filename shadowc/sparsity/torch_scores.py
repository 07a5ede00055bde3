# SPDX-License-Identifier: Apache-2.0
"""A predictor's networks in torch, as the masked model runs them.

Letters: B batch, Z masked tokens, E hidden, L predicted layers, N units of a kind per layer.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from shadowc.spec.density import UNIT_KINDS
from shadowc.spec.options import Style
from shadowc.spec.program import SMALLEST_SPAN


class TorchScores:
    """Scores from inputs.

    Args:
        tensors: those of `Predictor.tensors`.
        layers: predicted layers.
        style: of the predictor.
    """

    def __init__(self, tensors: Mapping[str, Tensor], layers: int, style: Style) -> None:
        self._style = style
        self._tensors = tensors
        self._layers = layers

    def of_all_layers(self, context_BZE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of both kinds, [B,Z,L,N], that layer 0's attention context gives (style shadow)."""
        low = context_BZE.amin(-1, keepdim=True)
        scaled = (context_BZE - low) / (context_BZE.amax(-1, keepdim=True) - low).clamp_min(SMALLEST_SPAN)
        heads, neurons = (self._by_layer(self._network(kind, scaled)) for kind in UNIT_KINDS)
        return heads, neurons

    def _by_layer(self, flat: Tensor) -> Tensor:
        """Return [B,Z,L,N]; there may be no token at all."""
        return flat.view(*flat.shape[:2], self._layers, flat.shape[2] // self._layers)

    def of_layer(self, kind: str, layer: int, input_BZE: Tensor) -> Tensor:
        """Return the scores of a kind, [B,Z,1,N], that a model layer's own input gives (styles dejavu, shadow+)."""
        return self._network(f"{kind}.{layer}", input_BZE).unsqueeze(2)

    def _network(self, name: str, input_BZE: Tensor) -> Tensor:
        hidden = self._linear(input_BZE, f"{name}.fc1")
        return self._linear(hidden if self._style == "shadow+" else hidden.relu(), f"{name}.fc2")

    def _linear(self, tensor: Tensor, name: str) -> Tensor:
        return functional.linear(tensor, self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"])
