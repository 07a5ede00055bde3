# SPDX-License-Identifier: Apache-2.0
"""A contestant without a model: `--weights` says how it behaves. Its tokens tell which prompt it was given."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.peers.contestants.protocol import Contestant, Generation, main, timed


def digest(prompt: Sequence[int]) -> int:
    """A number that another prompt does not have."""
    return sum((place + 1) * token for place, token in enumerate(prompt))


class Fake(Contestant):
    packages = ("pytest",)

    def __init__(self, model: Path, weights: str, threads: int) -> None:
        if weights == "cannot-load":
            raise ValueError("the weights are\nof yesterday")
        self._behaviour = weights

    @staticmethod
    def prepare(checkpoint: Path, out: Path, weights: str) -> None:
        raise NotImplementedError

    def generate(self, prompt: Sequence[int], new_tokens: int, setting: str) -> Generation:
        if self._behaviour == "dies" and new_tokens > 2:
            sys.stderr.write("no memory left\n")
            sys.stderr.flush()
            os._exit(3)
        if self._behaviour == "refuses" and setting != "dense":
            raise RuntimeError(f"no density {setting}")
        if self._behaviour == "talks":
            os.write(1, b'{"tokens": []}\nloading 100 %\n')
        made = new_tokens - 1 if self._behaviour == "stops-early" and new_tokens > 2 else new_tokens

        def run(on_token: Callable[[], None]) -> list[int]:
            for _ in range(made):
                on_token()
            return [digest(prompt)] * made

        return timed(run)


if __name__ == "__main__":
    main(Fake)
