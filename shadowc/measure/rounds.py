# SPDX-License-Identifier: Apache-2.0
"""The timed part of bench: rounds in which all settings take turns, a few tokens each, and then read a prompt.

A shared machine changes its pace within seconds. Turns of a quarter of a second share what it gives, so that ratios
within a round are of the settings and not of the moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import fmean
from time import perf_counter, sleep
from typing import TYPE_CHECKING

import numpy as np

from shadowc.measure.noise import Reading
from shadowc.measure.turns import Text, turn_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from shadowc.measure.settings import Side
    from shadowc.runtime.causal import CausalEngine
    from shadowc.spec.density import Density
    from shadowc.spec.manifest import EngineManifest
    from shadowc.spec.progress import Progress

CONTEXT_TOKENS = 16
"""In front of the tokens that are timed, if nothing else is asked for."""
REST_SECONDS = 0.06
"""Before a turn or a prompt: under an older ONNX Runtime threads of the engine that ran before spin on for so long, on
a core that this one needs."""


def prompt_ids(manifest: EngineManifest, tokens: int, batch: int = 1) -> npt.NDArray[np.int64]:
    """Prompts [B,S], the same every time, each row another; ids below 4 are special."""
    return np.random.default_rng(0).integers(4, manifest.model.vocab, (batch, tokens), dtype=np.int64)


STEADY = 1.2
"""Of the two paces of a turn, higher over lower at most: otherwise neither is that of the turn."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A few tokens of one setting, and the pace of memory before and behind them."""

    seconds: float
    """Per token."""
    tokens: int
    paces: tuple[float, float]
    """Bytes per second."""

    @property
    def pace(self) -> float:
        """That of the turn."""
        return fmean(self.paces)

    @property
    def steady(self) -> bool:
        """Whether memory kept its pace."""
        return max(self.paces) <= STEADY * min(self.paces)


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured."""

    before: Reading
    after: Reading
    stream: list[float]
    """Bandwidth by round, bytes per second."""
    weights_stream: list[float]
    """The same of the memory in which the weights lie; empty where that is not measured."""
    round_trips: list[float]
    """Between two threads, nanoseconds by round; empty where that is not measured."""
    turns: list[list[list[Turn]]]
    """Of each job, by round."""
    sizes: list[float]
    """Of each job, bytes per token."""
    prompts: list[list[tuple[float, float]]]
    """Of each variant, seconds to the first token and those of the prompt's pass by round."""

    @property
    def times(self) -> list[list[float]]:
        """Of each job, seconds per token by round: means, for with --refresh one token in so many takes longer."""
        return [[mean_seconds(turns) for turns in rounds] for rounds in self.turns]


def mean_seconds(turns: Sequence[Turn]) -> float:
    """Seconds per token of some turns."""
    return sum(turn.seconds * turn.tokens for turn in turns) / sum(turn.tokens for turn in turns)


def in_turns(
    texts: Sequence[Text], sizes: Sequence[int], pace: Callable[[], float], behind: Callable[[], None] = lambda: None
) -> list[list[Turn]]:
    """Write texts to their end, a turn of each after the other.

    Args:
        texts: not yet begun, each with a first turn of no timed tokens and one of each of `sizes`.
        sizes: tokens of each timed turn.
        pace: measures what memory gives in this moment, bytes per second.
        behind: called after every timed turn.

    Returns:
        The timed turns of each text.

    Raises:
        ShadowcError: as `generate` does.
        InternalError: a text ended before its last turn.
    """
    turns: list[list[Turn]] = [[] for _ in texts]
    try:
        for text in texts:  # the prompt and what is not timed behind it
            sleep(REST_SECONDS)
            text.go_on()
        sleep(REST_SECONDS)
        before = pace()
        for size in sizes:
            for text, taken in zip(texts, turns, strict=True):
                text.go_on()
                sleep(REST_SECONDS)
                after = pace()
                taken.append(Turn(fmean(text.seconds[-size:]), size, (before, after)))
                before = after
                behind()
    finally:
        for text in texts:
            text.close()
    return turns


