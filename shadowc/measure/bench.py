# SPDX-License-Identifier: Apache-2.0
"""Decode speed at several densities, beside the bytes that the kernels read and the machine's bandwidth.

All settings run interleaved, round by round, and the stream bandwidth is measured in every round, because
a shared machine drifts: medians and ratios within the run are what may be quoted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from shadowc.spec.density import Density
from shadowc.spec.errors import InternalError
from shadowc.spec.progress import NullProgress, Progress

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.runtime.causal import CausalEngine
    from shadowc.runtime.weights_memory import Kind, WeightsMemory

STREAM_BYTES = 1 << 30
STREAM_REPEATS = 2
PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table before it is measured."""

    label: str
    density: Density
    skip_zeros: bool


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One setting, medians over the rounds."""

    label: str
    density_heads: float
    density_neurons: float
    skip_zeros: bool
    ms_per_token: float
    ms_lowest: float
    ms_highest: float
    megabytes_per_token: float
    """Counted by the kernels, plus the LM head, the predictor, norms and biases."""
    gigabytes_per_second: float
    share_of_stream: float
    """Median over the rounds of achieved over stream bandwidth."""
    speedup: float
    """Median over the rounds of the first setting's time over this one's."""


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
    stream_gigabytes_per_second: float
    memory: str | None
    """How the weights lie in memory, "shared" or "private"; None on a GPU."""
    large_pages: float | None
    """Share of them in large pages; None where the system does not tell."""
    rows: tuple[BenchRow, ...]


def bench(
    folder: Path,
    *,
    densities: Sequence[Density],
    rounds: int = 5,
    tokens: int = 24,
    threads: int | None = None,
    memory: Kind | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measures batch-1 decoding at every density; on the CPU with `skip_zeros` off and on.

    Args:
        folder: the engine.
        densities: on the CPU each is measured without and with skip_zeros. The first row is the base of every
            speed-up. On the CPU it is the dense twin: the same weights and kernels without predictor and masks; on a
            GPU, whose plan cannot be changed any more, the same engine at density 1.
        rounds: how often the whole table is measured.
        tokens: tokens generated per measurement; the first one is not timed.
        threads: intra-op threads; None: one per core.
        memory: where the weights lie, see `shadowc.load`; for target cpu.
        progress: told about runs.

    Raises:
        ShadowcError: the engine cannot be loaded here, see `shadowc.load`.
    """
    from shadowc.runtime.load import read_manifest

    progress = progress or NullProgress()
    manifest = read_manifest(folder)
    if manifest.tensorrt is None:
        side = _on_cpu(folder, densities, threads, memory)
    else:
        side = _on_gpu(folder, densities, threads, memory)
    stream, times, sizes = _measure(side.jobs, side.bandwidth, rounds, tokens, progress)
    rows = tuple(
        _row(setting, times[index], times[0], sizes[index], stream) for index, (setting, _) in enumerate(side.jobs)
    )
    return BenchReport(
        model=manifest.model.name,
        weights=manifest.weights,
        threads=side.threads,
        isa=side.isa,
        rounds=rounds,
        tokens=tokens,
        stream_gigabytes_per_second=median(stream) / 1e9,
        memory=None if side.weights is None else side.weights.kind,
        large_pages=None if side.weights is None else side.weights.large_pages,
        rows=rows,
    )


@dataclass(frozen=True, slots=True)
class _Side:
    """What is measured, and where."""

    jobs: Sequence[tuple[Setting, CausalEngine]]
    bandwidth: Callable[[], float]
    """Measures how many bytes per second the memory gives."""
    threads: int
    isa: str
    weights: WeightsMemory | None = None


