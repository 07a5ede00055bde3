# SPDX-License-Identifier: Apache-2.0
"""A screen as data and for people: a tidy table (a line per figure), one JSON document, tables in Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.screen.measured import Line
from benchmarks.screen.plan import BEST, RANKINGS
from shadowc.eval.metric import DRAWS, PERCENT, Interval, Metric, difference
from shadowc.eval.report import Value
from shadowc.spec.density import Density

METRIC = "bits_per_byte"


@dataclass(frozen=True, slots=True)
class Found:
    """Everything that a screen found."""

    about: Mapping[str, Any]
    """Model, texts, options, with their hashes."""
    dense: Line
    screen: Sequence[Line]
    """Heads and neurons kept alike, one seed."""
    best: Sequence[str]
    """Criteria of the grid and of the parts, the best first; empty: neither was asked for."""
    grid: Sequence[Line]
    parts: Sequence[Line]
    dealt: Sequence[Line] = ()
    """Of predictors that learned from inputs of other tokens, see context.py."""

    @property
    def lines(self) -> Iterator[Line]:
        """All, each once."""
        return iter({(x.criterion, x.style, x.seed, x.row.setting): x for x in self._all()}.values())

    def _all(self) -> Iterator[Line]:
        yield self.dense
        yield from self.screen
        yield from self.grid
        yield from self.parts
        yield from self.dealt


def main_metric(line: Line) -> Metric:
    """Bits per byte."""
    return next(metric for metric in line.row.metrics if metric.name == METRIC)


def mean_of(lines: Sequence[Line]) -> Metric:
    """The mean of several lines' bits per byte on the same documents, itself such a figure."""
    metrics = [main_metric(line) for line in lines]
    bits = [math.fsum(values) / len(metrics) for values in zip(*(one.numerator for one in metrics), strict=True)]
    return Metric(METRIC, "bits", tuple(bits), metrics[0].denominator)


def best_criteria(lines: Iterable[Line], count: int | None = None) -> list[str]:
    """The criteria whose predictors cost the fewest bits in the mean over styles, scopes and densities; None: all."""
    by_criterion: dict[str, list[Line]] = {}
    for line in lines:
        if line.learned:
            by_criterion.setdefault(line.criterion, []).append(line)
    return sorted(by_criterion, key=lambda name: mean_of(by_criterion[name]).value)[:count]


def as_csv(found: Found) -> str:
    """Return a line for every figure."""
    text = io.StringIO()
    records = [_record(line) for line in found.lines]
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _record(line: Line) -> dict[str, Value]:
    row, setting = line.row, line.row.setting
    at, above = row.intervals[0], row.above_dense[0]
    return {
        "criterion": line.criterion,
        "style": line.style,
        "predictor_seed": line.seed,
        "scope": setting.scope,
        "protocol": "" if setting.dense else setting.protocol,
        "head_density": setting.density.heads,
        "neuron_density": setting.density.neurons,
        METRIC: at.value,
        "low": _number(at.low),
        "high": _number(at.high),
        "above_dense": above.value,
        "above_dense_low": _number(above.low),
        "above_dense_high": _number(above.high),
        "active_heads": row.active_heads,
        "active_neurons": row.active_neurons,
        "effective_sparsity": row.sparsity,
        "layer_bytes_read": row.bytes_read,
        "masked_share": row.masked_share,
    }


def as_json(found: Found) -> str:
    """Return what was asked, with hashes, and every figure."""
    data = {
        **found.about,
        "bootstrap": {"draws": DRAWS, "percent": PERCENT, "paired": True},
        "best": list(found.best),
        "rows": [_record(line) for line in found.lines],
    }
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_markdown(found: Found) -> str:
    """Return the tables."""
    dense = found.dense.row.intervals[0]
    sections = [
        f"Dense: {dense.value:.4f} bits per byte {span(dense, plain=True)}. All other figures are bits per byte above "
        "it; *not read* is the effective sparsity, the predictor's own bytes counted as read.\n",
        *_criteria(found),
        *_rankings(found.screen),
        *_by_density(found.screen),
        *_references(found.screen),
    ]
    sections += _differences(found.screen)
    sections += _grid(found.grid)
    sections += _parts(found)
    return "\n".join(sections)


