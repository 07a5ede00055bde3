# SPDX-License-Identifier: Apache-2.0
"""What a model is asked, under which masks, and what it answers: plain data, the same for torch and engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from shadowc.spec.density import Density
from shadowc.spec.errors import InputError

Protocol = Literal["decode", "prompt", "paper"]
PROTOCOLS: Mapping[Protocol, str] = MappingProxyType(
    {
        "decode": "every token behind the dense prompt under a mask of its own; K/V made under those masks; causal",
        "prompt": "the dense prompt makes one mask for all tokens behind it (of a predictor its last token); causal",
        "paper": "the last token makes one mask for all tokens, those before it included; not causal, to compare only",
    }
)
PROMPT_TOKENS: Mapping[Protocol, int] = MappingProxyType({"decode": 1, "prompt": 16, "paper": 0})
"""Dense tokens that a window of text begins with, unless a call says otherwise."""
ALL = Density()
DENSE = "dense"
"""Method of a setting without masks."""
BY_THRESHOLD = ("calibrated", "sensitivity")
"""Methods whose masks are the predictor's scores against calibrated thresholds."""
LEARNED = ("predictor", *BY_THRESHOLD)
"""Methods that ask the predictor; "predictor" ranks its scores."""


@dataclass(frozen=True, slots=True)
class Request:
    """Token ids of which the last few are to be predicted, each from all before it."""

    ids: tuple[int, ...]
    scored: int
    """The last so many tokens are predicted; at least one, and not the first."""
    prompt: int | None = None
    """Tokens of a prompt, which the rest continues; None: a window of running text."""

    @property
    def inputs(self) -> npt.NDArray[np.int64]:
        """What is fed: all but the last token, which is only predicted; [S]."""
        return np.asarray(self.ids[:-1], np.int64)

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """What is predicted, [scored]."""
        return np.asarray(self.ids[-self.scored :], np.int64)


@dataclass(frozen=True, slots=True)
class Setting:
    """Whose masks, how dense, and by which protocol."""

    method: str = DENSE
    density: Density = ALL
    protocol: Protocol = "decode"
    scope: str = ""
    """local or global; empty: as the predictor or the engine has it."""
    prompt_tokens: int | None = None
    """Dense tokens at the start of every request; None: a prompt is dense as a whole, of a window PROMPT_TOKENS."""

    @property
    def dense(self) -> bool:
        """Whether this is the model without masks."""
        return self.method == DENSE

    @property
    def unmasked(self) -> bool:
        """Whether no unit would be masked: what the dense model answers is the answer."""
        return self.dense or self.density == ALL

    @property
    def key(self) -> str:
        """Equal for settings that give the same answers."""
        if self.unmasked:
            return DENSE
        density = f"{self.density.heads!r}/{self.density.neurons!r}"
        prompt = "" if self.prompt_tokens is None else str(self.prompt_tokens)
        return f"{self.method} {density} {self.protocol} {self.scope} {prompt}".strip()

    def dense_tokens(self, request: Request) -> int:
        """How many tokens of a request are computed without masks; at least one under protocol prompt."""
        whole = len(request.ids) - 1
        if self.dense:
            return whole
        if self.protocol == "paper":
            return 0
        if request.prompt is None:
            wanted = PROMPT_TOKENS[self.protocol] if self.prompt_tokens is None else self.prompt_tokens
        else:
            wanted = request.prompt if self.prompt_tokens is None else min(self.prompt_tokens, request.prompt)
        return min(max(wanted, 1 if self.protocol == "prompt" else 0), whole)

    def under_masks(self, request: Request) -> int:
        """How many of the scored tokens are predicted by a token that was computed under a mask."""
        return min(request.scored, len(request.ids) - 1 - self.dense_tokens(request))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to one request, and what it took."""

    log_probability: float
    """Sum over the scored tokens, in nats."""
    greedy: bool
    """Whether every scored token was the most likely one."""
    masked: int = 0
    """Tokens that were computed under a mask."""
    heads: float = 0.0
    """Sum over the masked tokens of the share of active heads in the predicted layers."""
    neurons: float = 0.0
    """The same for units of neurons."""


def protocol_named(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        InputError: there is none.
    """
    for known in get_args(Protocol):
        if known == name:
            found: Protocol = known
            return found
    raise InputError(f"unknown protocol {name!r}", hint=f"--protocol takes {', '.join(PROTOCOLS)}")


def fitted(ids: tuple[int, ...], scored: int, prompt: int | None, context: int) -> Request:
    """A request of at most context + 1 tokens, the last of which is only predicted; the start of a longer one goes."""
    gone = max(len(ids) - (context + 1), 0)
    return Request(ids[gone:], min(scored, len(ids) - gone - 1), None if prompt is None else max(prompt - gone, 1))
