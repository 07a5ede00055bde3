# SPDX-License-Identifier: Apache-2.0
"""The predictor's own report as tables: recall of the truly important units beside the controls'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shadowc.cli import render

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
KINDS = ("heads", "neurons")
METHODS = ("predictor", "normalised", "static", "random")
"""Left to right in the table: the learned one, then its controls."""
PER_LAYER_DENSITY = "0.5"


def summary_table(report: Mapping[str, Any], scope: str = "global") -> Table:
    """Return columns and rows: recall (and share of the importance caught) by kind and density, one column a method."""
    found = report["found"]
    measured = next(iter(found["heads"][scope].values()))
    methods = tuple(name for name in METHODS if name in measured)
    rows = []
    for kind in KINDS:
        for density, by_method in found[kind][scope].items():
            cells = (
                f"{render.share(by_method[name]['recall'])} ({render.share(by_method[name]['mass'])})"
                for name in methods
            )
            rows.append((f"{kind} at {density}", *cells))
    return ("recall (mass)", *methods), rows


def layer_table(report: Mapping[str, Any], scope: str = "global") -> Table:
    """Return columns and rows: recall per model layer, the predictor beside the normalised static ranking."""
    by_kind = {kind: report["found"][kind][scope][PER_LAYER_DENSITY] for kind in KINDS}
    columns = [(kind, name) for kind in KINDS for name in ("predictor", "normalised") if name in by_kind[kind]]
    per_layer = [by_kind[kind][name]["recall_per_layer"] for kind, name in columns]
    rows = [
        (f"layer {layer + 1}", *(render.share(value) for value in values))
        for layer, values in enumerate(zip(*per_layer, strict=True))
    ]
    return ("", *(f"{kind}, {name}" for kind, name in columns)), rows
