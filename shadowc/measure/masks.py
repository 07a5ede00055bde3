# SPDX-License-Identifier: Apache-2.0
"""The engine's masks: what they are, and whether they come from the predictor and the density asked for.

Parity A forces them on torch, so it needs to know on its own that they are the right ones.

Letters: B batch, S tokens, Z masked tokens (the last of the S), L predicted layers, N units per layer, H heads,
F neurons, E hidden, M = B * Z.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from shadowc.sparsity.selection import select_calibrated, select_threshold
from shadowc.sparsity.shares import layer_density
from shadowc.spec.density import UNIT_KINDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from shadowc.checkpoint.opt import OptFacts
    from shadowc.spec.density import Density
    from shadowc.spec.program import SparsityPlan

    Float = npt.NDArray[np.float32]

SMALLEST_SCALE = 1e-12
"""Differences are relative to the largest true value, or to this where the truth is all zeros."""


class Scorer(Protocol):
    """What is needed of a predictor."""

    def scores(self, inputs: Float) -> tuple[Float, Float]:
        """Scores of heads [M,L,H] and of neuron units [M,L,N] for inputs as `Predictor.scores`."""


def relative(difference: float, scale: float) -> float:
    """The difference as a share of the scale; NaN in either gives NaN."""
    return float(difference / np.maximum(scale, SMALLEST_SCALE))


def worse(one: float, other: float) -> float:
    """The larger of two differences; NaN is the worst."""
    return max(one, other, key=lambda value: np.inf if np.isnan(value) else value)


def active_units(run: Mapping[str, Float], kind: str) -> npt.NDArray[np.bool_]:
    """The mask [B,Z,L,N] that scores and thresholds of a run mean."""
    return ~(run[f"scores.{kind}"] < run[f"threshold.{kind}"][..., None])


def forced_masks(
    run: Mapping[str, Float], layer: int, facts: OptFacts, block: int, order_F: npt.NDArray[np.int32] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The engine's masks of one model layer, [B,S,H] and [B,S,F], over all tokens and in checkpoint order."""
    rows, tokens = run["residual.0"].shape[:2]
    neurons_BSF = np.ones((rows, tokens, facts.ffn), bool)
    if layer > 0 and "scores.heads" in run:
        units_BZN = active_units(run, "neurons")[:, :, layer - 1]
        packed_BZF = np.repeat(units_BZN, block, axis=2)[:, :, : facts.ffn]
        columns = np.arange(facts.ffn) if order_F is None else order_F
        neurons_BSF[:, tokens - packed_BZF.shape[1] :, columns] = packed_BZF
    return forced_heads(run, layer, facts), torch.from_numpy(neurons_BSF)


def forced_heads(run: Mapping[str, Float], layer: int, facts: OptFacts) -> torch.Tensor:
    """The engine's mask of the heads of one model layer, [B,S,H] over all tokens."""
    rows, tokens = run["residual.0"].shape[:2]
    heads_BSH = np.ones((rows, tokens, facts.heads), bool)
    if layer > 0 and "scores.heads" in run:
        heads_BZH = active_units(run, "heads")[:, :, layer - 1]
        heads_BSH[:, tokens - heads_BZH.shape[1] :] = heads_BZH
    return torch.from_numpy(heads_BSH)


def wrong_selections(run: Mapping[str, Float], plan: SparsityPlan, density: Density, masked: int) -> int:
    """Thresholds [B,Z,L] of both kinds that the scores and the density do not give, or whose count is wrong.

    Args:
        run: outputs of the engine, joined over all steps.
        plan: scope, exempt layers and least active units.
        density: what the engine was asked for.
        masked: tokens that should have had masks; if another number had, every row counts.
    """
    wrong = 0
    for kind, share, least in (
        ("heads", density.heads, plan.min_active_heads),
        ("neurons", density.neurons, plan.min_active_neurons),
    ):
        scores_BZLN = torch.from_numpy(run[f"scores.{kind}"])
        kept, number = torch.tensor([share]), UNIT_KINDS.index(kind)
        if plan.thresholds is not None:
            table = torch.from_numpy(np.array(plan.thresholds[number]))
            wanted = select_calibrated(scores_BZLN, table, kept, exempt=plan.exempt)
        else:
            if plan.shares is not None:
                kept = layer_density(torch.from_numpy(np.array(plan.shares[number])), kept)
            wanted = select_threshold(scores_BZLN, kept, scope=plan.scope, exempt=plan.exempt, min_active=least)
        found = (torch.from_numpy(run[f"{part}.{kind}"]) for part in ("threshold", "active"))
        if scores_BZLN.shape[1] != masked:
            wrong += scores_BZLN.shape[0] * masked * scores_BZLN.shape[2]
        else:
            differ_BZL = [mine != true for mine, true in zip(found, wanted, strict=True)]
            wrong += int((differ_BZL[0] | differ_BZL[1]).sum())
    return wrong


def score_difference(run: Mapping[str, Float], scorer: Scorer, inputs: torch.Tensor, *, held: bool = False) -> float:
    """Largest difference between the engine's scores and the predictor's, over the spread of a layer's true scores.

    Args:
        run: outputs of the engine, joined over all steps.
        scorer: the predictor, with the rounding that the engine's has.
        inputs: as torch has them: the layer-0 attention context before out_proj [B,S,E], or what the attention of
            every predicted layer reads [B,S,L,E], of style shadow+ beside what their FFNs read [B,S,2,L,E].
        held: the token before the masked ones makes the scores of all of them.
    """
    worst = 0.0
    masked = run["scores.heads"].shape[1]
    first = inputs.shape[1] - masked
    tail = inputs[:, first - 1 : first].repeat_interleave(masked, dim=1) if held else inputs[:, first:]
    for kind, wanted_MLN in zip(UNIT_KINDS, scorer.scores(tail.flatten(0, 1).numpy()), strict=True):
        found_MLN = run[f"scores.{kind}"].reshape(wanted_MLN.shape)
        for wanted_MN, found_MN in zip(wanted_MLN.swapaxes(0, 1), found_MLN.swapaxes(0, 1), strict=True):
            worst = worse(worst, relative(float(np.abs(found_MN - wanted_MN).max()), float(np.ptp(wanted_MN))))
    return worst
