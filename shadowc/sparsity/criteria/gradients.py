# SPDX-License-Identifier: Apache-2.0
"""Criteria that read first gradients of the loss with respect to activations."""

from __future__ import annotations

from shadowc.sparsity.criteria.registry import Scores, criterion
from shadowc.sparsity.signals import LayerSignals


@criterion("plainact", gradients=True)
def plainact(signals: LayerSignals) -> Scores:
    """Heads |sum_i g_i a_i|, neurons |q u|: the first-order change of the loss when the unit is set to zero.

    Source: ShadowLLM (arXiv 2406.16635), `calculate_plainact`, there summed over the tokens of a sample; here one
    score per token, since masks are per token. For neurons the published code uses the weights (`plainact_weight`).
    This is its activation form: without the bias, sum_j W_nj G_nj = sum_t q_tn (u_tn - b_n), so both measure the same
    product, and q u also counts the bias, which a skipped neuron loses too. It is zero where ReLU is (q = 0 there): a
    neuron that did not fire does not matter.
    """
    gradient_BTHD, gradient_BTF = signals.gradients()
    heads_BTH = (gradient_BTHD * signals.context_BTHD).sum(-1).abs()
    return heads_BTH, (gradient_BTF * signals.preactivation_BTF).abs()


@criterion("taylor", gradients=True, signed=True)
def taylor(signals: LayerSignals) -> Scores:
    """Heads -sum_i g_i a_i, neurons -q u: plainact with its sign, the change of the loss to first order. Signed.

    Negative: without the unit the loss of this text falls. Which way it goes depends on the tokens that follow, which a
    predictor does not see. Nearly exact for one unit left out alone, it is a poor ranking of units to leave out
    together (docs/results/criteria.md): for study, not for masks.

    Source: the Taylor expansion of Molchanov et al. (arXiv 1611.06440), who take its absolute value. No criterion of
    ShadowLLM keeps the sign of a first-order term.
    """
    gradient_BTHD, gradient_BTF = signals.gradients()
    return -(gradient_BTHD * signals.context_BTHD).sum(-1), -gradient_BTF * signals.preactivation_BTF


@criterion("gradnorm", gradients=True)
def gradnorm(signals: LayerSignals) -> Scores:
    """Heads ||g||_2, neurons |q|: how steeply the loss depends on what the unit says.

    Source: ShadowLLM, `calculate_grad_norm`, per token instead of over all tokens. For neurons the published code takes
    the norm of the gradient of the fc1 row; of a single token that is |q| ||x||, the same ranking within a layer.
    """
    gradient_BTHD, gradient_BTF = signals.gradients()
    return gradient_BTHD.norm(dim=-1), gradient_BTF.abs()


@criterion("fisher", gradients=True)
def fisher(signals: LayerSignals) -> Scores:
    """Heads sum_i (g_i a_i)^2, neurons (q u)^2: the diagonal of the empirical Fisher information of mask variables.

    Source: ShadowLLM, `calculate_fisher`, there the mean over the tokens of a sample (after Theis et al., arXiv
    1801.05787, whose mask variable is one for all d numbers of a head: its square is plainact's). Of one token the
    neurons rank as with plainact; over several tokens the large ones count for more. Squares of small gradients
    underflow in half precision: half of the published head scores are zero.
    """
    gradient_BTHD, gradient_BTF = signals.gradients()
    return (gradient_BTHD * signals.context_BTHD).square().sum(-1), (gradient_BTF * signals.preactivation_BTF).square()


@criterion("snip", gradients=True, per="sequence")
def snip(signals: LayerSignals) -> Scores:
    """Heads |sum_t sum_i g_ti a_ti|, neurons |sum_t q_t u_t|: |dLoss/dc| of a mask c = 1 on the unit at all tokens.

    Source: SNIP (Lee et al., arXiv 1810.02340), connection sensitivity, with heads and neurons for connections; one
    score a sequence. ShadowLLM's `calculate_snip` means to do this, but its mask reaches only the cache that is
    returned, and what it sums is the gradient of the attention's output and of fc1's, without the activation.
    """
    gradient_BTHD, gradient_BTF = signals.gradients()
    heads_BH = (gradient_BTHD * signals.context_BTHD).sum((1, 3)).abs()
    return heads_BH, (gradient_BTF * signals.preactivation_BTF).sum(1).abs()
