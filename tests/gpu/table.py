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
from pathlib import Path
from typing import Any

from tests.gpu.timing import BLOCK, CAPACITY, FILLED, SHAPES, Bench, Shape, Timed

DENSITIES = (1.0, 0.5, 0.2, 0.1)
BATCHES = (1, 4, 16)
GOAL_SPEEDUP, GOAL_SHARE, GOAL_MICROSECONDS = 1.7, 0.8, 10.0
"""Over cuBLAS at density 0.5 and batch 1; of the bandwidth there; of a selection per layer."""
HEAD = ("model", "kernel", "weights", "batch", "density", "us", "MB", "GB/s", "of roofline", "cuBLAS us", "speed-up")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    model: str
    kernel: str
    weights: str
    batch: int
    density: float
    timed: Timed
    dense: Timed | None

    @property
    def speedup(self) -> float | None:
        return None if self.dense is None else self.dense.microseconds / self.timed.microseconds

    def cells(self, bandwidth: float) -> tuple[str, ...]:
        share = self.timed.gigabytes_per_second * 1e9 / bandwidth
        return (
            self.model, self.kernel, self.weights, str(self.batch), f"{self.density:g}",
            f"{self.timed.microseconds:.1f}", f"{self.timed.bytes / 1e6:.1f}",
            f"{self.timed.gigabytes_per_second:.0f}", f"{100 * share:.0f} %",
            "-" if self.dense is None else f"{self.dense.microseconds:.1f}",
            "-" if self.speedup is None else f"{self.speedup:.2f}x",
        )  # fmt: skip


def rows(bench: Bench, cublas: Any, shapes: Sequence[Shape] = SHAPES, batches: Sequence[int] = BATCHES,
         densities: Sequence[float] = DENSITIES) -> Iterator[Row]:  # fmt: skip
    """Measure everything."""
    for shape in shapes:
        E, F = shape.hidden, shape.neurons
        for batch in batches:
            dense = {"ffn": None, "attention": None}
            if cublas is not None:
                dense = {
                    "ffn": bench.dense([(F, E), (E, F)], batch, cublas),
                    "attention": bench.dense([(3 * E, E), (E, E)], batch, cublas),
                }
            for kernel, measure in (("ffn", bench.ffn), ("attention", bench.attention)):
                for weights in ("fp16", "int8"):
                    for density in densities:
                        timed = measure(shape, density, batch, int8=weights == "int8")
                        yield Row(shape.model, kernel, weights, batch, density, timed, dense[kernel])
            for kind, units in (("heads", shape.heads), ("neurons", -(-F // BLOCK))):
                timed = bench.select(shape, units, 0.5, batch)
                yield Row(shape.model, f"select {kind}", "-", batch, 0.5, timed, None)


def goals(found: Sequence[Row], bandwidth: float) -> list[str]:
    """One sentence per goal and model, with the number that decides it."""
    said = []
    for model in dict.fromkeys(row.model for row in found):
        mine = [row for row in found if row.model == model and row.batch == 1]
        half = [row for row in mine if row.density == 0.5 and row.weights == "fp16"]
        time, size = sum(row.timed.microseconds for row in half), sum(row.timed.bytes for row in half)
        if half and all(row.dense is not None for row in half):
            speedup = sum(row.dense.microseconds for row in half if row.dense) / time
            said.append(_goal(model, "FFN and attention at density 0.5 over cuBLAS", speedup, GOAL_SPEEDUP, "x"))
        if half:
            said.append(_goal(model, "share of the bandwidth there", size / time * 1e6 / bandwidth, GOAL_SHARE, ""))
        layers = next((shape.layers - 1 for shape in SHAPES if shape.model == model), 1)
        select = sum(row.timed.microseconds for row in mine if row.kernel.startswith("select")) / layers
        if select:
            said.append(_goal(model, "selection per layer", select, GOAL_MICROSECONDS, " us", below=True))
    return said


def _goal(model: str, what: str, found: float, wanted: float, unit: str, *, below: bool = False) -> str:
    met = found <= wanted if below else found >= wanted
    bound = "at most" if below else "at least"
    return f"{model}: {what} {found:.2f}{unit}, wanted {bound} {wanted:g}{unit}: {'met' if met else 'MISSED'}"


def markdown(card: str, bandwidth: float, found: Sequence[Row], day: str) -> str:
    """The whole file."""
    lines = [
        f"# Kernel times on {card}",
        "",
        f"{day}; one layer, one new token per row, {FILLED} of {CAPACITY} slots filled, blocks of {BLOCK} neurons. "
        f"A copy on the device moves {bandwidth / 1e9:.0f} GB/s, the roofline here. MB: weights and scales, counted by "
        "the kernel, and keys and values of active heads; a selection's are its scores. cuBLAS: the dense fp16 "
        "products of the same layer, without the attention between them.",
        "",
        *(f"- {sentence}" for sentence in goals(found, bandwidth)),
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{'|'.join([' --- '] * 3 + [' ---: '] * (len(HEAD) - 3))}|",
        *(f"| {' | '.join(row.cells(bandwidth))} |" for row in found),
    ]
    return "\n".join(lines) + "\n"


def main(folder: Path, say: Say = print) -> Path:
    """Measure on the GPU and write the file.

    Raises:
        SetupError: there is no GPU.
        UnavailableError: there is no nvcc.
    """
    from shadowc.runtime.tensorrt.cuda import open_cuda
    from tests.gpu import build
    from tests.gpu.cublas import WORKSPACE_BYTES, Cublas

    cuda = open_cuda()
    bench = Bench(cuda, ctypes.CDLL(str(build.build("sm_{}{}".format(*cuda.gpu.capability)))))
    try:
        cublas = Cublas(cuda.stream, cuda.allocate(WORKSPACE_BYTES))
    except OSError as error:
        cublas = None
        say(f"without cuBLAS: {error}")
    bandwidth = bench.bandwidth()
    found = []
    for row in rows(bench, cublas):
        found.append(row)
        say("  ".join(row.cells(bandwidth)))
    path = folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', cuda.gpu.name).strip('-').lower()}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(cuda.gpu.name, bandwidth, found, datetime.datetime.now(datetime.UTC).date().isoformat()))
    for sentence in goals(found, bandwidth):
        say(sentence)
    say(f"wrote {path}")
    return path


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "build" / "gpu")
