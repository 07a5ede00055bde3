# SPDX-License-Identifier: Apache-2.0
"""From the samples of all rounds to one row per contestant and setting: medians, spreads, ratios within rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from shadowc.measure.rounds import STEADY

STREAM_SHARE, FIXED_MS = 0.9, 1.0
"""What a token may cost at most, as shadowc's own aim: its bytes at this share of the stream, and so much more."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One setting in one round."""

    short_first_ms: float
    """To the first token after the short prompt."""
    decode_ms: float
    """Per token after that."""
    long_first_ms: float
    """To the first token after the long prompt."""
    first_token: int
    """After the short prompt."""
    bytes_per_token: float | None
    peak_bytes: int
    """Of the whole process so far."""
    streams: tuple[float, float]
    """Bytes per second that memory gave right before and behind what was decoded."""

    @property
    def stream(self) -> float:
        """Their mean."""
        return sum(self.streams) / 2

    @property
    def steady(self) -> bool:
        """Whether memory kept its pace meanwhile, within a fifth: if not, neither stream is that of the sample."""
        return max(self.streams) <= STEADY * min(self.streams)


@dataclass(frozen=True, slots=True)
class Result:
    """One setting of one contestant over all rounds, or why there is none."""

    contestant: str
    setting: str
    samples: tuple[Sample, ...]
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, lowest and highest of all rounds."""

    median: float
    lowest: float
    highest: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return Spread(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one result that has samples. Times in ms."""

    decode: Spread
    short_first: Spread
    long_first: Spread
    prefill_tokens_per_second: float
    """Of the long prompt."""
    peak_gigabytes: float
    megabytes_per_token: float | None
    allowed_ms: float | None
    """Median over the rounds of bytes / (0.9 x stream of that moment) + 1 ms."""
    above_ms: Spread | None
    """Of its time per token less what was allowed, of the samples during which memory kept its pace; None without."""
    steady: int
    """How many these are."""
    ratio: float | None
    """Median over the rounds of its time per token over the base's; None without a base."""
    agreeing: int
    """Rounds in which its first token was that of most contestants."""


def row(
    result: Result,
    base: Result | None,
    common_first_tokens: Sequence[int],
    long_prompt: int,
) -> Row:
    """Figures of a result with one sample per round.

    Args:
        result: without a failure.
        base: what `ratio` divides by.
        common_first_tokens: as `common_first_tokens` returns them.
        long_prompt: its tokens.
    """
    samples = result.samples
    long_first = Spread.of([sample.long_first_ms for sample in samples])
    sized = [(sample, size) for sample in samples if (size := sample.bytes_per_token) is not None]
    allowed = [allowed_ms(size, sample.stream) for sample, size in sized]
    above = [sample.decode_ms - allowed_ms(size, sample.stream) for sample, size in sized if sample.steady]
    ratio = None
    if base is not None and base.samples:
        pairs = zip(samples, base.samples, strict=True)
        ratio = median(own.decode_ms / other.decode_ms for own, other in pairs)
    return Row(
        decode=Spread.of([sample.decode_ms for sample in samples]),
        short_first=Spread.of([sample.short_first_ms for sample in samples]),
        long_first=long_first,
        prefill_tokens_per_second=long_prompt / long_first.median * 1e3,
        peak_gigabytes=max(sample.peak_bytes for sample in samples) / 1e9,
        megabytes_per_token=median(size for _, size in sized) / 1e6 if sized else None,
        allowed_ms=median(allowed) if allowed else None,
        above_ms=Spread.of(above) if above else None,
        steady=len(above),
        ratio=ratio,
        agreeing=sum(sample.first_token == common for sample, common in zip(samples, common_first_tokens, strict=True)),
    )


def allowed_ms(size: float, stream: float) -> float:
    """What a token that reads `size` bytes may cost where the memory gives `stream` bytes per second."""
    return size / (STREAM_SHARE * stream) * 1e3 + FIXED_MS


def common_first_tokens(results: Sequence[Result], rounds: int) -> list[int]:
    """By round, the first token on which most contestants agree: all compute the same model, so all should.

    Settings of one contestant share their dense prompt and count once.
    """
    first = {result.contestant: result for result in reversed(results) if not result.failure}
    votes = [Counter(result.samples[turn].first_token for result in first.values()) for turn in range(rounds)]
    return [vote.most_common(1)[0][0] if vote else -1 for vote in votes]


def residents(peaks: Mapping[str, int], budget: int) -> frozenset[str]:
    """Contestants that stay loaded: as many as fit beside the largest of those that do not, smallest first.

    Args:
        peaks: contestant -> bytes at its peak.
        budget: bytes that all of them may take together.
    """
    names = sorted(peaks, key=lambda name: peaks[name])
    for count in range(len(names), 0, -1):
        kept, others = names[:count], names[count:]
        if sum(peaks[name] for name in kept) + max((peaks[name] for name in others), default=0) <= budget:
            return frozenset(kept)
    return frozenset()
