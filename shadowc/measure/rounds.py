# SPDX-License-Identifier: Apache-2.0
"""The timed part of bench: all settings and all prompts interleaved, round by round, behind a measure of the stream."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from shadowc.measure.noise import Reading

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.measure.settings import Side
    from shadowc.runtime.causal import CausalEngine
    from shadowc.spec.density import Density
    from shadowc.spec.manifest import EngineManifest
    from shadowc.spec.progress import Progress

STEP_PROMPT_TOKENS = 16
"""In front of the tokens that are timed."""


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
    """

    def __init__(self, progress: Progress, side: Side, rounds: int) -> None:
        self._progress, self._done = progress, 0
        self._whole = (len(side.jobs) + len(side.variants)) * (rounds + 1) + len(side.jobs)  # those are profiled

    def more(self, runs: int = 1) -> None:
        """So many more."""
        self._done += runs
        self._progress.advance(self._done, self._whole, "runs")


def measure(side: Side, *, rounds: int, tokens: int, prompt_tokens: int, counter: Counter) -> Found:
    """Measure everything so often, interleaved, after one run of each that is not timed.

    Args:
        side: what is measured.
        rounds: how often.
        tokens: generated per setting; the first one is not timed.
        prompt_tokens: length of the prompt whose first token is timed.
        counter: is told of every run.
    """
    manifest = side.variants[0].engine.manifest
    steps, prompt = prompt_ids(manifest, STEP_PROMPT_TOKENS), prompt_ids(manifest, prompt_tokens)
    stream: list[float] = []
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
        for index, (setting, variant) in enumerate(side.jobs):
            seconds, sizes[index] = _decode(variant.engine, steps, tokens, setting.density)
            times[index].append(seconds)
            counter.more()
        for index, variant in enumerate(side.variants):
            prompts[index].append(_read(variant.engine, prompt))
            counter.more()
    return Found(before, Reading.now(), stream, times, sizes, prompts)


def _decode(engine: CausalEngine, prompt: npt.NDArray[np.int64], tokens: int, density: Density) -> tuple[float, float]:
    """Seconds and bytes per token."""
    engine.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, density=density)
    stats = engine.last_stats
    return stats.seconds / stats.tokens, stats.bytes_read


def _read(engine: CausalEngine, prompt: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Seconds to the first token, and those of them in the prompt's pass."""
    began = perf_counter()
    engine.generate(prompt, max_new_tokens=1)
    return perf_counter() - began, engine.last_stats.prefill_seconds
