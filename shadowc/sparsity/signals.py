# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N815 - fields carry their shape letters
"""What one layer did for a batch of texts: all that a criterion sees of a model, whatever its family.

Letters: B sequences, T tokens, H heads, D head size, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shadowc.spec.errors import InternalError

if TYPE_CHECKING:
    from torch import Tensor


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


def _recorded(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise InternalError("a criterion used gradients that it did not ask for when it was registered")
    return gradient