class Counter:
    """Tells how many runs are over.

    Args:
        progress: is told.
        side: what is measured.
        rounds: how often.
        turns: of every setting in a round.
    """

    def __init__(self, progress: Progress, side: Side, rounds: int, turns: int) -> None:
        self._progress, self._done = progress, 0
        self._whole = len(side.jobs) * (rounds * turns + 2)  # before the rounds, and profiled behind them
        self._whole += len(side.variants) * (rounds + 1)

    def more(self, runs: int = 1) -> None:
        """So many more."""
        self._done += runs
        self._progress.advance(self._done, self._whole, "runs")


def measure(
    side: Side, *, rounds: int, tokens: int, prompt_tokens: int, context_tokens: int, batch: int, counter: Counter
) -> Found:
    """Measure everything so often, interleaved, after one run of each that is not timed.

    Args:
        side: what is measured.
        rounds: how often.
        tokens: timed per setting.
        prompt_tokens: length of the prompt whose first token is timed.
        context_tokens: in front of those that are timed.
        batch: rows decoded at once.
        counter: is told of every run.
    """
    manifest = side.variants[0].engine.manifest
    steps, prompt = prompt_ids(manifest, context_tokens, batch), prompt_ids(manifest, prompt_tokens, batch)
    stream: list[float] = []
    weights_stream: list[float] = []
    round_trips: list[float] = []
    turns: list[list[list[Turn]]] = [[] for _ in side.jobs]
    prompts: list[list[tuple[float, float]]] = [[] for _ in side.variants]
    sizes = [0.0] * len(side.jobs)
    for setting, variant in side.jobs:  # first touch of the mapped weights, not timed
        _decode(variant.engine, steps, 4, setting.density)
        counter.more()
    for variant in side.variants:
        _read(variant.engine, prompt)
        counter.more()
    before = Reading.now()
    for _ in range(rounds):
        stream.append(side.bandwidth())
        if (trip := side.round_trip()) is not None:
            round_trips.append(trip)
        if side.weights_bandwidth is not None:
            weights_stream.append(side.weights_bandwidth())
        decode = _decode_in_turns if side.takes_turns else _decode_one_by_one
        pace = side.pace or partial(float, stream[-1])
        for index, (taken, sizes[index]) in enumerate(decode(side, steps, tokens, counter, pace)):
            turns[index].append(taken)
        for index, variant in enumerate(side.variants):
            sleep(REST_SECONDS)
            prompts[index].append(_read(variant.engine, prompt))
            counter.more()
    return Found(before, Reading.now(), stream, weights_stream, round_trips, turns, sizes, prompts)


def _decode_in_turns(
    side: Side, prompt: npt.NDArray[np.int64], tokens: int, counter: Counter, pace: Callable[[], float]
) -> list[tuple[list[Turn], float]]:
    """Of each job, its turns and bytes per token."""
    sizes = turn_sizes(tokens)
    texts = [Text(variant.engine, prompt, setting.density, [0, *sizes]) for setting, variant in side.jobs]
    turns = in_turns(texts, sizes, pace, counter.more)
    return [(taken, text.bytes_read) for text, taken in zip(texts, turns, strict=True)]


def _decode_one_by_one(
    side: Side, prompt: npt.NDArray[np.int64], tokens: int, counter: Counter, pace: Callable[[], float]
) -> list[tuple[list[Turn], float]]:
    found = []
    for setting, variant in side.jobs:
        before = pace()
        seconds, size = _decode(variant.engine, prompt, tokens + 1, setting.density)
        found.append(([Turn(seconds, tokens, (before, pace()))], size))
        counter.more(len(turn_sizes(tokens)))
    return found


def _decode(engine: CausalEngine, prompt: npt.NDArray[np.int64], tokens: int, density: Density) -> tuple[float, float]:
    """Seconds and bytes per token behind the first."""
    engine.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, density=density)
    stats = engine.last_stats
    return stats.seconds / stats.tokens, stats.bytes_read


def _read(engine: CausalEngine, prompt: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Seconds to the first token, and those of them in the prompt's pass."""
    began = perf_counter()
    engine.generate(prompt, max_new_tokens=1)
    return perf_counter() - began, engine.last_stats.prefill_seconds
