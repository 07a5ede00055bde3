# SPDX-License-Identifier: Apache-2.0
"""Fits one linear network of style shadow+, of low rank, to an objective.

In: inputs and targets of tokens, and what a score of them is worth (`Objective`: graded.py, expected.py). Out: a
`Network` without ReLU, and its error.

Training starts from a reduced-rank ridge regression of the targets, made flatter if that is better on the held-out
positions, and takes AdamW steps from there; the epoch that is best on these positions is kept. Epoch 0 are scores that
know no context. The same examples and options give the same weights (see fit.py about threads).

Letters: M positions, E hidden, P rank, O units.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

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

RIDGE = 1e-3
"""Of the mean variance of an input."""
WEIGHT_DECAY = 0.01
RATE = 2.0
"""Of `TrainOptions.rate`: the start is good and the network linear."""
START_FACTORS = (0.125, 0.25, 0.5, 1.0)
"""Of the regression's slopes: few positions make them too steep, the more so the more inputs there are. The flattest if
all are so steep that the loss is no number."""


class Objective(Protocol):
    """What scores are to say about targets."""

    def constant(self, targets_MO: Tensor) -> Tensor:
        """Return the best scores [O] that know no context."""
        ...

    def loss(self, scores_MO: Tensor, targets_MO: Tensor) -> Tensor:
        """Return the mean over positions and units."""
        ...

    def spreads(self, targets_MO: Tensor) -> tuple[Tensor, Tensor]:
        """Return by what [O] a unit's regressed target is divided: to weigh it beside others, and to be a score."""
        ...


def fit_linear(
    examples: Examples,
    objective: Objective,
    width: int,
    options: TrainOptions,
    seed: int,
    progress: Progress | None = None,
) -> Fit:
    """Train one network of rank `width`."""
    work = options.batch * width * (examples.inputs_ME.shape[1] + examples.targets_MO.shape[1])
    with threads_for(work):
        return _fit(examples, objective, width, options, seed, progress or NullProgress())


def _fit(
    examples: Examples, objective: Objective, width: int, options: TrainOptions, seed: int, progress: Progress
) -> Fit:
    import torch

    centre_E, spread_E = input_spread(examples.inputs_ME)
    x_ME, held_x_ME = (
        torch.from_numpy((part - centre_E) / spread_E) for part in (examples.inputs_ME, examples.held_inputs_ME)
    )
    y_MO, held_y_MO = torch.from_numpy(examples.targets_MO), torch.from_numpy(examples.held_targets_MO)
    constant_O = objective.constant(y_MO)
    first = [torch.zeros(width, x_ME.shape[1]), torch.zeros(y_MO.shape[1], width), constant_O]
    low_rank = _low_rank(x_ME, y_MO, objective, width)
    weights = _flattened([*low_rank, constant_O], objective, held_x_ME, held_y_MO)
    best, mean_error = first, float(objective.loss(_scores(first, held_x_ME), held_y_MO))
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
            objective.loss(_scores(weights, x_ME[rows]), y_MO[rows]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            error = float(objective.loss(_scores(weights, held_x_ME), held_y_MO))
        curve.append(error)
        if error < best_error:
            best, best_error, best_epoch = [weight.detach().clone() for weight in weights], error, epoch
        progress.advance(epoch, options.epochs, "epochs")
    network = _unscaled([weight.numpy() for weight in best], centre_E, spread_E)
    return Fit(network, best_epoch, best_error, mean_error, tuple(curve))


def _flattened(weights: list[Tensor], objective: Objective, held_x_ME: Tensor, held_y_MO: Tensor) -> list[Tensor]:
    """Return the weights with the slopes that are best on the held-out positions, as tensors of their own."""

    def loss(start: list[Tensor]) -> float:
        found = float(objective.loss(_scores(start, held_x_ME), held_y_MO))
        return found if math.isfinite(found) else math.inf

    fc1_PE, fc2_OP, constant_O = weights
    return min(([fc1_PE, fc2_OP * factor, constant_O.clone()] for factor in START_FACTORS), key=loss)


def _scores(weights: list[Tensor], x_ME: Tensor) -> Tensor:
    from torch.nn import functional as F

    return F.linear(F.linear(x_ME, weights[0]), weights[1], weights[2])


def _low_rank(x_ME: Tensor, y_MO: Tensor, objective: Objective, width: int) -> tuple[Tensor, Tensor]:
    """Return fc1 [P,E] and fc2 [O,P]: the ridge regression of the targets in its main directions, as scores."""
    import torch

    weigh_O, divisor_O = objective.spreads(y_MO)
    x, y = x_ME.double(), (y_MO - y_MO.mean(0)).double()
    gram_EE = x.T @ x / len(x)
    gram_EE += RIDGE * torch.diagonal(gram_EE).mean() * torch.eye(len(gram_EE), dtype=torch.float64)
    values_E, vectors_EE = torch.linalg.eigh(gram_EE)
    root_EE = vectors_EE * values_E.clamp_min(1e-12).rsqrt() @ vectors_EE.T
    slopes_EO = root_EE @ (x.T @ y / len(x)) / weigh_O
    left_ER, strength_R, right_RO = torch.linalg.svd(slopes_EO, full_matrices=False)
    kept = min(width, len(strength_R))
    fc1_PE = torch.zeros(width, x.shape[1])
    fc2_OP = torch.zeros(y.shape[1], width)
    fc1_PE[:kept] = (root_EE @ left_ER[:, :kept]).T.float()
    fc2_OP[:, :kept] = (right_RO[:kept].T * strength_R[:kept] / divisor_O[:, None]).float()
    balance = (_size(fc2_OP) / _size(fc1_PE)).sqrt()  # AdamW moves all numbers alike
    return fc1_PE * balance, fc2_OP / balance


def _size(weight: Tensor) -> Tensor:
    """Return the root of the mean square, not zero."""
    return weight.square().mean().sqrt().clamp_min(1e-12)


def _unscaled(weights: list[Floats], centre_E: Floats, spread_E: Floats) -> Network:
    """Put the standardisation of the inputs into the weights, in float64."""
    fc1_PE = weights[0].astype(np.float64) / spread_E
    bias_P = -(fc1_PE @ centre_E.astype(np.float64))
    return Network(
        fc1_PE.astype(np.float32), bias_P.astype(np.float32), weights[1], weights[2].astype(np.float32), linear=True
    )
