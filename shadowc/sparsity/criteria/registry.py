# SPDX-License-Identifier: Apache-2.0

"""What a criterion reads, what it returns, and the list of all of them.

A criterion says how important a head or a neuron was: larger is more important. It is one small function with the
decorator `criterion`, in a file beside this one; its docstring holds the formula and where it comes from. There are
three kinds, by what one score is of:

- "token": from `LayerSignals`, what one layer did for a batch of sequences, to heads [B,T,H] and neurons [B,T,F].
- "sequence": from the same to heads [B,H] and neurons [B,F]: one score for all tokens of a sequence.
- "text": from `TextSample`, some positions of the whole text, to heads [H] and neurons [F]: one ranking, for controls.
  Either may be None: the formula does not exist for it. No predictor can learn from a single row.

Letters: B sequences, T tokens, H heads, D head size, F neurons, E hidden; of a text N sequences, R kept positions.
In the formulas a is the attention context of a head before out_proj, g = dLoss/da, u the fc1 output with its
bias before ReLU, q = dLoss/du, h what fc2 reads, p = dLoss/dh; of a gated neuron u := h (signals.py). Loss is the
*sum* of the token losses in float32: a mean, or half precision, pushes small gradients below the smallest number
(statistics of the published fp16 code show such zeros).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, get_args

from shadowc.spec.errors import InputError, InternalError

if TYPE_CHECKING:
    from torch import Tensor

Scores = tuple["Tensor", "Tensor"]
TextScores = tuple["Tensor | None", "Tensor | None"]
Per = Literal["token", "sequence", "text"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """One registered criterion."""

    name: str
    score: Callable[[Any], Any]
    """Of `LayerSignals`, or of `TextSample` where there is one score for a whole text."""
    gradients: bool
    """True: needs a backward pass."""
    activations: bool = True
    """False: no text is run."""
    curvature: bool = False
    """True: needs a second backward pass, through the first."""
    weights: bool = False
    """True: reads weights."""
    per: Per = "token"
    """What one score is of."""
    signed: bool = False
    """True: below zero where the loss falls without the unit, which only a text with its next token can tell."""
    compares_layers: bool = True
    """False: sizes of scores say how large a layer's activations are, not how much the layer matters."""

    @property
    def formula(self) -> str:
        """The docstring of the function: formula and source."""
        return (self.score.__doc__ or "").strip()

    @property
    def trains(self) -> bool:
        """Whether a predictor can learn it: its scores differ from position to position, or at least between texts."""
        return self.per != "text"

    @property
    def needs(self) -> tuple[str, ...]:
        """What it reads, in words."""
        backward = "second order" if self.curvature else "gradients" if self.gradients else ""
        needs = ("activations" if self.activations else "", backward, "weights" if self.weights else "")
        return tuple(filter(None, needs))


_REGISTRY: dict[str, Criterion] = {}


def criterion(
    name: str,
    *,
    gradients: bool,
    activations: bool = True,
    curvature: bool = False,
    weights: bool = False,
    per: Per = "token",
    signed: bool = False,
    compares_layers: bool = True,
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register a function under a name, with what it reads and what one of its scores is of, see `Criterion`."""

    def register(score: Callable[[Any], Any]) -> Callable[[Any], Any]:
        if name in _REGISTRY:
            raise InternalError(f"two criteria are called {name}")
        if per not in get_args(Per):
            raise InternalError(f"criterion {name} is per {per!r}, expected one of {', '.join(get_args(Per))}")
        backward = gradients or curvature
        _REGISTRY[name] = Criterion(
            name, score, backward, activations, curvature, weights, per, signed, compares_layers
        )
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


def require_trainable(name: str, per: str) -> None:
    """Refuse to train a predictor from a criterion that ranks the units once for a whole text.

    Raises:
        InputError: it does; what works is named.
    """
    if per == "text":
        able = ", ".join(name for name in criterion_names() if _REGISTRY[name].trains)
        raise InputError(
            f"criterion {name} gives one ranking for a whole text, and a predictor learns what differs between "
            f"tokens; criteria that train one: {able}",
            hint=f"--criterion plainact; the ranking of {name} goes beside it: shadowc train --ranking FOLDER",
        )
