# SPDX-License-Identifier: Apache-2.0
"""The two plots. matplotlib comes with `pip install -e '.[plot]'`; a plot without it is refused with that command."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.curves.series import Series
from shadowc.spec.errors import SetupError

INK, FLOOR, TWIN = "#0072b2", "#555555", "#d55e00"
COLOURS = (TWIN, INK, "#009e73", "#cc79a7")
SHOWN = ("0.5/0.5", "0.5/0.2", "0.2/0.2")
"""Settings of the plot against size, where they were measured."""
_PANEL_INCHES, _COLUMNS = 3.4, 3
_LETTERS_PER_INCH = 17
"""Of the note."""


def against_density(curves: Sequence[Series], note: str, path: Path) -> None:
    """One panel per model: ms per token over the share kept, with the floor and the dense twin.

    Raises:
        SetupError: matplotlib is not installed.
    """
    columns = min(_COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = _figure(rows, columns)
    for curve, panel in zip(curves, axes, strict=False):
        points = curve.ladder()
        shares, found = [share for share, _ in points], [figure for _, figure in points]
        panel.fill_between(shares, [one.lowest for one in found], [one.highest for one in found], color=INK, alpha=0.2)
        panel.plot(shares, [one.ms for one in found], "o-", color=INK, markersize=3, label="measured")
        panel.plot(shares, [one.floor_ms for one in found], "--", color=FLOOR, label="bytes at 0.9 of the stream")
        panel.axhline(curve.twin.ms, color=TWIN, linestyle=":", label="dense twin")
        panel.set(title=curve.model, xlabel="heads and neurons kept", ylabel="ms per token", xlim=(0, 1.03))
        panel.set_ylim(bottom=0)
    for panel in axes[len(curves) :]:
        panel.set_visible(False)
    axes[0].legend(fontsize=7)
    _save(figure, note, path)


def against_size(curves: Sequence[Series], note: str, path: Path) -> None:
    """Ms per token over the bytes of a dense token, both logarithmic: one line per setting, floors dashed.

    Raises:
        SetupError: matplotlib is not installed.
    """
    figure, (panel,) = _figure(1, 1, scale=1.7)
    sizes = [curve.twin.size / 1e6 for curve in curves]
    lines = {"dense twin": [curve.twin for curve in curves]}
    lines |= {text: [curve.at[text] for curve in curves] for text in SHOWN if all(text in one.at for one in curves)}
    for (label, found), colour in zip(lines.items(), COLOURS, strict=False):
        panel.plot(sizes, [one.ms for one in found], "o-", color=colour, markersize=4, label=label)
        panel.plot(sizes, [one.floor_ms for one in found], "--", color=colour, linewidth=0.8)
    panel.set(xscale="log", yscale="log", xlabel="MB that a dense token reads", ylabel="ms per token")
    for curve, size in zip(curves, sizes, strict=True):
        panel.annotate(curve.model, (size, curve.twin.ms), xytext=(-5, 5), textcoords="offset points", ha="right")
    panel.margins(x=0.25, y=0.12)
    panel.legend(title="heads/neurons kept\n(dashed: bytes at\n0.9 of the stream)", fontsize=8, title_fontsize=8)
    _save(figure, note, path)


def _figure(rows: int, columns: int, scale: float = 1.0) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise SetupError("matplotlib is not installed", hint="pip install 'shadowc[plot]'") from error
    size = _PANEL_INCHES * scale
    figure = Figure(figsize=(size * columns, size * 0.85 * rows), dpi=150, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _save(figure: Any, note: str, path: Path) -> None:
    figure.supxlabel(textwrap.fill(note, int(_LETTERS_PER_INCH * figure.get_figwidth())), fontsize=6, color=FLOOR)
    figure.savefig(path)
