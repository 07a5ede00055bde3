# SPDX-License-Identifier: Apache-2.0
"""Decode speed at several densities, beside the bytes that the kernels read and the machine's bandwidth.

In every round all settings take turns of a few tokens (rounds.py). What memory gives is measured in every round, and
between turns, because a shared machine drifts: medians and ratios within the run may be quoted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from shadowc.measure import settings
from shadowc.measure.break_even import BreakEven, break_even
from shadowc.measure.mask_cost import MaskCost, mask_cost
from shadowc.measure.noise import Noise, noise
from shadowc.measure.rounds import CONTEXT_TOKENS, Counter, Turn, mean_seconds, measure, prompt_ids
from shadowc.measure.settings import Mask, Setting, Side, Variant
from shadowc.measure.shares import Shares, profile
from shadowc.measure.turns import tokens_generated, turn_sizes
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from shadowc.spec.progress import NullProgress, Progress
from shadowc.spec.whole import require_whole

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from shadowc.runtime.weights_memory import Kind
    from shadowc.spec.manifest import EngineManifest

PROMPT_TOKENS = 33
FLOOR_SHARE = 0.9
"""Of the stream: what a token's bytes are held against."""


@dataclass(frozen=True, slots=True)
class TurnRow:
    """A few tokens of one setting."""

    round: int
    """From 1 on."""
    ms_per_token: float
    stream_gigabytes_per_second: float
    """What memory gave before and behind them, in the mean."""
    steady: bool
    """Whether it kept its pace, within a fifth."""


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One setting, medians over the rounds."""

    label: str
    density_heads: float
    density_neurons: float
    skip_zeros: bool
    mask: Mask
    ms_per_token: float
    ms_lowest: float
    ms_highest: float
    ms_by_round: tuple[float, ...]
    megabytes_per_token: float
    """Counted by the kernels, plus the LM head, the predictor, norms and biases."""
    floor_ms: float
    """Those bytes at FLOOR_SHARE of what memory gave before and behind each turn (of the round's stream where memory is
    not read between turns, see `Side.pace`); a median over the rounds."""
    above_floor_ms: float | None
    """Median over the rounds of the time beyond the floor, of turns during which memory kept its pace; None without."""
    gigabytes_per_second: float
    share_of_stream: float | None
    """Median over the rounds of achieved bandwidth over that of memory, of the same turns."""
    steady_turns: float
    """Share of the turns during which memory kept its pace."""
    turns: tuple[TurnRow, ...]
    speedup: float
    """Median over the rounds of the first setting's time over this one's."""
    shares: Shares | None
    """Parts of a token's time, of a run of their own; None on a GPU."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One variant of the engine reading a prompt, which is dense at every density; medians over the rounds."""

    label: str
    skip_zeros: bool
    mask: Mask
    first_token_ms: float
    """From the call to the first token, of all rows."""
    ms_lowest: float
    ms_highest: float
    tokens_per_second: float
    """Of the prompts."""


@dataclass(frozen=True, slots=True)
class BreakEvenRow:
    """A variant against the dense twin that treats zeros alike; densities that keep as many heads as neurons."""

    label: str
    skip_zeros: bool
    mask: Mask
    break_even: BreakEven
    mask_cost: MaskCost | None
    """None where density 1 was not measured."""


@dataclass(frozen=True, slots=True)
class BenchReport:
    """The whole table and what it was measured on."""

    model: str
    weights: str
    threads: int
    """Of the operators; 0 where a GPU runs them."""
    isa: str
    """Instruction set of the kernels, or the GPU."""
    rounds: int
    tokens: int
    prompt_tokens: int
    context_tokens: int
    """In front of the tokens that are timed. What attention reads of them is in no byte and no floor here."""
    batch: int
    """Rows decoded at once; times and bytes per token are those of a step over its rows."""
    stream_gigabytes_per_second: float
    stream_by_round: tuple[float, ...]
    """Gigabytes per second."""
    weights_stream_by_round: tuple[float, ...]
    """As the stream, over the memory in which the weights lie, which may be slower than what the system gives now;
    empty for few weights, which caches may hold, and on a GPU."""
    round_trip_ns_by_round: tuple[float, ...]
    """What two threads take to hand a cache line back and forth: some 100 where cores share their last cache, and its
    way to memory, several hundred elsewhere. Only of two threads on two cores, which a host may move; else empty."""
    memory: str | None
    """How the weights lie in memory, "shared", "renewed" or "private"; None on a GPU."""
    large_pages: float | None
    """Share of them in large pages; None where the system does not tell."""
    load_to_first_token_seconds: float
    """Once, before the rounds: `shadowc.load`, checks included, and the first token after `prompt_tokens`. Files that
    the system holds in memory already are not read from disk again."""
    rows: tuple[BenchRow, ...]
    prompts: tuple[PromptRow, ...]
    break_even: tuple[BreakEvenRow, ...]
    """Empty on a GPU, and for a dense engine."""
    noise: Noise