def _criteria(found: Found) -> Iterator[str]:
    """Criteria by the mean over their predictors, with their references."""
    lines = found.screen
    names = best_criteria(lines)
    means = {name: mean_of([x for x in lines if x.learned and x.criterion == name]) for name in names}
    yield "## Criteria, in the mean over styles, scopes and densities\n"
    yield heading("criterion", "predictors", "95 %", "behind the best", "95 %", "static", "normalised", "oracle")
    rest = dict.fromkeys(x.criterion for x in lines if x.criterion and x.criterion not in means)
    for name in (*names, *rest):
        cells = ["", "", "", ""]
        if name in means:
            behind = difference(means[name], means[names[0]])
            above = difference(means[name], main_metric(found.dense))
            cells = [f"{above.value:+.4f}", span(above), "" if name == names[0] else f"{behind.value:+.4f}"]
            cells.append("" if name == names[0] else span(behind))
        for style in ("static", "normalised", "oracle"):
            some = [x.above_dense for x in lines if x.criterion == name and x.style == style]
            cells.append(f"{math.fsum(some) / len(some):+.4f}" if some else "")
        yield row_of(f"`{name}`", *cells)
    yield ""
    for name, kinds in found.about["borrowed"].items():
        yield f"- `{name}` has no formula for {' and '.join(kinds)}: ranked as by `{found.about['host']}`."
    for name, reason in found.about["left_out"].items():
        yield f"- `{name}` is left out: {reason}"
    yield ""


def _rankings(lines: Sequence[Line]) -> Iterator[str]:
    """Rankings that know no context against one that was drawn once, where that was asked for."""
    by_name: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line.criterion and line.style in RANKINGS:
            by_name.setdefault((line.criterion, line.style), []).append(line)
    if ("random", "static") not in by_name:
        return
    yield "## Rankings by criteria against a random one, in the mean over scopes and densities\n"
    yield "`random` ranks all units once, by a draw, and keeps that ranking for all tokens.\n"
    yield heading("ranking by", "static: behind `random`", "95 %", "normalised: behind `random`", "95 %")
    for criterion in dict.fromkeys(name for name, _ in by_name if name != "random"):
        cells = []
        for style in RANKINGS:
            gap = difference(mean_of(by_name[criterion, style]), mean_of(by_name["random", style]))
            cells += [f"{gap.value:+.4f}", span(gap)]
        yield row_of(f"`{criterion}`", *cells)
    yield ""


def _by_density(lines: Sequence[Line]) -> Iterator[str]:
    """A table for every density: criteria down, styles across."""
    with_criterion = [line for line in lines if line.criterion]
    names = [*best_criteria(lines)]
    names += [name for name in dict.fromkeys(x.criterion for x in with_criterion) if name not in names]
    columns = list(dict.fromkeys(line.column for line in sorted(with_criterion, key=lambda x: not x.learned)))
    for density in dict.fromkeys(line.row.setting.density for line in lines):
        here = [line for line in with_criterion if line.row.setting.density == density]
        yield f"## {kept(density)} kept\n"
        yield heading("criterion", *columns)
        for name in names:
            by_column = {line.column: f"{line.above_dense:+.3f}" for line in here if line.criterion == name}
            yield row_of(f"`{name}`", *(by_column.get(column, "") for column in columns))
        shares = {column: [x.row.sparsity for x in here if x.column == column] for column in columns}
        yield row_of("*not read*", *(_range(found) for found in shares.values()))
        yield ""


def _references(lines: Sequence[Line]) -> Iterator[str]:
    yield "## Without a criterion\n"
    yield heading("masks", "kept", "protocol", "above dense", "95 %", "not read")
    for line in lines:
        if not line.criterion:
            setting, above = line.row.setting, line.row.above_dense[0]
            yield row_of(
                line.column, kept(setting.density), setting.protocol, f"{above.value:+.4f}", span(above),
                f"{line.row.sparsity:.1%}",
            )  # fmt: skip
    yield ""


