# SPDX-License-Identifier: Apache-2.0
"""What a token reads of the layers' weights under a mask, and so how sparse it really is.

Layer bytes are those of the matrices that belong to heads and neurons, of all layers, layer 0 included; embeddings, LM
head, norms and biases are read in any case and left out on both sides. What a predictor reads counts as read. Zeros of
an activation function that kernels skip come on top and are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shadowc.eval.request import LEARNED

if TYPE_CHECKING:
    from shadowc.eval.request import Setting


@dataclass(frozen=True, slots=True)
class Ledger:
    """Bytes of one model; every layer has as many."""

    layers: int
    attention: float
    """Of a layer's attention."""
    own: float
    """Of `attention`, what an inactive head saves while masks may change from token to token: not its K/V."""
    held: float
    """Of `attention`, what it saves where one mask holds."""
    neurons: float
    """Of a layer's neurons."""
    predictor: float = 0.0
    """Of the predictor, read once for every mask."""
    refresh: int = 0
    """Tokens for which a mask holds under protocol prompt; 0: until the end."""

    @property
    def dense(self) -> float:
        """Bytes of all layers."""
        return self.layers * (self.attention + self.neurons)

    def read(self, setting: Setting, heads: float, neurons: float) -> float:
        """Bytes that a masked token reads on average.

        Args:
            setting: whose masks they are, and whether each token has one.
            heads: share of the heads of the predicted layers that are active.
            neurons: the same of neurons.
        """
        every = 1 if setting.protocol == "decode" else self.refresh
        saved = self.own if every else self.held  # a later mask may need the K/V of a head that this one skips
        masked = self.attention - (1 - heads) * saved + neurons * self.neurons
        asked = self.predictor / every if every and setting.method in LEARNED else 0.0
        return self.attention + self.neurons + (self.layers - 1) * masked + asked

    def sparsity(self, setting: Setting, heads: float, neurons: float) -> float:
        """Effective sparsity: the share of a dense token's layer bytes that a masked token does not read."""
        return 1.0 - self.read(setting, heads, neurons) / self.dense
