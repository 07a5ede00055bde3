# SPDX-License-Identifier: Apache-2.0
"""Criteria: how important a head or a neuron was for one token.

In: what one layer did for a batch of sequences (`LayerSignals`). Out: head scores [B,T,H] and neuron scores
[B,T,F], not negative, larger is more important. A criterion is one small function with the decorator
`criterion`; its docstring holds the formula and where it comes from.

Letters: B sequences, T tokens, H heads, D head size, F neurons, E hidden.
In the formulas a is the attention context of a head before out_proj, g = dLoss/da, u the fc1 output with its
bias before ReLU, q = dLoss/du, h what fc2 reads, p = dLoss/dh; of a gated neuron u := h (signals.py). Loss is the
*sum* of the token losses in float32: a mean, or half precision, pushes small gradients below the smallest number
(statistics of the published fp16 code show such zeros).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from shadowc.sparsity.signals import LayerSignals
from shadowc.spec.errors import InputError, InternalError

if TYPE_CHECKING:
    from torch import Tensor

Scores = tuple["Tensor", "Tensor"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """One registered criterion."""

    name: str
    score: Callable[[LayerSignals], Scores]
    gradients: bool
    """True: needs a backward pass."""

    @property
    def formula(self) -> str:
        """The docstring of the function: formula and source."""
        return (self.score.__doc__ or "").strip()


_REGISTRY: dict[str, Criterion] = {}


def criterion(
    name: str, *, gradients: bool
) -> Callable[[Callable[[LayerSignals], Scores]], Callable[[LayerSignals], Scores]]:
    """Register a function under a name; `gradients` says whether it reads them."""

    def register(score: Callable[[LayerSignals], Scores]) -> Callable[[LayerSignals], Scores]:
        if name in _REGISTRY:
            raise InternalError(f"two criteria are called {name}")
        _REGISTRY[name] = Criterion(name, score, gradients)
        return score

    return register


def criterion_names() -> tuple[str, ...]:
    """All names, sorted."""
    return tuple(sorted(_REGISTRY))


def find_criterion(name: str) -> Criterion:
    """Look a criterion up.

    Raises:
        InputError: there is none of this name; the hint gives the nearest one.
    """
    if name not in _REGISTRY:
        near = get_close_matches(name, _REGISTRY, n=1)
        raise InputError(
            f"unknown criterion {name!r}; known are {', '.join(criterion_names())}",
            hint=f"--criterion {near[0] if near else 'plainact'}",
        )
    return _REGISTRY[name]


@criterion("plainact", gradients=True)
def plainact(signals: LayerSignals) -> Scores:
    """Heads |sum_i g_i a_i|, neurons |q u|: the first-order change of the loss when the unit is set to zero.

    Source: ShadowLLM (arXiv 2406.16635), `calculate_plainact`, there summed over the tokens of a sample; here one
    score per token, since masks are per token. For neurons the published code uses the weights, sum_j |G_nj W_nj|
    over one fc1 row, which exists only summed over tokens. This is its activation form: without the bias,
    sum_j W_nj G_nj = sum_t q_tn (u_tn - b_n), so both measure the same product, and q u also counts the bias, which
    a skipped neuron loses too. It is zero where ReLU is (q = 0 there): a neuron that did not fire does not matter.
    """
    gradient_BTHD, gradient_BTF = signals.gradients()
    heads_BTH = (gradient_BTHD * signals.context_BTHD).sum(-1).abs()
    return heads_BTH, (gradient_BTF * signals.preactivation_BTF).abs()


@criterion("l2norm", gradients=False)
def l2norm(signals: LayerSignals) -> Scores:
    """Heads ||a||_2, neurons |u|: the size of the activation.

    Source: ShadowLLM, `calculate_l2_norm` (DejaVu ranks heads by the same norm), per token instead of over all tokens.
    Kept as published, with its weakness: u is taken *before* ReLU, so a neuron with a large negative u, which adds
    nothing to the output, ranks high. Use it as a baseline, not for good masks.
    """
    return signals.context_BTHD.norm(dim=-1), signals.preactivation_BTF.abs()


@criterion("activation", gradients=False)
def activation(signals: LayerSignals) -> Scores:
    """Heads ||a||_2, neurons |h|: how much the unit says, whatever the loss makes of it.

    Source: DejaVu (arXiv 2310.17157), whose labels are the heads of largest norm and the neurons that ReLU lets pass
    (h > 0); with labels "top" these are its labels, but for neurons a fixed number of a layer instead of all that fire.
    """
    return signals.context_BTHD.norm(dim=-1), signals.hidden_BTF.abs()
