# SPDX-License-Identifier: Apache-2.0
"""The table of kernel times beside roofline and cuBLAS, as Markdown with the card's name.

Run as a program: `python -m tests.gpu.table [folder]` writes build/gpu/CARD.md, and says which goals were met.
"""

from __future__ import annotations

import ctypes
import datetime
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.gpu.goals import Goal, Row, goals
from tests.gpu.timing import BLOCK, CAPACITY, FILLED, SHAPES, Bench, Shape

DENSITIES = (1.0, 0.5, 0.2, 0.1)
BATCHES = (1, 4, 16)
HEAD = ("model", "kernel", "weights", "batch", "density", "us", "MB", "GB/s", "of roofline", "cuBLAS us", "speed-up",
        "bytes allow")  # fmt: skip
NO_TESTS = "only times were taken, no tests ran"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a measurement left."""

    path: Path
    goals: tuple[Goal, ...]
    not_run: tuple[str, ...]
    """What could not be measured, and why."""


def rows(bench: Bench, cublas: Any, shapes: Sequence[Shape] = SHAPES, batches: Sequence[int] = BATCHES,
         densities: Sequence[float] = DENSITIES) -> Iterator[Row]:  # fmt: skip
    """Measure everything."""
    for shape in shapes:
        for batch in batches:
            dense_ffn = None if cublas is None else bench.dense_ffn(shape, batch, cublas)
            dense_attention = None if cublas is None else bench.dense_attention(shape, batch, cublas)
            for kernel, measure, dense in (
                ("ffn", bench.ffn, dense_ffn),
                ("attention, kv=all", bench.attention, dense_attention),
                ("attention, kv=active", partial(bench.attention, kv_active=True), dense_attention),
            ):
                for weights in ("fp16", "int8"):
                    for density in densities:
                        timed = measure(shape, density, batch, int8=weights == "int8")
                        yield Row(shape.model, kernel, weights, batch, density, timed, dense)
            for kind, units in (("heads", shape.heads), ("neurons", -(-shape.neurons // BLOCK))):
                timed = bench.select(shape, units, 0.5, batch)
                yield Row(shape.model, f"select {kind}", "-", batch, 0.5, timed, None)


def cells(row: Row, bandwidth: float) -> tuple[str, ...]:
    """A line of the table.

    Args:
        row: the measurement.
        bandwidth: bytes per second, the roofline.
    """
    share = row.timed.gigabytes_per_second * 1e9 / bandwidth
    return (
        row.model, row.kernel, row.weights, str(row.batch), f"{row.density:g}",
        f"{row.timed.microseconds:.1f}", f"{row.timed.bytes / 1e6:.1f}",
        f"{row.timed.gigabytes_per_second:.0f}", f"{100 * share:.0f} %",
        "-" if row.dense is None else f"{row.dense.microseconds:.1f}",
        "-" if row.speedup is None else f"{row.speedup:.2f}x",
        "-" if row.dense is None else f"{row.dense.bytes / row.timed.bytes:.2f}x",
    )  # fmt: skip


def markdown(card: str, bandwidth: float, found: Sequence[Row], day: str, tests: str = NO_TESTS,
             not_run: Sequence[str] = ()) -> str:  # fmt: skip
    """The whole file."""
    lines = [
        f"# Kernel times on {card}",
        "",
        f"{day}; one layer, one new token per row, {FILLED} of {CAPACITY} slots filled, blocks of {BLOCK} neurons. "
        f"A copy on the device moves {bandwidth / 1e9:.0f} GB/s, the roofline here. MB: weights and scales, counted by "
        "the kernel, and keys and values of active heads; a selection's are its scores. cuBLAS: the dense fp16 "
        "products of the same layer, in attention also those with all keys and values, without the softmax between. "
        "Bytes allow: the speed-up if both sides moved their bytes equally fast.",
        "",
        f"- Tests: {tests}.",
        *(f"- Not run: {what}." for what in not_run),
        "",
        *(f"- {goal.sentence}" for goal in goals(found, bandwidth)),
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{'|'.join([' --- '] * 3 + [' ---: '] * (len(HEAD) - 3))}|",
        *(f"| {' | '.join(cells(row, bandwidth))} |" for row in found),
    ]
    return "\n".join(lines) + "\n"


def main(folder: Path, say: Say = print, tests: str = NO_TESTS, not_run: Sequence[str] = ()) -> Outcome:
    """Measure on the GPU and write the file.

    Args:
        folder: where the file goes.
        say: hears every line as it is measured.
        tests: how the tests went, for the file.
        not_run: which of them did not run and why, for the file.

    Raises:
        SetupError: there is no GPU.
        UnavailableError: there is no nvcc.
    """
    from shadowc.runtime.tensorrt.cuda import open_cuda
    from tests.gpu import build
    from tests.gpu.cublas import WORKSPACE_BYTES, Cublas

    cuda = open_cuda()
    bench = Bench(cuda, ctypes.CDLL(str(build.build("sm_{}{}".format(*cuda.gpu.capability)))))
    cublas, missing = None, []
    try:
        cublas = Cublas(cuda.stream, cuda.allocate(WORKSPACE_BYTES))
    except OSError as error:
        missing.append(f"the comparison with cuBLAS: {error}")
    bandwidth = bench.bandwidth()
    found = []
    for row in rows(bench, cublas):
        found.append(row)
        say("  ".join(cells(row, bandwidth)))
    path = folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', cuda.gpu.name).strip('-').lower()}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    path.write_text(markdown(cuda.gpu.name, bandwidth, found, day, tests, [*not_run, *missing]), encoding="utf-8")
    judged = goals(found, bandwidth)
    for goal in judged:
        say(goal.sentence)
    say(f"wrote {path}")
    return Outcome(path, tuple(judged), tuple(missing))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "build" / "gpu")
