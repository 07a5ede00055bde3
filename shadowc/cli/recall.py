# SPDX-License-Identifier: Apache-2.0
"""The predictor's own report as tables: recall of the truly important units beside the controls'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shadowc.cli import render
from shadowc.spec.density import UNIT_KINDS

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
METHODS = ("predictor", "normalised", "static", "random")
"""Left to right in the table: the learned one, then its controls."""
PER_LAYER_METHODS = ("predictor", "normalised", "static")


def summary_table(report: Mapping[str, Any], scope: str = "global") -> Table:
    """Return columns and rows: recall (and share of the importance caught) by kind and density, one column a method."""
    found = report["found"]
    measured = next(iter(found["heads"][scope].values()))
    methods = tuple(name for name in (*METHODS, *sorted(set(measured) - set(METHODS))) if name in measured)
    rows = []
    for kind in UNIT_KINDS:
        for density, by_method in found[kind][scope].items():
            cells = (
                f"{render.share(by_method[name]['recall'])} ({render.share(by_method[name]['mass'])})"
                for name in methods
            )
            rows.append((f"{kind} at {density}", *cells))
    return ("recall (mass)", *methods), rows


def met_text(met: Mapping[str, Mapping[str, Mapping[str, float]]], budget: str) -> str:
    """Return which shares of the units of held-out text calibrated thresholds kept, beside the densities asked for."""
    found = []
    for kind, by_budget in met.items():
        shares = (f"{render.share(share)} at {float(asked):g}" for asked, share in by_budget[budget].items())
        found.append(f"{', '.join(shares)} of {kind}")
    return f"on held-out text {'; '.join(found)}"


def layer_tables(report: Mapping[str, Any], scope: str = "global") -> dict[str, Table]:
    """Return by kind of unit columns and rows: recall per model layer at every density, the predictor and its controls.

    The raw static ranking is the published one; the normalised one shows how much of a gain needs no context.
    """
    return {kind: _layer_table(report["found"][kind][scope]) for kind in UNIT_KINDS}


def _layer_table(by_density: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = [
        (density, method)
        for density, by_method in by_density.items()
        for method in PER_LAYER_METHODS
        if method in by_method
    ]
    per_layer = [by_density[density][method]["recall_per_layer"] for density, method in columns]
    rows = [
        (f"layer {layer + 1}", *(render.share(value) for value in values))
        for layer, values in enumerate(zip(*per_layer, strict=True))
    ]
    return ("", *(f"{method} at {density}" for density, method in columns)), rows
