# SPDX-License-Identifier: Apache-2.0
"""Fits one linear network of style shadow+ to graded labels.

In: inputs of tokens, and for every unit its grade: in how many of three nested tops of all layers (labels "graded"), or
of its own layer ("nested"), it is. Out: a `Network` without ReLU, of low rank, and its error. One score answers all
three questions (ordinal regression): the probability of being in top k is sigmoid(score - offset k), with offsets that
all layers share, so scores of different layers can be compared.

Training starts from a reduced-rank ridge regression of the grades, and takes AdamW steps from there; the epoch that is
best on the held-out positions is kept. Epoch 0 is the odds of the mean, which know no context. The same examples and
options give the same weights (see fit.py about threads).

Letters: M positions, E hidden, P rank, O units, G = 3 grades.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shadowc.sparsity.fit import Examples, Fit, input_spread
from shadowc.sparsity.networks import Network
from shadowc.sparsity.threads import threads_for
from shadowc.spec.progress import NullProgress

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from shadowc.spec.options import TrainOptions
    from shadowc.spec.progress import Progress

    Floats = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.intp]

TOPS = (0.15, 0.4, 0.8)
"""Nested tops as shares of the units that mattered at all (importance above zero), the first the most important."""
LEAST_RATE = 1e-3
RIDGE = 1e-3
"""Of the mean variance of an input."""
WEIGHT_DECAY = 0.01
RATE = 2.0
"""Of `TrainOptions.rate`: the start is good and the network linear."""


def grade_bounds(raw_MLU: Floats) -> Floats:
    """Return the importances [G] at which the tops of all layers together begin, the lowest first."""
    finite_M = np.asarray(np.isfinite(raw_MLU).all(axis=(1, 2)))
    positive = raw_MLU[(raw_MLU > 0) & finite_M[:, None, None]]  # the one copy: scores may be gigabytes
    if not len(positive):
        return np.ones(len(TOPS), np.float32)
    bounds = np.quantile(positive, [1 - top for top in sorted(TOPS, reverse=True)], overwrite_input=True)
    return bounds.astype(np.float32)


def grades_of(raw: Floats, bounds_G: Floats) -> Floats:
    """Return how many of the bounds an importance reaches, 0 to G; NaN stays NaN."""
    grades = np.zeros(raw.shape, np.float32)
    for bound in bounds_G:
        grades += raw >= bound
    grades[~np.isfinite(raw)] = np.nan
    return grades


def nested_grades(raw_MLU: Floats) -> Floats:
    """Return in how many of the tops of its own layer, at its own position, a unit is; NaN stays NaN.

    A unit of importance zero is in none.
    """
    grades = np.zeros(raw_MLU.shape, np.float32)
    for layer in range(raw_MLU.shape[1]):
        raw_MU = raw_MLU[:, layer]
        bounds_GM = np.quantile(raw_MU, [1 - top for top in TOPS], axis=1)
        for bound_M in bounds_GM:
            grades[:, layer] += (raw_MU >= bound_M[:, None]) & (raw_MU > 0)
    grades[~np.isfinite(raw_MLU)] = np.nan
    return grades


def offsets_of(grades_MLU: Floats, rows: Rows | None = None) -> Floats:
    """Return what scores are compared with, [G], from how often each grade is reached; the middle one is 0.

    `rows` are the positions that count; None: all.
    """
    rows = np.arange(len(grades_MLU)) if rows is None else rows
    layers = range(grades_MLU.shape[1])
    total = len(rows) * grades_MLU[0].size
    counts = [sum(np.count_nonzero(grades_MLU[rows, layer] > grade) for layer in layers) for grade in range(len(TOPS))]
    rates = [count / total for count in counts]
    odds = [np.log(rate / (1 - rate)) for rate in np.clip(rates, LEAST_RATE, 1 - LEAST_RATE)]
    return np.array([odds[len(odds) // 2] - one for one in odds], np.float32)


def fit_graded(
    examples: Examples,
    offsets_G: Floats,
    width: int,
    options: TrainOptions,
    seed: int,
    progress: Progress | None = None,
) -> Fit:
    """Train one network of rank `width`; targets of the examples are grades."""
    work = options.batch * width * (examples.inputs_ME.shape[1] + examples.targets_MO.shape[1])
    with threads_for(work):
        return _fit(examples, offsets_G, width, options, seed, progress or NullProgress())


def _fit(
    examples: Examples, offsets_G: Floats, width: int, options: TrainOptions, seed: int, progress: Progress
) -> Fit:
    import torch

    centre_E, spread_E = input_spread(examples.inputs_ME)
    x_ME, held_x_ME = (
        torch.from_numpy((part - centre_E) / spread_E) for part in (examples.inputs_ME, examples.held_inputs_ME)
    )
    y_MO, held_y_MO = torch.from_numpy(examples.targets_MO), torch.from_numpy(examples.held_targets_MO)
    offsets = torch.from_numpy(offsets_G)
    rate_O = (y_MO > len(TOPS) // 2).float().mean(0).clamp(LEAST_RATE, 1 - LEAST_RATE)
    odds_O = (rate_O / (1 - rate_O)).log()
    first = [torch.zeros(width, x_ME.shape[1]), torch.zeros(y_MO.shape[1], width), odds_O]
    weights = [*_low_rank(x_ME, y_MO, width), odds_O.clone()]
    best, mean_error = first, float(_loss(first, held_x_ME, held_y_MO, offsets))
    best_error, best_epoch, curve = mean_error, 0, [mean_error]
    for weight in weights:
        weight.requires_grad_()
    optimiser = torch.optim.AdamW(weights, lr=RATE * options.rate, weight_decay=WEIGHT_DECAY)
    steps = options.epochs * -(-len(x_ME) // options.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(1, options.epochs + 1):
        for rows in torch.split(torch.randperm(len(x_ME), generator=generator), options.batch):
            optimiser.zero_grad()
            _loss(weights, x_ME[rows], y_MO[rows], offsets).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            error = float(_loss(weights, held_x_ME, held_y_MO, offsets))
        curve.append(error)
        if error < best_error:
            best, best_error, best_epoch = [weight.detach().clone() for weight in weights], error, epoch
        progress.advance(epoch, options.epochs, "epochs")
    network = _unscaled([weight.numpy() for weight in best], centre_E, spread_E)
    return Fit(network, best_epoch, best_error, mean_error, tuple(curve))


def _loss(weights: list[Tensor], x_ME: Tensor, grades_MO: Tensor, offsets_G: Tensor) -> Tensor:
    """Return the mean cross entropy in nats over positions, units and grades."""
    from torch.nn import functional as F

    scores_MO = F.linear(F.linear(x_ME, weights[0]), weights[1], weights[2])
    losses = [
        F.binary_cross_entropy_with_logits(scores_MO - offset, (grades_MO > grade).float())
        for grade, offset in enumerate(offsets_G)
    ]
    return sum(losses) / len(losses)  # type: ignore[return-value]


def _low_rank(x_ME: Tensor, y_MO: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return fc1 [P,E] and fc2 [O,P]: the ridge regression of the grades in its main directions, as log odds.

    A grade's slope becomes one of log odds by the variance of the grade, the first step of a logistic regression.
    """
    import torch

    x, y = x_ME.double(), (y_MO - y_MO.mean(0)).double()
    gram_EE = x.T @ x / len(x)
    gram_EE += RIDGE * torch.diagonal(gram_EE).mean() * torch.eye(len(gram_EE), dtype=torch.float64)
    values_E, vectors_EE = torch.linalg.eigh(gram_EE)
    root_EE = vectors_EE * values_E.clamp_min(1e-12).rsqrt() @ vectors_EE.T
    spread_O = y.std(0).clamp_min(0.05)
    left_ER, strength_R, right_RO = torch.linalg.svd(root_EE @ (x.T @ y / len(x)) / spread_O, full_matrices=False)
    kept = min(width, len(strength_R))
    fc1_PE = torch.zeros(width, x.shape[1])
    fc2_OP = torch.zeros(y.shape[1], width)
    fc1_PE[:kept] = (root_EE @ left_ER[:, :kept]).T.float()
    fc2_OP[:, :kept] = (right_RO[:kept].T * strength_R[:kept] / spread_O[:, None].clamp_min(0.3)).float()
    balance = fc1_PE.new_tensor(x.shape[1]).sqrt()  # AdamW moves all numbers alike
    return fc1_PE / balance, fc2_OP * balance


def _unscaled(weights: list[Floats], centre_E: Floats, spread_E: Floats) -> Network:
    """Put the standardisation of the inputs into the weights, in float64."""
    fc1_PE = weights[0].astype(np.float64) / spread_E
    bias_P = -(fc1_PE @ centre_E.astype(np.float64))
    return Network(
        fc1_PE.astype(np.float32), bias_P.astype(np.float32), weights[1], weights[2].astype(np.float32), linear=True
    )
