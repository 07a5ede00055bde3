# SPDX-License-Identifier: Apache-2.0
"""What a model is evaluated on: requests in items, and the figures that their outcomes give."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from shadowc.eval.request import Request

if TYPE_CHECKING:
    from shadowc.eval.metric import Metric
    from shadowc.eval.request import Outcome, Setting


@dataclass(frozen=True, slots=True)
class Item:
    """What is computed, and kept, together: a window of a text, or an example with its choices."""

    document: int
    requests: tuple[Request, ...]

    @property
    def tokens(self) -> int:
        """That are fed."""
        return sum(len(request.ids) - 1 for request in self.requests)


class Described(Protocol):
    """What tables and pictures say of a corpus; the requests themselves need not be there."""

    @property
    def name(self) -> str:
        """Of the text's file, or of the task and its shots."""

    @property
    def sha256(self) -> str:
        """Of the file."""

    @property
    def key(self) -> str:
        """Equal for equal requests."""

    @property
    def facts(self) -> Mapping[str, str | int]:
        """What a report says of it, by name."""


class Corpus(ABC):
    """Requests and what becomes of their outcomes."""

    name: str
    """Of the text's file, or of the task and its shots."""
    sha256: str
    """Of the file."""
    items: tuple[Item, ...]

    @cached_property
    def key(self) -> str:
        """Equal for equal requests: text, tokenizer, windows, prompts and shots are in it."""
        state = hashlib.sha256(self.name.encode())
        for item in self.items:
            for request in item.requests:
                state.update(np.array([len(request.ids), request.scored, request.prompt or 0, *request.ids]).tobytes())
        return state.hexdigest()[:16]

    @property
    def tokens(self) -> int:
        """Tokens that are scored."""
        return sum(request.scored for item in self.items for request in item.requests)

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, str | int]:
        """What a report says of it, by name."""

    @abstractmethod
    def metrics(self, outcomes: Sequence[Sequence[Outcome]]) -> tuple[Metric, ...]:
        """Return the figures, the main one first; `outcomes` are those of each item's requests."""

    def place(self, index: int) -> str:
        """Say which item it is, for messages."""
        return f"item {index + 1} of {self.name}"

    def masked_share(self, setting: Setting) -> float:
        """Share of the scored tokens that are predicted by a token computed under a mask."""
        masked = sum(setting.under_masks(request) for item in self.items for request in item.requests)
        return masked / self.tokens