def bench(
    folder: Path,
    *,
    densities: Sequence[Density],
    rounds: int = 5,
    tokens: int = 24,
    prompt_tokens: int = PROMPT_TOKENS,
    context_tokens: int = CONTEXT_TOKENS,
    batch: int = 1,
    skip_zeros: bool | None = None,
    threads: int | None = None,
    memory: Kind | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measures decoding at every density; on the CPU with `skip_zeros` off and on.

    Args:
        folder: the engine.
        densities: on the CPU each is measured without and with skip_zeros. The first row is the base of every
            speed-up. On the CPU it is the dense twin: the same weights and kernels without predictor and masks; on a
            GPU, whose plan cannot be changed any more, the same engine at density 1.
        rounds: how often the whole table is measured.
        tokens: timed of every setting in every round.
        prompt_tokens: length of the prompt whose first token is timed.
        context_tokens: in front of the tokens that are timed.
        batch: rows decoded at once, each with a prompt of its own.
        skip_zeros: measure only with it (True) or without it; None: both.
        threads: intra-op threads; None: one per core.
        memory: where the weights lie, see `shadowc.load`; for target cpu.
        progress: told about runs.

    Raises:
        InputError: the prompt leaves no room in the model's context, or the rows none in a plan.
        UnsupportedError: an argument that the engine's target does not have.
        ShadowcError: the engine cannot be loaded here, see `shadowc.load`.
    """
    from shadowc.runtime.load import read_manifest

    progress = progress or NullProgress()
    manifest = read_manifest(folder)
    _check_lengths(rounds, prompt_tokens, context_tokens, tokens, manifest)
    _check_batch(batch, manifest)
    prompt = prompt_ids(manifest, prompt_tokens, batch)
    side, loading = _side(folder, manifest, densities, prompt, skip_zeros, threads, memory)
    with progress.stage("bench"):
        counter = Counter(progress, side, rounds, len(turn_sizes(tokens)))
        found = measure(
            side, rounds=rounds, tokens=tokens, prompt_tokens=prompt_tokens, context_tokens=context_tokens, batch=batch,
            counter=counter,
        )  # fmt: skip
        shares = _profiled(side, counter, batch)
    times = found.times
    rows = tuple(
        _row(setting, found.turns[index], times[0], found.sizes[index], shares.get(setting))
        for index, (setting, _) in enumerate(side.jobs)
    )
    return BenchReport(
        model=manifest.model.name,
        weights=manifest.weights,
        threads=side.threads,
        isa=side.isa,
        rounds=rounds,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        context_tokens=context_tokens,
        batch=batch,
        stream_gigabytes_per_second=median(found.stream) / 1e9,
        stream_by_round=tuple(one / 1e9 for one in found.stream),
        weights_stream_by_round=tuple(one / 1e9 for one in found.weights_stream),
        round_trip_ns_by_round=tuple(found.round_trips),
        memory=None if side.weights is None else side.weights.kind,
        large_pages=None if side.weights is None else side.weights.large_pages,
        load_to_first_token_seconds=loading,
        rows=rows,
        prompts=tuple(
            _prompt_row(variant, found.prompts[index], prompt.size) for index, variant in enumerate(side.variants)
        ),
        break_even=tuple(_break_evens(side, times)),
        noise=noise(
            found.before,
            found.after,
            {setting.label: times[index] for index, (setting, _) in enumerate(side.jobs)},
            found.stream,
            found.round_trips,
        ),
    )


def _check_batch(batch: int, manifest: EngineManifest) -> None:
    require_whole(batch=batch)
    part = manifest.tensorrt
    if batch < 1 or (part is not None and batch > part.max_batch):
        most = "or more" if part is None else f"to {part.max_batch}, as the engine was compiled"
        raise InputError(f"batch is {batch}, expected 1 {most}", hint="for example --batch 1")


def _check_lengths(rounds: int, prompt_tokens: int, context_tokens: int, tokens: int, manifest: EngineManifest) -> None:
    require_whole(rounds=rounds, prompt_tokens=prompt_tokens, context_tokens=context_tokens, tokens=tokens)
    if rounds < 1 or tokens < 1:
        raise InputError(f"rounds is {rounds} and tokens {tokens}, expected 1 or more", hint="for example 5 and 24")
    part = manifest.tensorrt
    context = manifest.model.positions if part is None else min(manifest.model.positions, part.max_context)
    if context_tokens < 1:
        raise InputError(f"context_tokens is {context_tokens}, expected 1 or more", hint="for example 16")
    room, most = context - context_tokens, context - 1
    if tokens_generated(tokens) > room:
        fitting = room - tokens_generated(0)
        shorter = "fewer tokens in front of them" if context_tokens > 1 else "a model with a longer context"
        raise InputError(
            f"{tokens} tokens are to be timed; behind a prompt of {context_tokens} and a first token "
            f"{manifest.model.name} has room for {max(fitting, 0)}",
            hint=f"--tokens {fitting}" if fitting > 0 else shorter,
        )
    if not 1 <= prompt_tokens <= most:
        raise InputError(
            f"the prompt is to have {prompt_tokens} tokens; {manifest.model.name} takes 1 to {most} and one new one",
            hint=f"--prompt-tokens {min(PROMPT_TOKENS, most)}",
        )


def _side(
    folder: Path,
    manifest: EngineManifest,
    densities: Sequence[Density],
    prompt: npt.NDArray[np.int64],
    skip_zeros: bool | None,
    threads: int | None,
    memory: Kind | None,
) -> tuple[Side, float]:
    """What is measured, and the seconds from loading to the first token, which is the first thing that happens."""
    from shadowc.runtime.engine import Engine
    from shadowc.runtime.load import load

    began = perf_counter()
    engine = load(folder, threads=threads, memory=memory)
    engine.generate(prompt, max_new_tokens=1)
    seconds = perf_counter() - began
    if not isinstance(engine, Engine):
        return settings.on_gpu(folder, engine, densities, skip_zeros), seconds
    weights = engine.weights
    del engine  # its sessions: those that are measured are made anew, over the same weights
    flags = (False, True) if skip_zeros is None else (skip_zeros,)
    return settings.on_cpu(folder, manifest, densities, flags, threads, weights), seconds


def _profiled(side: Side, counter: Counter, batch: int) -> dict[Setting, Shares]:
    """Of a run behind a prompt that is one run of the graph, however many its rows are."""
    from shadowc.runtime.decoder import PROMPT_CHUNKS, chunks
    from shadowc.runtime.engine import Engine

    found: dict[Setting, Shares] = {}
    for variant in side.variants:
        if isinstance(variant.engine, Engine):
            fitting = next(chunks(0, CONTEXT_TOKENS, batch, PROMPT_CHUNKS))[1]
            prompt = prompt_ids(variant.engine.manifest, fitting, batch)
            shares = profile(variant, variant.engine, prompt)
            found |= dict(zip(map(variant.setting, variant.densities), shares, strict=True))
        counter.more(len(variant.densities))
    return found


def _row(
    setting: Setting, rounds: Sequence[Sequence[Turn]], base: Sequence[float], size: float, shares: Shares | None
) -> BenchRow:
    times = [mean_seconds(turns) for turns in rounds]
    steady = [kept for turns in rounds if (kept := [turn for turn in turns if turn.steady])]
    seconds = median(times)
    return BenchRow(
        label=setting.label,
        density_heads=setting.density.heads,
        density_neurons=setting.density.neurons,
        skip_zeros=setting.skip_zeros,
        mask=setting.mask,
        ms_per_token=seconds * 1e3,
        ms_lowest=min(times) * 1e3,
        ms_highest=max(times) * 1e3,
        ms_by_round=tuple(one * 1e3 for one in times),
        megabytes_per_token=size / 1e6,
        floor_ms=median(floor_seconds(turns, size) for turns in rounds) * 1e3,
        above_floor_ms=_median_of((mean_seconds(turns) - floor_seconds(turns, size)) * 1e3 for turns in steady),
        gigabytes_per_second=size / seconds / 1e9,
        share_of_stream=_median_of(FLOOR_SHARE * floor_seconds(turns, size) / mean_seconds(turns) for turns in steady),
        steady_turns=sum(map(len, steady)) / sum(map(len, rounds)),
        turns=tuple(
            TurnRow(number, turn.seconds * 1e3, turn.pace / 1e9, turn.steady)
            for number, turns in enumerate(rounds, start=1)
            for turn in turns
        ),
        speedup=median(first / own for first, own in zip(base, times, strict=True)),
        shares=shares,
    )


def floor_seconds(turns: Sequence[Turn], size: float) -> float:
    """Seconds per token that its bytes take at FLOOR_SHARE of the pace of the turns."""
    whole = sum(turn.tokens * size / (FLOOR_SHARE * turn.pace) for turn in turns)
    return whole / sum(turn.tokens for turn in turns)


def _median_of(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None


def _prompt_row(variant: Variant, rounds: Sequence[tuple[float, float]], tokens: int) -> PromptRow:
    whole = [seconds * 1e3 for seconds, _ in rounds]
    return PromptRow(
        label=variant.name,
        skip_zeros=variant.skip_zeros,
        mask=variant.mask,
        first_token_ms=median(whole),
        ms_lowest=min(whole),
        ms_highest=max(whole),
        tokens_per_second=median(tokens / seconds for _, seconds in rounds),
    )


def _break_evens(side: Side, times: Sequence[Sequence[float]]) -> list[BreakEvenRow]:
    by_setting = {setting: times[index] for index, (setting, _) in enumerate(side.jobs)}
    twins = {setting.skip_zeros: rounds for setting, rounds in by_setting.items() if setting.mask == "none"}
    found = []
    for variant in side.variants:
        even = [density for density in variant.densities if density.heads == density.neurons]
        if variant.mask == "none" or variant.skip_zeros not in twins or not even:
            continue
        twin = twins[variant.skip_zeros]
        of = {density.heads: by_setting[variant.setting(density)] for density in even}
        even_at = break_even(
            (kept, median(own / base for own, base in zip(times, twin, strict=True))) for kept, times in of.items()
        )
        cost = mask_cost(of[1.0], twin) if 1.0 in of else None
        found.append(BreakEvenRow(variant.name, variant.skip_zeros, variant.mask, even_at, cost))
    return found
