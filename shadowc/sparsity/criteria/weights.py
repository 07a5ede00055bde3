# SPDX-License-Identifier: Apache-2.0
"""Criteria that read weights."""

from __future__ import annotations

import torch

from shadowc.sparsity.criteria.registry import Scores, TextScores, criterion
from shadowc.sparsity.signals import LayerSignals, TextSample


@criterion("plainact_weight", gradients=True, weights=True, per="sequence")
def plainact_weight(signals: LayerSignals) -> Scores:
    """Heads sum_t |sum_i g_ti a_ti|, neurons sum_j |G_nj W_nj|, G = sum_t q_t x_t^T the gradient of the fc1 weights.

    Source: ShadowLLM, `calculate_plainact` as it is coded: heads by activations, neurons by weights without the bias,
    both once a sample. A neuron of a gated FFN has a row in two matrices; both are summed.
    """
    gradient_BTHD, _ = signals.gradients()
    heads_BH = (gradient_BTHD * signals.context_BTHD).sum(-1).abs().sum(1)
    parts = [
        ((rows.gradient_BTF.transpose(1, 2) @ rows.input_BTE) * rows.weight_FE).abs().sum(-1)
        for rows in signals.neuron_rows()
    ]
    return heads_BH, torch.stack(parts).sum(0)


@criterion("magnitude", gradients=False, activations=False, weights=True, per="text")
def magnitude(sample: TextSample) -> TextScores:
    """Heads and neurons ||w||_2 over the weight matrices' entries that belong to the unit alone; no text is read.

    A head has rows of q, k and v and columns of out_proj (of a query head whose keys are shared: rows of q, columns of
    o_proj), a neuron a row of fc1 and a column of fc2 (gate, up and down).

    Source: pruning by magnitude (Han et al., arXiv 1506.02626), summed over what a unit consists of.
    """
    return sample.unit_weights().heads_HW.norm(dim=-1), sample.unit_weights().neurons_FW.norm(dim=-1)
