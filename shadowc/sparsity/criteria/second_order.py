# SPDX-License-Identifier: Apache-2.0
"""Criteria that read a product of the Hessian with the gradient."""

from __future__ import annotations

from shadowc.sparsity.criteria.registry import Scores, criterion
from shadowc.sparsity.signals import LayerSignals


@criterion("grasp", gradients=True, curvature=True, signed=True)
def grasp(signals: LayerSignals) -> Scores:
    """Heads -sum_i a_i (Hg)_i, neurons -u (Hq): half the slope of ||gradient||^2 when the unit is scaled down. Signed.

    H is the Hessian of the loss in all contexts and all u of all layers together, (g, q) its gradient there; the
    product comes from a second backward pass through the first one.

    Source: GraSP (Wang et al., arXiv 2002.07376), -theta * Hg, with activations for weights, ranked as in ShadowLLM's
    `calculate_grasp`: large is important. (GraSP, which prunes before training, keeps the lowest.) For neurons the
    published code reads the gradients of its first pass, never cleared, in place of the product's.
    """
    curvature_BTHD, curvature_BTF = signals.curvatures()
    return -(curvature_BTHD * signals.context_BTHD).sum(-1), -curvature_BTF * signals.preactivation_BTF
