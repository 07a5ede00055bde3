# SPDX-License-Identifier: Apache-2.0
"""The timed part of bench: rounds in which all settings take turns, a few tokens each, and then read a prompt.

A shared machine changes its pace within seconds. Turns of a quarter of a second share what it gives, so that ratios
within a round are of the settings and not of the moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from time import perf_counter, sleep
from typing import TYPE_CHECKING

import numpy as np

from shadowc.measure.noise import Reading
from shadowc.measure.turns import Text, turn_sizes

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.measure.settings import Side
    from shadowc.runtime.causal import CausalEngine
    from shadowc.spec.density import Density
    from shadowc.spec.manifest import EngineManifest
    from shadowc.spec.progress import Progress

STEP_PROMPT_TOKENS = 16
"""In front of the tokens that are timed."""
REST_SECONDS = 0.06
"""Before a turn or a prompt: under an older ONNX Runtime threads of the engine that ran before spin on for so long, on
a core that this one needs."""


def prompt_ids(manifest: EngineManifest, tokens: int) -> npt.NDArray[np.int64]:
    """A prompt [1,S], the same every time; ids below 4 are special."""
    return np.random.default_rng(0).integers(4, manifest.model.vocab, (1, tokens), dtype=np.int64)


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
    times: list[list[float]]
    """Of each job, seconds per token by round."""
    sizes: list[float]
    """Of each job, bytes per token."""
    prompts: list[list[tuple[float, float]]]
    """Of each variant, seconds to the first token and those of the prompt's pass by round."""


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


def measure(side: Side, *, rounds: int, tokens: int, prompt_tokens: int, counter: Counter) -> Found:
    """Measure everything so often, interleaved, after one run of each that is not timed.

    Args:
        side: what is measured.
        rounds: how often.
        tokens: timed per setting.
        prompt_tokens: length of the prompt whose first token is timed.
        counter: is told of every run.
    """
    manifest = side.variants[0].engine.manifest
    steps, prompt = prompt_ids(manifest, STEP_PROMPT_TOKENS), prompt_ids(manifest, prompt_tokens)
    stream: list[float] = []
    weights_stream: list[float] = []
    round_trips: list[float] = []
    times: list[list[float]] = [[] for _ in side.jobs]
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
        for index, (seconds, sizes[index]) in enumerate(decode(side, steps, tokens, counter)):
            times[index].append(seconds)
        for index, variant in enumerate(side.variants):
            sleep(REST_SECONDS)
            prompts[index].append(_read(variant.engine, prompt))
            counter.more()
    return Found(before, Reading.now(), stream, weights_stream, round_trips, times, sizes, prompts)


def _decode_in_turns(
    side: Side, prompt: npt.NDArray[np.int64], tokens: int, counter: Counter
) -> list[tuple[float, float]]:
    """Of each job, seconds and bytes per token: means, for with --refresh one token in so many takes longer."""
    sizes = turn_sizes(tokens)
    texts = [Text(variant.engine, prompt, setting.density, sizes) for setting, variant in side.jobs]
    try:
        for _ in sizes:
            for text in texts:
                sleep(REST_SECONDS)
                text.go_on()
                counter.more()
    finally:
        for text in texts:
            text.close()
    return [(fmean(text.seconds), text.bytes_read) for text in texts]


def _decode_one_by_one(
    side: Side, prompt: npt.NDArray[np.int64], tokens: int, counter: Counter
) -> list[tuple[float, float]]:
    found = []
    for setting, variant in side.jobs:
        found.append(_decode(variant.engine, prompt, tokens + 1, setting.density))
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
