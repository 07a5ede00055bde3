# SPDX-License-Identifier: Apache-2.0
"""From rounds to points: one curve per model, and the table of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.decoding import DENSE, Setting
from benchmarks.rounds import FLOOR_TOLD, Figures, Ledger, above, figures, surroundings

_HEADS = ("model", "kept", "ms per token", "lowest to highest", "MB per token", "floor, ms", "above it", "speed-up")


@dataclass(frozen=True, slots=True)
class Series:
    """One model: its dense twin, and its engine at several densities."""

    model: str
    twin: Figures
    at: Mapping[str, Figures]
    """Setting HEADS/NEURONS -> its figures, as asked."""

    def ladder(self) -> list[tuple[float, Figures]]:
        """Share kept and figures of the settings that keep as many heads as neurons, by share."""
        found = []
        for text, figure in self.at.items():
            density = Setting.parse(text).density
            if density is not None and density.heads == density.neurons:
                found.append((density.heads, figure))
        return sorted(found, key=lambda point: point[0])


def series(model: str, ledger: Ledger) -> Series:
    """The figures of a model with at least one round."""
    rounds = ledger.rounds(model)
    found = {text: figures(rounds, text, DENSE) for text in ledger.asked.settings}
    return Series(model, found.pop(DENSE), found)


@dataclass(frozen=True, slots=True)
class Table:
    """Markdown, and the sentence that belongs under plots too."""

    markdown: str
    note: str


def table(curves: Sequence[Series], ledger: Ledger) -> Table:
    """One line per model and setting."""
    lines = [f"| {' | '.join(_HEADS)} |", f"|{' --- |' * len(_HEADS)}"]
    for curve in curves:
        for text, figure in {"dense twin": curve.twin, **curve.at}.items():
            cells = (
                curve.model,
                text,
                f"{figure.ms:.2f}",
                f"{figure.lowest:.2f} to {figure.highest:.2f}",
                f"{figure.size / 1e6:.1f}",
                f"{figure.floor_ms:.2f}",
                above(figure),
                f"{1 / figure.ratio:.2f}x",
            )
            lines.append(f"| {' | '.join(cells)} |")
    rounds = ", ".join(f"{len(ledger.rounds(curve.model))} of {curve.model}" for curve in curves)
    note = surroundings(ledger)
    parts = [
        f"Dummy weights, batch 1, `skip_zeros` off. Medians of interleaved rounds: {rounds}. *kept*: heads/neurons of "
        f"the predicted layers, predictor included. {FLOOR_TOLD} "
        f"*speed-up*: over the dense twin in the same round. {note}"
    ]
    parts += [
        f"{name} is left out: {one['facts']['left_out']}"
        for name, one in ledger.content["engines"].items()
        if "left_out" in one.get("facts", {})
    ]
    return Table("\n".join([*lines, "", "\n\n".join(parts)]) + "\n", note)
