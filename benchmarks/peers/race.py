# SPDX-License-Identifier: Apache-2.0
"""The race: round by round every contestant once, one at a time, the stream's bandwidth around what each decodes.

A shared machine drifts within seconds, so times that are compared were measured in the same round, and a time and the
stream at the same moment. A contestant that fails is out, and the reason is its result; the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from benchmarks.peers.figures import Result, Sample, residents
from benchmarks.peers.process import ContestantError, ContestantProcess, Launch

_LOWEST_TOKEN = 4
"""Ids below are OPT's special tokens."""
_WARM_TOKENS = 2
_Key = tuple[str, str]
"""A contestant and one of its settings."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    rounds: int
    tokens: int
    """Timed per measurement, after the first."""
    short_prompt: int
    long_prompt: int
    vocab: int
    memory: int
    """Bytes that all loaded contestants may take together."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """All samples, and what belongs beside them."""

    results: tuple[Result, ...]
    reloaded: tuple[str, ...]
    """Contestants that were loaded anew for every measurement, because not all fit into memory."""
    versions: Mapping[str, Mapping[str, str]]
    """Contestant -> distribution -> version."""


def race(
    launches: Mapping[str, Launch],
    settings: Mapping[str, Sequence[str]],
    plan: Plan,
    bandwidth: Callable[[], float],
    note: Callable[[str], None],
) -> Outcome:
    """Run all rounds.

    Args:
        launches: contestant -> how to start it, in the order in which they run.
        settings: contestant -> its settings.
        plan: how much.
        bandwidth: measures the stream in bytes per second.
        note: told what is going on.
    """
    stable = _Stable(launches)
    failures: dict[_Key, str] = {}
    peaks: dict[str, int] = {}
    samples: dict[_Key, list[Sample]] = {(label, setting): [] for label in launches for setting in settings[label]}

    def attempt(key: _Key, turn: int) -> Sample | None:
        try:
            with stable.running(key[0]) as process:
                return _measure(process, key[1], turn, plan, bandwidth, first=stable.is_first(key))
        except ContestantError as error:
            failures[key] = str(error)
            note(f"{' '.join(key)} failed: {error}")
            return None

    try:
        for key in samples:  # alone, to see that it works and what memory it takes
            stable.keep(frozenset([key[0]]))
            if sample := attempt(key, -1):
                peaks[key[0]] = sample.peak_bytes
                note(f"rehearsed: {' '.join(key)}, {sample.peak_bytes / 1e9:.1f} GB")
        kept = residents(peaks, plan.memory)
        stable.keep(kept)
        for turn in range(plan.rounds):
            note(f"round {turn + 1} of {plan.rounds}")
            for key, taken in samples.items():
                if key not in failures and (sample := attempt(key, turn)):
                    taken.append(sample)
                    note(
                        f"  {' '.join(key)}: {sample.decode_ms:.1f} ms per token, stream {sample.stream / 1e9:.1f} GB/s"
                    )
    finally:
        stable.keep(frozenset())
    return Outcome(
        results=tuple(
            Result(*key, samples=() if key in failures else tuple(taken), failure=failures.get(key, ""))
            for key, taken in samples.items()
        ),
        reloaded=tuple(label for label in peaks if label not in kept),
        versions=stable.versions,
    )


def prompt(turn: int, length: int, vocab: int, purpose: str) -> list[int]:
    """The same tokens for every contestant, others in every round: a runtime may keep the cache of a prompt it knows.

    `turn` is -1 in the rehearsal.
    """
    seed = [turn + 1, length, *purpose.encode()]
    return [int(token) for token in np.random.default_rng(seed).integers(_LOWEST_TOKEN, vocab, length)]


@dataclass
class _Stable:
    """The processes: those that are kept are paused between their turns, others are ended."""

    launches: Mapping[str, Launch]
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    _kept: frozenset[str] = frozenset()
    _paused: dict[str, ContestantProcess] = field(default_factory=dict)
    _warm: set[_Key] = field(default_factory=set)

    def keep(self, labels: frozenset[str]) -> None:
        """Keep these from now on, and end all others."""
        self._kept = labels
        for label in [label for label in self._paused if label not in labels]:
            self._paused.pop(label).close()

    @contextmanager
    def running(self, label: str) -> Iterator[ContestantProcess]:
        """The contestant's process for one turn; one that failed is ended."""
        process = self._paused.pop(label, None)
        if process is not None:
            process.resume()
        else:
            self._warm = {key for key in self._warm if key[0] != label}
            process = ContestantProcess(self.launches[label])
            self.versions[label] = process.versions
        finished = False
        try:
            yield process
            finished = True
        finally:
            if finished and label in self._kept:
                process.pause()
                self._paused[label] = process
            else:
                process.close()

    def is_first(self, key: _Key) -> bool:
        """Whether this setting runs for the first time in its process."""
        first = key not in self._warm
        self._warm.add(key)
        return first


def _measure(
    process: ContestantProcess, setting: str, turn: int, plan: Plan, bandwidth: Callable[[], float], *, first: bool
) -> Sample:
    """Warm up, then decode after the short prompt, then the first token after the long one."""
    for length in [plan.short_prompt, plan.long_prompt] if first else [plan.short_prompt]:
        process.generate(prompt(turn, length, plan.vocab, "warm-up"), _WARM_TOKENS, setting)
    before = bandwidth()
    short = process.generate(prompt(turn, plan.short_prompt, plan.vocab, "short"), 1 + plan.tokens, setting)
    after = bandwidth()
    long = process.generate(prompt(turn, plan.long_prompt, plan.vocab, "long"), 1, setting)
    if len(short["tokens"]) != 1 + plan.tokens:
        raise ContestantError(f"it made {len(short['tokens'])} tokens, expected {1 + plan.tokens}")
    return Sample(
        short_first_ms=short["first_ms"],
        decode_ms=short["rest_ms"] / plan.tokens,
        long_first_ms=long["first_ms"],
        first_token=short["tokens"][0],
        bytes_per_token=short["bytes_per_token"],
        peak_bytes=process.peak_bytes(),
        streams=(before, after),
    )
