# SPDX-License-Identifier: Apache-2.0
"""ms per token against density as a picture, and what all plots of this project share.

matplotlib is optional: a plot without it is refused with the command that installs it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowc.spec.errors import InputError, SetupError

if TYPE_CHECKING:
    from shadowc.measure.bench import BenchReport, BenchRow
    from shadowc.spec.density import Density

INK, SECOND, FLOOR, TWIN = "#0072b2", "#009e73", "#555555", "#d55e00"
MEASURED, AT_FLOOR, DENSE_TWIN = "measured", "bytes at 0.9 of the stream", "dense twin"
SUFFIXES = (".png", ".svg", ".pdf")
_PANEL_INCHES = 3.4
_ONLY = 1.6
"""Times as large: a picture of one model."""
_LETTERS_PER_INCH = 17
"""Of the note."""


@dataclass(frozen=True, slots=True)
class Point:
    """One density of a curve; times in milliseconds."""

    share: float
    """Of heads and neurons kept."""
    ms: float
    lowest: float
    highest: float
    floor_ms: float


def check(path: Path, densities: Sequence[Density], *, sparse: bool) -> None:
    """Refuse, before anything is measured, what could not be drawn.

    Args:
        path: of the picture.
        densities: that will be measured.
        sparse: the engine has a predictor.

    Raises:
        InputError: the path is no picture's, or there would be no curve.
        SetupError: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"a plot is a file {', '.join(SUFFIXES)}; found {path}", hint=f"--plot {path.stem}.png")
    if not sparse:
        raise InputError(
            "a dense engine has no densities to plot", hint="leave --plot out, or compile without --predictor none"
        )
    if not any(density.heads == density.neurons for density in densities):
        raise InputError(
            "the plot has densities that keep as many heads as neurons, and none was given", hint="--sweep"
        )
    _figure_type()


def against_density(report: BenchReport, path: Path) -> None:
    """Draw a panel for rows without, one for rows with skipped zeros: curves, floors and the dense twin.

    Raises:
        SetupError: matplotlib is not installed.
    """
    flags = tuple(dict.fromkeys(row.skip_zeros for row in report.rows))
    drawn, axes = figure(1, len(flags), scale=_ONLY)
    for flag, panel in zip(flags, axes, strict=True):
        rows = [row for row in report.rows if row.skip_zeros == flag]
        for mask, colour in (("token", INK), ("sequence", SECOND)):
            points = _points(row for row in rows if row.mask == mask)
            if points:
                curve(panel, points, colour, f"a mask per {mask}")
        for twin in (row for row in rows if row.mask == "none"):
            panel.axhline(twin.ms_per_token, color=TWIN, linestyle=":", label=DENSE_TWIN)
        label_axes(panel, f"{report.model}, {report.weights}{', skip zeros' if flag else ''}")
        panel.legend(fontsize=7, loc="lower right")
    save(drawn, _note(report), path)


def curve(panel: Any, points: Sequence[Point], colour: str, label: str = MEASURED) -> None:
    """Draw one curve: its points, the range of their rounds, and their floor."""
    shares = [point.share for point in points]
    lowest, highest = [point.lowest for point in points], [point.highest for point in points]
    panel.fill_between(shares, lowest, highest, color=colour, alpha=0.2)
    panel.plot(shares, [point.ms for point in points], "o-", color=colour, markersize=3, label=label)
    floor = FLOOR if label == MEASURED else colour
    panel.plot(shares, [point.floor_ms for point in points], "--", color=floor, linewidth=1, label=AT_FLOOR)


def label_axes(panel: Any, title: str) -> None:
    """Name a panel and its axes; both start at zero."""
    panel.set(title=title, xlabel="heads and neurons kept", ylabel="ms per token", xlim=(0, 1.03))
    panel.set_ylim(bottom=0)


def require() -> None:
    """Refuse to draw before anything is measured for it.

    Raises:
        SetupError: matplotlib is not installed.
    """
    _figure_type()


def figure(rows: int, columns: int, scale: float = 1.0) -> tuple[Any, list[Any]]:
    """A figure and its panels, row by row.

    Raises:
        SetupError: matplotlib is not installed.
    """
    size = _PANEL_INCHES * scale
    drawn = _figure_type()(figsize=(size * columns, size * 0.85 * rows), dpi=150, layout="constrained")
    return drawn, list(drawn.subplots(rows, columns, squeeze=False).flat)


def save(drawn: Any, note: str, path: Path) -> None:
    """Write a figure with a note at its foot."""
    drawn.supxlabel(textwrap.fill(note, int(_LETTERS_PER_INCH * drawn.get_figwidth())), fontsize=6, color=FLOOR)
    drawn.savefig(path)


def _figure_type() -> Any:
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise SetupError("matplotlib is not installed", hint="pip install 'shadowc[plot]'") from error
    return Figure


def _points(rows: Iterable[BenchRow]) -> list[Point]:
    """Of the rows that keep as many heads as neurons, by density."""
    even = [row for row in rows if row.density_heads == row.density_neurons]
    return [
        Point(row.density_heads, row.ms_per_token, row.ms_lowest, row.ms_highest, row.floor_ms)
        for row in sorted(even, key=lambda row: row.density_heads)
    ]


def _note(report: BenchReport) -> str:
    where = f"{report.isa}, {report.threads} threads" if report.threads else report.isa
    stream = report.stream_by_round
    parts = [
        f"{where}; batch {report.batch}, {report.tokens} tokens a sample, "
        f"medians of {report.rounds} interleaved rounds",
        f"the stream read {report.stream_gigabytes_per_second:.1f} GB/s ({min(stream):.1f} to {max(stream):.1f})",
    ]
    return "; ".join([*parts, report.noise.warning] if report.noise.warning else parts)