def _differences(lines: Sequence[Line]) -> Iterator[str]:
    """The best style of every one of the best criteria against all others, paired."""
    yield "## Styles of one criterion, paired\n"
    yield "How far each lies above the best predictor of its criterion and density; the bytes read differ a little.\n"
    yield heading("criterion", "kept", "best predictor", "other", "difference", "95 %")
    for criterion in best_criteria(lines, BEST):
        mine = [line for line in lines if line.criterion == criterion]
        for density in dict.fromkeys(line.row.setting.density for line in mine):
            here = [line for line in mine if line.row.setting.density == density]
            first = min((line for line in here if line.learned), key=lambda line: line.above_dense)
            for other in here:
                if other is not first:
                    gap = difference(main_metric(other), main_metric(first))
                    cells = (f"{gap.value:+.4f}", span(gap))
                    yield row_of(f"`{criterion}`", kept(density), first.column, other.column, *cells)
    yield ""


def _grid(lines: Sequence[Line]) -> Iterator[str]:
    """A table for each criterion: densities down, styles across, the mean over seeds and how far they lie apart."""
    for criterion in dict.fromkeys(line.criterion for line in lines):
        mine = [line for line in lines if line.criterion == criterion]
        columns = list(dict.fromkeys(line.column for line in sorted(mine, key=lambda x: not x.learned)))
        seeds = len({line.seed for line in mine if line.learned})
        yield f"## Grid: `{criterion}`, {seeds} predictor seeds (mean, half of the span in brackets)\n"
        yield heading("kept", *columns)
        for density in sorted({line.row.setting.density for line in mine}, key=lambda one: one.heads):
            here = [line for line in mine if line.row.setting.density == density]
            yield row_of(kept(density), *(_over_seeds([x for x in here if x.column == column]) for column in columns))
        yield ""


def _over_seeds(lines: Sequence[Line]) -> str:
    if not lines:
        return ""
    above = [line.above_dense for line in lines]
    spread = f" ({(max(above) - min(above)) / 2:.3f})" if len(above) > 1 else ""
    return f"{math.fsum(above) / len(above):+.3f}{spread}"


def _parts(found: Found) -> Iterator[str]:
    """Heads alone, neurons alone, both: a table for each criterion."""
    for criterion in dict.fromkeys(line.criterion for line in found.parts):
        mine = [x for x in (*found.parts, *found.screen) if x.criterion == criterion]
        columns = list(dict.fromkeys(line.column for line in sorted(mine, key=lambda x: not x.learned)))
        yield f"## Parts: {f'`{criterion}`' if criterion else 'without a criterion'}\n"
        yield heading("kept: heads / neurons", *columns, "not read")
        for density in dict.fromkeys(line.row.setting.density for line in mine):
            here = {line.column: line for line in mine if line.row.setting.density == density}
            cells = [f"{here[column].above_dense:+.3f}" if column in here else "" for column in columns]
            yield row_of(kept(density), *cells, _range([line.row.sparsity for line in here.values()]))
        yield ""


def kept(density: Density) -> str:
    """Return the shares of a density: one where they are alike."""
    if density.heads == density.neurons:
        return f"{density.heads:g}"
    return f"{density.heads:g} / {density.neurons:g}"


def _range(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    low, high = (f"{100 * value:.0f}" for value in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def span(found: Interval, *, plain: bool = False) -> str:
    """Return an interval in brackets; nothing where it is not known."""
    if not math.isfinite(found.low):
        return ""
    shape: Callable[[float], str] = (lambda value: f"{value:.4f}") if plain else (lambda value: f"{value:+.4f}")
    return f"[{shape(found.low)}, {shape(found.high)}]"


def heading(*names: str) -> str:
    """Return the first two lines of a table."""
    return f"{row_of(*names)}\n{row_of(*(['---'] * len(names)))}"


def row_of(*cells: str) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
