# SPDX-License-Identifier: Apache-2.0
"""Criteria that read activations alone."""

from __future__ import annotations

from shadowc.sparsity.criteria.registry import Scores, criterion
from shadowc.sparsity.signals import LayerSignals


@criterion("l2norm", gradients=False, compares_layers=False)
def l2norm(signals: LayerSignals) -> Scores:
    """Heads ||a||_2, neurons |u|: the size of the activation.

    Source: ShadowLLM, `calculate_l2_norm` (DejaVu ranks heads by the same norm), per token instead of over all tokens.
    Kept as published, with its weakness: u is taken *before* ReLU, so a neuron with a large negative u, which adds
    nothing to the output, ranks high. Use it as a baseline, not for good masks.
    """
    return signals.context_BTHD.norm(dim=-1), signals.preactivation_BTF.abs()


@criterion("activation", gradients=False, compares_layers=False)
def activation(signals: LayerSignals) -> Scores:
    """Heads ||a||_2, neurons |h|: how much the unit says, whatever the loss makes of it.

    Source: DejaVu (arXiv 2310.17157), whose labels are the heads of largest norm and the neurons that ReLU lets pass
    (h > 0); with labels "top" these are its labels, but for neurons a fixed number of a layer instead of all that fire.
    """
    return signals.context_BTHD.norm(dim=-1), signals.hidden_BTF.abs()
