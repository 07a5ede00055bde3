# SPDX-License-Identifier: Apache-2.0
"""Criteria: how important a head or a neuron was. One small function each; importing the package registers all."""

from __future__ import annotations

from shadowc.sparsity.criteria import activations, aggregates, gradients, second_order, weights
from shadowc.sparsity.criteria.registry import (
    Criterion,
    Per,
    Scores,
    TextScores,
    criterion,
    criterion_names,
    find_criterion,
    require_trainable,
)

__all__ = [
    "Criterion",
    "Per",
    "Scores",
    "TextScores",
    "activations",
    "aggregates",
    "criterion",
    "criterion_names",
    "find_criterion",
    "gradients",
    "require_trainable",
    "second_order",
    "weights",
]
