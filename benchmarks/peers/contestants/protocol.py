# SPDX-License-Identifier: Apache-2.0
"""What every contestant offers, and the lines over which the race asks for it.

Runs in every environment: standard library only. One request is one JSON line on standard input, one reply one
JSON line on what was standard output; whatever a runtime prints itself goes to standard error.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Generation:
    """One greedy continuation of one prompt."""

    tokens: list[int]
    first_ms: float
    """From the call to the first new token."""
    rest_ms: float
    """From there to the last one."""
    bytes_per_token: float | None = None
    """Of weights, where the runtime counts them."""


class Contestant(ABC):
    """A runtime with the model loaded.

    Args:
        model: the folder that `prepare` wrote.
        weights: their type, as given to `prepare`.
        threads: of the runtime's own pool.
    """

    packages: ClassVar[tuple[str, ...]]
    """Distributions whose versions belong beside its figures."""

    @abstractmethod
    def __init__(self, model: Path, weights: str, threads: int) -> None: ...

    @staticmethod
    @abstractmethod
    def prepare(checkpoint: Path, out: Path, weights: str) -> None:
        """Turn the checkpoint folder into what the runtime loads; `out` is a new, empty folder."""

    @abstractmethod
    def generate(self, prompt: Sequence[int], new_tokens: int, setting: str) -> Generation:
        """Continue the prompt greedily by exactly `new_tokens` tokens; an end token does not end it."""


def timed(generate: Callable[[Callable[[], None]], Sequence[int]]) -> Generation:
    """Time a function that calls its argument as soon as each token is known, and returns all of them."""
    stamps: list[float] = []
    start = perf_counter()
    tokens = generate(lambda: stamps.append(perf_counter()))
    if len(stamps) != len(tokens) or not tokens:
        raise RuntimeError(f"{len(tokens)} tokens came with {len(stamps)} times, expected one time for each")
    return Generation(list(tokens), (stamps[0] - start) * 1e3, (stamps[-1] - stamps[0]) * 1e3)


def main(kind: type[Contestant]) -> None:
    """Entry of every contestant: `prepare` once, or `serve` requests until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=("prepare", "serve"))
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.task == "prepare":
        kind.prepare(options.checkpoint, options.model, options.weights)
        return
    _die_with_parent()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _serve(kind, options, replies)


def _serve(kind: type[Contestant], options: argparse.Namespace, replies: Any) -> None:
    contestant: Contestant | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if contestant is None:
                contestant = kind(options.model, options.weights, options.threads)
                reply: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in kind.packages}}
            else:
                reply = asdict(contestant.generate(**request))
        except Exception as error:  # whatever a runtime raises is told to the race, which shows it
            reply = {"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _die_with_parent() -> None:
    """A paused contestant would not notice that the race was killed, and would keep its gigabytes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
