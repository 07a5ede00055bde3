# SPDX-License-Identifier: Apache-2.0
"""Bits per byte against bytes read: a panel for every criterion with a grid, else for each of the best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.screen.measured import Line
from benchmarks.screen.plan import BEST
from benchmarks.screen.table import Found, best_criteria
from shadowc.measure.plot import FLOOR, figure, save

COLOURS = {
    "shadow": "#56b4e9", "dejavu": "#d55e00", "shadow+": "#0072b2", "static": "#e69f00", "normalised": "#009e73",
    "oracle": "#000000", "random": "#999999", "prompt": "#cc79a7",
}  # fmt: skip
LINES = {"local": "-", "global": "--"}
COLUMNS = 3


def bits_against_bytes(found: Found, path: Path) -> None:
    """Draw the screen, or its grid where there is one.

    Raises:
        SetupError: matplotlib is not installed.
    """
    lines = found.grid or found.screen
    drawn_of = {line.criterion for line in lines}
    names = [name for name in best_criteria(found.screen, BEST if lines is found.screen else None) if name in drawn_of]
    common = [line for line in found.screen if not line.criterion]
    columns = min(COLUMNS, len(names))
    drawn, panels = figure(-(-len(names) // columns), columns, scale=1.3)
    for name, panel in zip(names, panels, strict=False):
        panel.axhline(found.dense.row.metrics[0].value, color=FLOOR, linestyle=":", linewidth=1, label="dense")
        _curves(panel, [line for line in lines if line.criterion == name] + common, found.about["seed"])
        panel.set(title=name, xlabel="layer bytes read, of a dense token's", ylabel="bits per byte")
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    panels[0].legend(fontsize=5)
    note = f"{found.about['model']}; a predictor's own bytes count as read; thin lines: further predictor seeds"
    save(drawn, note, path)


def _curves(panel: Any, lines: Sequence[Line], base: int) -> None:
    """Draw a curve for every style, scope and seed, in the order of the bytes; thin for other seeds than `base`."""
    curves: dict[tuple[str, str, int | None], list[Line]] = {}
    for line in lines:
        curves.setdefault((line.style, line.row.setting.scope, line.seed), []).append(line)
    for (style, scope, seed), some in curves.items():
        points = sorted((1 - line.row.sparsity, line.row.metrics[0].value) for line in some)
        again = seed not in (None, base)
        panel.plot(
            *zip(*points, strict=True),
            LINES.get(scope, "-"),
            color=COLOURS[style],
            linewidth=0.4 if again else 1,
            marker="" if again else "o",
            markersize=2.5,
            label=None if again else f"{style} {scope}",
        )
