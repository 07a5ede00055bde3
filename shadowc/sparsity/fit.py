# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N815 - fields carry their shape letters
"""Fits one network of a predictor to examples, and keeps the epoch that is best on held-out ones.

In: inputs and targets of tokens. Out: a `Network` and its error. Targets are scores (squared error), or 0 and 1 for
units outside and inside the top of their layer (cross entropy of the logistic function; what the network puts out is
its argument, which ranks the same).

Inputs are standardised and targets centred while training, and both are folded into the weights afterwards, exactly.
Dropout while training. The last matrix starts at zero, so training starts from the mean score, or from the odds of
the mean label: the normalised static ranking, or how often a unit is in the top.

The same examples and options give the same weights. Small networks are trained in one thread (see threads.py); for
large ones all threads work, and then their number decides in which order sums are added.

Letters: M positions, E hidden, P width, O outputs of a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shadowc.sparsity.networks import Network
from shadowc.sparsity.threads import threads_for
from shadowc.spec.progress import NullProgress

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Generator, Tensor

    from shadowc.spec.options import Labels, TrainOptions
    from shadowc.spec.progress import Progress

    Floats = npt.NDArray[np.float32]

WEIGHT_DECAY = 0.1
INPUT_DROPOUT, HIDDEN_DROPOUT = 0.1, 0.5
"""A few thousand positions are few for 100,000 weights. On a partly trained opt-mini dropout lowered the held-out error
of the neuron network by 7 to 11 %; without it the best epoch was one of the first, before the cosine had come down."""
LEAST_SPREAD = 0.1
"""Inputs that vary less than this share of the average one are not blown up further when standardised."""
LEAST_RATE = 1e-3
"""A unit is in the top at least this often, and at most so much less than always, when the odds are taken."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs and targets of one network, training and validation part."""

    inputs_ME: Floats
    targets_MO: Floats
    held_inputs_ME: Floats
    held_targets_MO: Floats


@dataclass(frozen=True, slots=True)
class Fit:
    """A trained network and how it came about."""

    network: Network
    epoch: int
    """The epoch kept; 0 is the mean score."""
    error: float
    """On the held-out positions: mean squared error, or of labels "top" the mean cross entropy in nats."""
    mean_error: float
    """The same for the mean score."""
    curve: tuple[float, ...] = ()
    """The same after every epoch; the mean score's in front."""


def fit(examples: Examples, width: int, options: TrainOptions, seed: int, progress: Progress | None = None) -> Fit:
    """Train one network; return the state of the epoch that is best on the held-out positions."""
    work = options.batch * width * (examples.inputs_ME.shape[1] + examples.targets_MO.shape[1])
    with threads_for(work):
        return _fit(examples, width, options, seed, progress or NullProgress())