def _on_cpu(folder: Path, densities: Sequence[Density], threads: int | None, memory: Kind | None) -> _Side:
    from shadowc.runtime.load import load_cpu, read_manifest

    first = load_cpu(folder, threads=threads, mask="token", memory=memory)
    engines = {flag: first.with_skip_zeros(flag) for flag in (False, True)}
    jobs: list[tuple[Setting, CausalEngine]] = [
        (Setting(_label("dense twin", flag), Density(), flag), engine.dense_twin()) for flag, engine in engines.items()
    ]
    sparsity = read_manifest(folder).sparsity
    kinds = {"": engines}
    if sparsity is not None and sparsity.mask == "sequence":
        again = f", fresh every {sparsity.refresh}" if sparsity.refresh else ""
        kinds[f", a mask per sequence{again}"] = {
            flag: load_cpu(folder, threads=threads, skip_zeros=flag, memory=first.weights) for flag in engines
        }
    if sparsity is not None:
        jobs += [
            (Setting(_label(f"{_shares(density)}{kind}", flag), density, flag), engine)
            for density in densities
            for kind, loaded in kinds.items()
            for flag, engine in loaded.items()
        ]
    library, used = first.op_library, first.threads
    return _Side(
        jobs, lambda: library.stream_read(STREAM_BYTES, used, STREAM_REPEATS), used, library.isa, first.weights
    )


def _on_gpu(folder: Path, densities: Sequence[Density], threads: int | None, memory: Kind | None) -> _Side:
    from shadowc.runtime.load import load
    from shadowc.runtime.tensorrt.engine import TensorRtEngine

    engine = load(folder, threads=threads, memory=memory)
    if not isinstance(engine, TensorRtEngine):
        raise InternalError(f"{folder} was loaded as {type(engine).__name__}")
    chosen = [Density(), *(density for density in densities if density != Density())]
    if engine.manifest.sparsity is None:
        chosen = chosen[:1]
    jobs = [(Setting(_shares(density), density, engine.skip_zeros), engine) for density in chosen]
    return _Side(jobs, lambda: engine.copy_bandwidth(STREAM_BYTES, STREAM_REPEATS), 0, engine.device_name)


def _shares(density: Density) -> str:
    return f"{density.heads:g} heads, {density.neurons:g} neurons"


def _label(name: str, skip_zeros: bool) -> str:
    return f"{name}, skip zeros" if skip_zeros else name


def _measure(
    jobs: Sequence[tuple[Setting, CausalEngine]],
    bandwidth: Callable[[], float],
    rounds: int,
    tokens: int,
    progress: Progress,
) -> tuple[list[float], list[list[float]], list[float]]:
    """Stream bandwidth per round [bytes/s], then per job its seconds per token by round, and its bytes per token."""
    vocab = jobs[0][1].manifest.model.vocab
    prompt = np.random.default_rng(0).integers(4, vocab, (1, PROMPT_TOKENS), dtype=np.int64)
    stream: list[float] = []
    times: list[list[float]] = [[] for _ in jobs]
    sizes = [0.0] * len(jobs)
    with progress.stage("bench"):
        for index, (setting, engine) in enumerate(jobs):  # first touch of the mapped weights, not timed
            _decode(engine, prompt, 4, setting.density)
            progress.advance(index + 1, len(jobs) * (rounds + 1), "runs")
        for turn in range(rounds):
            stream.append(bandwidth())
            for index, (setting, engine) in enumerate(jobs):
                seconds, sizes[index] = _decode(engine, prompt, tokens, setting.density)
                times[index].append(seconds)
                progress.advance(len(jobs) * (turn + 1) + index + 1, len(jobs) * (rounds + 1), "runs")
    return stream, times, sizes


def _decode(engine: CausalEngine, prompt: npt.NDArray[np.int64], tokens: int, density: Density) -> tuple[float, float]:
    engine.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, density=density)
    stats = engine.last_stats
    return stats.seconds / stats.tokens, stats.bytes_read


def _row(
    setting: Setting, times: Sequence[float], base: Sequence[float], size: float, stream: Sequence[float]
) -> BenchRow:
    seconds = median(times)
    return BenchRow(
        label=setting.label,
        density_heads=setting.density.heads,
        density_neurons=setting.density.neurons,
        skip_zeros=setting.skip_zeros,
        ms_per_token=seconds * 1e3,
        ms_lowest=min(times) * 1e3,
        ms_highest=max(times) * 1e3,
        megabytes_per_token=size / 1e6,
        gigabytes_per_second=size / seconds / 1e9,
        share_of_stream=median(size / own / limit for own, limit in zip(times, stream, strict=True)),
        speedup=median(first / own for first, own in zip(base, times, strict=True)),
    )
