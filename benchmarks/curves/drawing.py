# SPDX-License-Identifier: Apache-2.0
"""The two plots. matplotlib comes with `pip install -e '.[plot]'`; a plot without it is refused with that command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.curves.series import Series
from shadowc.measure.plot import DENSE_TWIN, INK, TWIN, Point, curve, figure, label_axes, save

COLOURS = (TWIN, INK, "#009e73", "#cc79a7")
SHOWN = ("0.5/0.5", "0.5/0.2", "0.2/0.2")
"""Settings of the plot against size, where they were measured."""
_COLUMNS = 3


def against_density(curves: Sequence[Series], note: str, path: Path) -> None:
    """One panel per model: ms per token over the share kept, with the floor and the dense twin.

    Raises:
        SetupError: matplotlib is not installed.
    """
    columns = min(_COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    drawn, axes = figure(rows, columns)
    for one, panel in zip(curves, axes, strict=False):
        points = [Point(share, at.ms, at.lowest, at.highest, at.floor_ms) for share, at in one.ladder()]
        curve(panel, points, INK)
        panel.axhline(one.twin.ms, color=TWIN, linestyle=":", label=DENSE_TWIN)
        label_axes(panel, one.model)
    for panel in axes[len(curves) :]:
        panel.set_visible(False)
    axes[0].legend(fontsize=7)
    save(drawn, note, path)


def against_size(curves: Sequence[Series], note: str, path: Path) -> None:
    """Ms per token over the bytes of a dense token, both logarithmic: one line per setting, floors dashed.

    Raises:
        SetupError: matplotlib is not installed.
    """
    drawn, (panel,) = figure(1, 1, scale=1.7)
    sizes = [one.twin.size / 1e6 for one in curves]
    lines = {DENSE_TWIN: [one.twin for one in curves]}
    lines |= {text: [one.at[text] for one in curves] for text in SHOWN if all(text in one.at for one in curves)}
    for (label, found), colour in zip(lines.items(), COLOURS, strict=False):
        panel.plot(sizes, [one.ms for one in found], "o-", color=colour, markersize=4, label=label)
        panel.plot(sizes, [one.floor_ms for one in found], "--", color=colour, linewidth=0.8)
    panel.set(xscale="log", yscale="log", xlabel="MB that a dense token reads", ylabel="ms per token")
    for one, size in zip(curves, sizes, strict=True):
        panel.annotate(one.model, (size, one.twin.ms), xytext=(-5, 5), textcoords="offset points", ha="right")
    panel.margins(x=0.25, y=0.12)
    panel.legend(title="heads/neurons kept\n(dashed: bytes at\n0.9 of the stream)", fontsize=8, title_fontsize=8)
    save(drawn, note, path)
