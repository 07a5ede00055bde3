# SPDX-License-Identifier: Apache-2.0
"""What bench measures: the variants of one engine, at which densities each runs, and the machine's bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shadowc.runtime.cores import usable_cores
from shadowc.spec.density import Density
from shadowc.spec.errors import InternalError, UnsupportedError

if TYPE_CHECKING:
    from shadowc.runtime.causal import CausalEngine
    from shadowc.runtime.engine import Engine
    from shadowc.runtime.library import OpLibrary
    from shadowc.runtime.weights_memory import Kind, WeightsMemory
    from shadowc.spec.manifest import EngineManifest

STREAM_BYTES = 1 << 30
STREAM_REPEATS = 2
PACE_BYTES = 1 << 28
"""Read between two turns: more than the caches of most machines hold, and little time beside a turn's. Of two reads the
better counts, as of the stream: in the first, threads that have just begun were seen to take a tenth longer."""
LEAST_WEIGHTS = 1 << 29
"""Fewer bytes of weights may come out of caches, and are not measured."""

Mask = Literal["none", "token", "sequence"]
"""What a mask holds for; "none": the dense twin."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table before it is measured."""

    label: str
    density: Density
    skip_zeros: bool
    mask: Mask


@dataclass(frozen=True, slots=True)
class Variant:
    """An engine and the settings under which it is measured; all but density is the same in them."""

    label: str
    mask: Mask
    skip_zeros: bool
    engine: CausalEngine
    densities: tuple[Density, ...]

    def setting(self, density: Density) -> Setting:
        """The row of a density."""
        name = self.label if self.mask == "none" else f"{_shares(density)}{_behind(self.label)}"
        return Setting(_label(name, self.skip_zeros), density, self.skip_zeros, self.mask)

    @property
    def name(self) -> str:
        """The variant among the others, whatever the density."""
        return _label(self.label, self.skip_zeros)


@dataclass(frozen=True, slots=True)
class Side:
    """What is measured, and where."""

    variants: tuple[Variant, ...]
    jobs: tuple[tuple[Setting, Variant], ...]
    """The rows, in the order in which they are measured and shown; the first is the base of every speed-up."""
    bandwidth: Callable[[], float]
    """Measures how many bytes per second the memory gives."""
    pace: Callable[[], float] | None
    """The same of one moment; None where that of the round has to do: on a GPU, and for weights that caches may hold,
    which a read between turns would push out."""
    threads: int
    isa: str
    takes_turns: bool
    """Several texts can be under way at once: every one has its own cache."""
    weights: WeightsMemory | None = None
    weights_bandwidth: Callable[[], float] | None = None
    """The same of the memory in which the weights lie; None: they are too few, or on a GPU."""
    round_trip: Callable[[], float | None] = lambda: None
    """Nanoseconds between two threads; None where these are not on the only two cores there are: others may meet on
    any, and tell nothing about the operators' threads."""


PER_TOKEN = "a mask per token"
PER_SEQUENCE = "a mask per sequence"


