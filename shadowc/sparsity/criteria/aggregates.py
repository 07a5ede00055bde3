# SPDX-License-Identifier: Apache-2.0
"""Criteria that compare positions or sequences with each other: one ranking for a whole text, and the random one."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from shadowc.sparsity.criteria.registry import TextScores, criterion
from shadowc.sparsity.signals import TextSample
from shadowc.spec.errors import InputError

NUDGE = 1e-5
"""k of the formulas: keeps logarithms and quotients finite."""
DRAWS = 10
DRAWN_ROWS = 200
LEAST_CLASS = 5
"""Rows that share a next token from which on their correlations are counted."""


@criterion("nwot", gradients=False, per="text")
def nwot(sample: TextSample) -> TextScores:
    """Logarithm of det(K + 1), K[m,n] the number of signs in which sequences m and n agree: does it tell texts apart.

    Signs are those of a head's context (T d of them a sequence) and of a neuron's u (T). Identical sequences give
    ln(1 + N K); the 1 keeps neurons that never fire finite, and lowest.

    Source: NWOT (Mellor et al., arXiv 2006.04647), ln |det K|, one unit for a network. ShadowLLM's `calculate_nwot`
    leaves the agreement of positive signs out and takes one sample at a time, which leaves the logarithm of a count.
    """
    neurons_RF1 = sample.preactivation()[..., None]
    return _agreement(sample.by_sequence(sample.context())), _agreement(sample.by_sequence(neurons_RF1))


def _agreement(values_NTUD: Tensor) -> Tensor:
    """Return ln det(K + 1) of every unit, [U]."""
    signs_UNB = (values_NTUD > 0).permute(2, 0, 1, 3).flatten(2).float() * 2 - 1
    bits = signs_UNB.shape[2]
    scores = []
    for at in range(0, len(signs_UNB), 256):
        part_UNB = signs_UNB[at : at + 256]
        agree_UNN = (bits + (part_UNB @ part_UNB.transpose(1, 2)).double()) / 2
        scores.append(torch.logdet(agree_UNN + torch.eye(agree_UNN.shape[1], dtype=torch.float64)))
    return torch.cat(scores).float()


@criterion("jacov", gradients=True, per="text")
def jacov(sample: TextSample) -> TextScores:
    """Heads -sum_v [ln(v + k) + 1 / (v + k)], v the eigenvalues of correlations between rows g_t of a head.

    Rows without a gradient are left out; the mean of 10 draws of 200 rows; k = 1e-5. Of 200 rows of d numbers at most
    d - 1 eigenvalues are not zero; the others would add the same to every head and are left out. Neurons have rows of
    one number, between which there is no correlation: no score.

    Source: jacob_cov (Mellor et al., arXiv 2006.04647v1) in ShadowLLM's `calculate_jacov`, in float64.
    """
    gradient_RHD = sample.gradient().double()
    heads = [_spread(gradient_RHD[:, head], sample.seed) for head in range(gradient_RHD.shape[1])]
    return torch.stack(heads).float(), None


def _spread(gradient_RD: Tensor, seed: int) -> Tensor:
    rows_RD = gradient_RD[gradient_RD.abs().sum(1) > 0]
    wanted = min(DRAWN_ROWS, len(rows_RD))
    if wanted < 2:
        return torch.tensor(-torch.inf, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(DRAWS):
        drawn_R = torch.randperm(len(rows_RD), generator=generator)[:wanted]
        values = torch.linalg.eigvalsh(_correlations(rows_RD[drawn_R])).clamp_min(0)
        values = values[-min(wanted, rows_RD.shape[1] - 1) :]
        found.append(-(torch.log(values + NUDGE) + 1 / (values + NUDGE)).sum())
    return torch.stack(found).mean()


def _correlations(rows_RD: Tensor) -> Tensor:
    """Return the correlations [R,R] between rows."""
    centred_RD = rows_RD - rows_RD.mean(1, keepdim=True)
    scaled_RD = centred_RD / centred_RD.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows_RD.dtype).tiny)
    correlations: Tensor = scaled_RD @ scaled_RD.T
    return correlations


@criterion("epenas", gradients=True, per="text")
def epenas(sample: TextSample) -> TextScores:
    """Heads mean |s_c - s_c'| over pairs of classes; s_c = mean ln(|r| + k) of the correlations r of g_t in class c.

    A class are the positions whose next token is the same, if there are more than four; k = 1e-5. Neurons have rows of
    one number: no score.

    Source: EPE-NAS (Lopes et al., arXiv 2102.08099) in ShadowLLM's `calculate_epenas`. There s_c is a sum over the
    entries of a class, so that classes differ by their size alone; EPE-NAS takes the mean where classes are many.

    Raises:
        InputError: the text has fewer than two such classes.
    """
    counted = Counter(sample.label_R.tolist())
    classes = sorted(label for label, count in counted.items() if count >= LEAST_CLASS)
    if len(classes) < 2:
        raise InputError(
            f"epenas compares positions with the same next token, {LEAST_CLASS} or more of each; "
            f"{len(sample.label_R)} positions have {len(classes)} such tokens, expected 2",
            hint="collect more --positions",
        )
    gradient_RHD = sample.gradient().double()
    members = [torch.nonzero(sample.label_R == label)[:, 0] for label in classes]
    heads = []
    for head in range(gradient_RHD.shape[1]):
        of_classes = [_correlations(gradient_RHD[rows, head]).abs().add(NUDGE).log().mean() for rows in members]
        s_C = torch.stack(of_classes)
        pairs = torch.combinations(s_C)
        heads.append((pairs[:, 0] - pairs[:, 1]).abs().mean())
    return torch.stack(heads).float(), None


@criterion("random", gradients=False, activations=False, per="text")
def random(sample: TextSample) -> TextScores:
    """Heads and neurons uniform in 0..1, drawn once: what any criterion has to beat.

    Source: none; the control. A new draw for every token is the method `random` of `shadowc eval`.
    """
    generator = torch.Generator().manual_seed(1_000_003 * sample.seed + sample.layer)
    return torch.rand(sample.heads, generator=generator), torch.rand(sample.neurons, generator=generator)