def _fit(examples: Examples, width: int, options: TrainOptions, seed: int, progress: Progress) -> Fit:
    import torch

    generator = torch.Generator().manual_seed(seed)
    centre_E, spread_E = input_spread(examples.inputs_ME)
    aim = _Aim.of(examples.targets_MO, options.learned)
    x_ME, held_x_ME = (
        torch.from_numpy((part - centre_E) / spread_E) for part in (examples.inputs_ME, examples.held_inputs_ME)
    )
    y_MO, held_y_MO = (aim.targets(part) for part in (examples.targets_MO, examples.held_targets_MO))
    inputs, outputs = x_ME.shape[1], y_MO.shape[1]
    weights = [
        torch.randn(width, inputs, generator=generator) / math.sqrt(inputs),
        torch.zeros(width),
        torch.zeros(outputs, width),
        torch.zeros(outputs),
    ]
    mean_error = float(aim.loss(torch.zeros_like(held_y_MO), held_y_MO))
    best, best_error, best_epoch = [w.clone() for w in weights], mean_error, 0
    curve = [mean_error]
    steps = -(-len(x_ME) // options.batch)
    step = _stepper(weights, aim, options.rate, options.epochs * steps)
    for epoch in range(1, options.epochs + 1):
        for rows in torch.split(torch.randperm(len(x_ME), generator=generator), options.batch):
            masks = _dropout_masks(generator, len(rows), inputs, width)
            step(x_ME[rows], y_MO[rows], masks)
        with torch.no_grad():
            error = float(aim.loss(_forward(weights, held_x_ME), held_y_MO))
        curve.append(error)
        if error < best_error:
            best, best_error, best_epoch = [w.detach().clone() for w in weights], error, epoch
        progress.advance(epoch, options.epochs, "epochs")
    network = _folded([w.numpy() for w in best], centre_E, spread_E, aim.centre_O, aim.scale)
    return Fit(network, best_epoch, best_error * aim.unit, mean_error * aim.unit, tuple(e * aim.unit for e in curve))


@dataclass(frozen=True, slots=True)
class _Aim:
    """What the outputs of training mean: scores are `centre_O + scale * output`."""

    labels: Labels
    centre_O: Floats
    scale: float

    @staticmethod
    def of(targets_MO: Floats, labels: Labels) -> _Aim:
        """Start from the mean of the targets; of labels, from its odds."""
        mean_O = targets_MO.mean(axis=0, dtype=np.float64)
        if labels == "top":
            rate_O = np.clip(mean_O, LEAST_RATE, 1 - LEAST_RATE)
            return _Aim(labels, np.log(rate_O / (1 - rate_O)).astype(np.float32), 1.0)
        centre_O = mean_O.astype(np.float32)
        scale = float(np.sqrt(np.mean((targets_MO - centre_O) ** 2, dtype=np.float64))) or 1.0
        return _Aim(labels, centre_O, scale)

    @property
    def unit(self) -> float:
        """Factor from the loss to the error in the units of the targets."""
        return self.scale**2

    def targets(self, targets_MO: Floats) -> Tensor:
        """Return what `loss` compares with: labels as they are, scores standardised."""
        import torch

        if self.labels == "top":
            return torch.from_numpy(targets_MO)
        return torch.from_numpy((targets_MO - self.centre_O) / np.float32(self.scale))

    def loss(self, output_MO: Tensor, wanted_MO: Tensor) -> Tensor:
        """Return the mean over positions and outputs."""
        import torch
        from torch.nn import functional as F

        if self.labels == "top":
            return F.binary_cross_entropy_with_logits(output_MO + torch.from_numpy(self.centre_O), wanted_MO)
        return ((output_MO - wanted_MO) ** 2).mean()


Masks = tuple["Tensor", "Tensor"]


def _dropout_masks(generator: Generator, rows: int, inputs: int, width: int) -> Masks:
    """Return factors for the inputs and the hidden units: 0 for those left out, more than 1 for the others."""
    import torch

    shares = ((inputs, 1 - INPUT_DROPOUT), (width, 1 - HIDDEN_DROPOUT))
    kept = [torch.empty(rows, size).bernoulli_(share, generator=generator) / share for size, share in shares]
    return kept[0], kept[1]


def _forward(weights: list[Tensor], x_ME: Tensor, masks: Masks | None = None) -> Tensor:
    from torch.nn import functional as F

    x_ME = x_ME if masks is None else x_ME * masks[0]
    hidden_MP = F.linear(x_ME, weights[0], weights[1]).relu()
    hidden_MP = hidden_MP if masks is None else hidden_MP * masks[1]
    return F.linear(hidden_MP, weights[2], weights[3])


def _stepper(weights: list[Tensor], aim: _Aim, rate: float, steps: int) -> Callable[[Tensor, Tensor, Masks], None]:
    """Return a function that takes one optimiser step on a batch."""
    import torch

    for weight in weights:
        weight.requires_grad_()
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def step(x_ME: Tensor, y_MO: Tensor, masks: Masks) -> None:
        optimiser.zero_grad()
        loss = aim.loss(_forward(weights, x_ME, masks), y_MO)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()

    return step


def input_spread(inputs_ME: Floats) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of every input, the latter bounded from below."""
    centre_E = inputs_ME.mean(axis=0, dtype=np.float64)
    spread_E = inputs_ME.std(axis=0, dtype=np.float64)
    least = max(LEAST_SPREAD * float(spread_E.mean()), 1e-6)
    return centre_E.astype(np.float32), np.maximum(spread_E, least).astype(np.float32)


def _folded(weights: list[Floats], centre_E: Floats, spread_E: Floats, mean_O: Floats, scale: float) -> Network:
    """Put the standardisation of the inputs into fc1 and the scale of the targets into fc2, in float64."""
    fc1_weight_PE = weights[0].astype(np.float64) / spread_E
    return Network(
        fc1_weight_PE.astype(np.float32),
        (weights[1] - fc1_weight_PE @ centre_E.astype(np.float64)).astype(np.float32),
        (weights[2] * np.float64(scale)).astype(np.float32),
        (weights[3] * np.float64(scale) + mean_O).astype(np.float32),
    )