def on_cpu(
    folder: Path,
    manifest: EngineManifest,
    densities: Sequence[Density],
    flags: Sequence[bool],
    threads: int | None,
    memory: Kind | WeightsMemory | None,
) -> Side:
    """The dense twin, and the engine at every density, with masks per token and per sequence where it has them.

    Args:
        folder: the engine, already checked.
        manifest: its engine.json.
        densities: in the order in which they are measured.
        flags: values of `skip_zeros`, at least one.
        threads: intra-op threads; None: one per core.
        memory: where the weights lie; all engines share them.
    """
    from shadowc.runtime.load import load_cpu

    def loaded(flag: bool, mask: Literal["token"] | None, weights: Kind | WeightsMemory | None) -> Engine:
        return load_cpu(folder, threads=threads, verify=False, skip_zeros=flag, mask=mask, memory=weights)

    first = loaded(flags[0], "token", memory)
    engines = {flag: first if flag == flags[0] else loaded(flag, "token", first.weights) for flag in flags}
    twins = [Variant("dense twin", "none", flag, engine.dense_twin(), (Density(),)) for flag, engine in engines.items()]
    sparsity, wanted = manifest.sparsity, tuple(dict.fromkeys(densities))
    sparse: list[Variant] = []
    if sparsity is not None:
        sparse += [Variant(PER_TOKEN, "token", flag, engine, wanted) for flag, engine in engines.items()]
    if sparsity is not None and sparsity.mask == "sequence":
        again = f", fresh every {sparsity.refresh}" if sparsity.refresh else ""
        sparse += [
            Variant(f"{PER_SEQUENCE}{again}", "sequence", flag, loaded(flag, None, first.weights), wanted)
            for flag in flags
        ]
    jobs = [(twin.setting(Density()), twin) for twin in twins]
    jobs += [(variant.setting(density), variant) for density in wanted for variant in sparse]
    library, used = first.op_library, first.threads
    return Side(
        variants=(*twins, *sparse),
        jobs=tuple(jobs),
        bandwidth=lambda: library.stream_read(STREAM_BYTES, used, STREAM_REPEATS),
        pace=pace_of(library, first.weights, used),
        threads=used,
        isa=library.isa,
        takes_turns=True,
        weights=first.weights,
        weights_bandwidth=_over_weights(library, first.weights, used),
        round_trip=library.round_trip if used == usable_cores() == 2 else lambda: None,
    )


def pace_of(library: OpLibrary, weights: WeightsMemory | None, threads: int) -> Callable[[], float] | None:
    """What measures the memory's bandwidth in a moment, bytes per second; None for weights that caches may hold.

    It reads memory that is kept for it: fresh memory takes the system longer than reading it.
    """
    from shadowc.runtime.weights_memory import private_memory

    if weights is None or weights.content.size < LEAST_WEIGHTS:
        return None
    memory = private_memory(PACE_BYTES)
    memory[:] = 1  # or all its pages would be one page of zeros
    return lambda: library.stream_over(memory, threads, STREAM_REPEATS)


def _over_weights(library: OpLibrary, weights: WeightsMemory | None, threads: int) -> Callable[[], float] | None:
    if weights is None or weights.content.size < LEAST_WEIGHTS:
        return None

    def bandwidth() -> float:
        weights.require_unchanged()
        return library.stream_over(weights.content, threads, STREAM_REPEATS)

    return bandwidth


def on_gpu(folder: Path, engine: CausalEngine, densities: Sequence[Density], skip_zeros: bool | None) -> Side:
    """The engine at density 1 and at every other one: a plan has no dense twin, and skips zeros or does not."""
    from shadowc.runtime.tensorrt.engine import TensorRtEngine

    if not isinstance(engine, TensorRtEngine):
        raise InternalError(f"{folder} was loaded as {type(engine).__name__}")
    if skip_zeros not in (None, engine.skip_zeros):
        raise UnsupportedError(
            f"the plans of {folder} {'skip' if engine.skip_zeros else 'do not skip'} zeros; they cannot be changed",
            hint="leave --skip-zeros and --no-skip-zeros out",
        )
    chosen = tuple(dict.fromkeys((Density(), *densities)))
    if engine.manifest.sparsity is None:
        chosen = chosen[:1]
    variant = Variant(PER_TOKEN, "token", engine.skip_zeros, engine, chosen)
    jobs = tuple((Setting(_shares(density), density, engine.skip_zeros, "token"), variant) for density in chosen)
    bandwidth = partial(engine.copy_bandwidth, STREAM_BYTES, STREAM_REPEATS)
    return Side((variant,), jobs, bandwidth, None, threads=0, isa=engine.device_name, takes_turns=False)


def _shares(density: Density) -> str:
    return f"{density.heads:g} heads, {density.neurons:g} neurons"


def _behind(label: str) -> str:
    """Masks per token go without saying."""
    return "" if label == PER_TOKEN else f", {label}"


def _label(name: str, skip_zeros: bool) -> str:
    return f"{name}, skip zeros" if skip_zeros else name
