# SPDX-License-Identifier: Apache-2.0
"""Pictures of an evaluation: quality against bytes read, recall per layer, heat maps. matplotlib is optional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowc.eval.metric import PERCENT
from shadowc.eval.report import corpora, way
from shadowc.measure.plot import FLOOR, figure, save

if TYPE_CHECKING:
    from shadowc.eval.heat import HeatMap
    from shadowc.eval.model import EvaluatedModel
    from shadowc.eval.run import Evaluation, Row

COLOURS: Mapping[str, str] = {"predictor": "#0072b2", "static": "#e69f00", "normalised": "#009e73", "random": "#999999"}
_OTHERS = ("#cc79a7", "#d55e00", "#56b4e9", "#f0e442")
_LINES = ("-", "--", ":", "-.")


def quality(evaluation: Evaluation, path: Path) -> None:
    """Draw a panel for every corpus: its main figure against the share of a dense token's layer bytes that is read.

    Raises:
        SetupError: matplotlib is not installed.
    """
    shown = corpora(evaluation)
    drawn, panels = figure(1, len(shown), scale=1.3)
    for corpus, panel in zip(shown, panels, strict=True):
        rows = [row for row in evaluation.rows if row.corpus is corpus]
        dense = next(row for row in rows if row.setting.dense)
        panel.axhline(dense.metrics[0].value, color=FLOOR, linestyle=":", linewidth=1, label="dense")
        curves: dict[tuple[str, str, str], list[Row]] = {}
        for row in rows:
            if not row.setting.dense:
                setting = row.setting
                curves.setdefault((setting.method, way(setting), setting.scope), []).append(row)
        ways = list(dict.fromkeys((protocol, scope) for _, protocol, scope in curves))
        for index, (name, points) in enumerate(curves.items()):
            colour = COLOURS.get(name[0], _OTHERS[index % len(_OTHERS)])
            _curve(panel, name, points, colour, _LINES[ways.index(name[1:]) % len(_LINES)])
        panel.set(title=corpus.name, xlabel="layer bytes read, of a dense token's", ylabel=dense.metrics[0].name)
        panel.legend(fontsize=6)
    save(drawn, _note(evaluation), path)


def _curve(panel: Any, name: tuple[str, str, str], rows: list[Row], colour: str, line: str) -> None:
    """Draw one method, protocol and scope: its figures with their intervals, in the order of the bytes."""
    points = sorted(((1 - row.sparsity, row) for row in rows), key=lambda point: point[0])
    read = [at for at, _ in points]
    found = [row.intervals[0] for _, row in points]
    panel.plot(
        read,
        [one.value for one in found],
        line,
        marker="o",
        markersize=3,
        linewidth=1,
        color=colour,
        label=" ".join(part for part in name if part),
    )
    low, high = [one.low for one in found], [one.high for one in found]
    panel.fill_between(read, low, high, color=colour, alpha=0.08, linewidth=0)


def recall(model: EvaluatedModel, path: Path) -> None:
    """Draw the share of the truly important units that a predictor and its controls find, layer by layer.

    Raises:
        SetupError: matplotlib is not installed.
    """
    kinds = list(model.recall)
    drawn, panels = figure(1, len(kinds), scale=1.3)
    for kind, panel in zip(kinds, panels, strict=True):
        scope, by_density = next(reversed(list(model.recall[kind].items())))
        for line, (density, by_method) in zip(_LINES, by_density.items(), strict=False):
            for method, found in by_method.items():
                if "recall_per_layer" in found:
                    shares = found["recall_per_layer"]
                    panel.plot(
                        range(1, len(shares) + 1),
                        shares,
                        line,
                        color=COLOURS.get(method, _OTHERS[0]),
                        linewidth=1,
                        label=f"{method} at {density}",
                    )
        panel.set(title=f"{kind}, {scope} ranking", xlabel="layer", ylabel="recall", ylim=(0, 1.02))
        panel.legend(fontsize=5)
    save(drawn, f"{model.name}: found among the important units of held-out calibration text", path)


def heat(maps: Sequence[HeatMap], name: str, path: Path) -> None:
    """Draw a row for every kind and density: chosen by the predictor, by the truth, and the difference.

    Args:
        maps: see heat.py.
        name: of the model and the text, for the note.
        path: of the picture.

    Raises:
        SetupError: matplotlib is not installed.
    """
    drawn, panels = figure(len(maps), 3)
    for row, one in enumerate(maps):
        parts = (("predicted", one.predicted), ("true", one.true), ("predicted - true", one.difference))
        for (title, share_LC), panel in zip(parts, panels[3 * row : 3 * row + 3], strict=True):
            signed = share_LC is parts[-1][1]
            ends = (0.5, len(share_LC) + 0.5)
            shown = panel.imshow(
                share_LC,
                cmap="RdBu_r" if signed else "Blues",
                vmin=-1 if signed else 0,
                vmax=1,
                aspect="auto",
                interpolation="nearest",
                extent=(0, share_LC.shape[1], ends[1], ends[0]),
            )
            panel.set_title(f"{one.kind}, {one.density.heads:g}/{one.density.neurons:g}: {title}", fontsize=7)
            panel.set(xlabel=f"{one.kind}, by block", ylabel="layer")
            drawn.colorbar(shown, ax=panel)
    save(drawn, f"{name}: share of {maps[0].tokens:,} masked tokens in which a unit was computed", path)


def _note(evaluation: Evaluation) -> str:
    """Say what the picture shows, and what was drawn for the bands: a short text has windows in place of documents."""
    drawn = " or ".join(dict.fromkeys(str(corpus.facts["drawn"]) for corpus in corpora(evaluation)))
    return (
        f"{evaluation.model.name}; the predictor's own bytes count as read; bands: {PERCENT} % of bootstrap draws over "
        f"{drawn}, seed {evaluation.seed}"
    )
