# SPDX-License-Identifier: Apache-2.0
"""The optimiser: Muon for the layers' matrices, AdamW for the rest, and the learning-rate schedule.

Muon (momentum, then the nearest orthogonal matrix instead of the gradient) learns more from a token than AdamW,
which matters where tokens are as expensive as on a CPU. All state is in named tensors, so that it can be saved
and loaded without pickle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opt_model import Params

MATRICES = ("qkv", "out", "fc1", "fc2")  # stacked over layers; the last two axes are the matrix
TABLES = ("embed", "position")  # AdamW with weight decay; norms and biases have none
# Coefficients of the quintic Newton-Schulz step; chosen for a steep start, singular values end in about 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True, slots=True)
class Rates:
    """Step sizes and their companions."""

    matrix: float = 0.01
    adam: float = 3e-3
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    matrix_decay: float = 0.03
    table_decay: float = 0.1
    clip: float = 1.0
    warmup_steps: int = 100


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Return a matrix (or a stack of them) near the orthogonal factor of `update`, by Newton-Schulz in bf16."""
    a, b, c = QUINTIC
    x: Tensor = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(update.dtype)


class Optimiser:
    """Holds the moments of each parameter and applies steps in place."""

    def __init__(self, params: Params, rates: Rates) -> None:
        """Start with zero moments."""
        self.rates = rates
        self.state = {f"first.{name}": torch.zeros_like(p) for name, p in params.items()}
        self.state |= {f"second.{name}": torch.zeros_like(p) for name, p in params.items() if name not in MATRICES}

    @torch.no_grad()
    def step(self, params: Params, grads: Params, count: int, scale: float) -> float:
        """Apply step number `count` (from 1) at `scale` times the peak rates; return the gradient's norm."""
        rates = self.rates
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        shrink = min(1.0, rates.clip / (norm + 1e-6))
        for name, p in params.items():
            g = grads[name] * shrink
            if name in MATRICES:
                self._muon(name, p, g, rates.matrix * scale)
            else:
                self._adam(name, p, g, rates.adam * scale, count)
        return norm

    def _muon(self, name: str, p: Tensor, g: Tensor, rate: float) -> None:
        first = self.state[f"first.{name}"]
        first.lerp_(g, 1 - self.rates.momentum)
        update = orthogonalise(g.lerp(first, self.rates.momentum))
        rows, columns = p.shape[-2:]
        p.mul_(1 - rate * self.rates.matrix_decay)
        p.add_(update, alpha=-rate * math.sqrt(max(1.0, rows / columns)))

    def _adam(self, name: str, p: Tensor, g: Tensor, rate: float, count: int) -> None:
        beta1, beta2 = self.rates.betas
        first, second = self.state[f"first.{name}"], self.state[f"second.{name}"]
        first.lerp_(g, 1 - beta1)
        second.lerp_(g.square(), 1 - beta2)
        root = (second / (1 - beta2**count)).sqrt_().add_(1e-8)
        if name in TABLES:
            p.mul_(1 - rate * self.rates.table_decay)
        p.addcdiv_(first / (1 - beta1**count), root, value=-rate)


def schedule(step: int, warmup: int, decay_start: int | None, decay_steps: int) -> float:
    """Return the share of the peak rate at a step (from 0): warm-up, a plateau without end, then 1 - sqrt to 0.

    The plateau lets a run be ended, and a finished run be continued from the state before its decay.
    """
    rise = min(1.0, (step + 1) / warmup)
    if decay_start is None:
        return rise
    return rise * (1.0 - math.sqrt(min(1.0, (step - decay_start + 1) / (decay_steps + 1))))
