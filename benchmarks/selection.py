# SPDX-License-Identifier: Apache-2.0
"""Exact ranking against calibrated thresholds, at equal mean bytes: who loses fewer bits per byte?

`python -m benchmarks.selection --model MODEL --predictor FOLDER --text FILE` prints a table in Markdown.

A threshold meets its density on the calibration text; another text keeps more or fewer units. So thresholds go first,
and ranking gets, at each density, the shares of heads and of neurons that they kept: both read the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shadowc.eval.load import torch_model
from shadowc.eval.metric import difference
from shadowc.eval.request import Setting
from shadowc.eval.run import Row, evaluate
from shadowc.eval.store import Store
from shadowc.eval.texts import TextCorpus, text_corpus
from shadowc.eval.torch_model import TorchModel
from shadowc.sparsity.importance import Origin
from shadowc.sparsity.predictor import style_in
from shadowc.spec.density import Density
from shadowc.spec.errors import ShadowcError
from shadowc.spec.options import Style
from shadowc.spec.progress import NullProgress

CASES = {"local": ("calibrated", "local"), "global": ("calibrated", "global"), "sensitivity": ("sensitivity", "local")}
"""Budget -> method and scope of the thresholds.

Beside it stands the ranking of that scope; by sensitivity, and of styles that know one layer at a time, the local one.
"""
COLUMNS = (
    "budget", "asked for", "kept: heads", "neurons", "not read", "ranked, bits/byte", "thresholds",
    "thresholds - ranked", "95 %",
)  # fmt: skip


def compared(
    model: TorchModel, corpus: TextCorpus, budget: str, densities: list[float], store: Store, style: Style
) -> list[str]:
    """Return a line of the table for every density."""
    method, scope = CASES[budget]
    beside = scope if style == "shadow" else "local"
    settings = [Setting(method, Density.of(density), scope=scope) for density in densities]
    by_threshold = evaluate(model, [corpus], settings, store=store).rows[1:]
    ranked = [replace(row.setting, method="predictor", density=_met(row), scope=beside) for row in by_threshold]
    by_rank = evaluate(model, [corpus], ranked, store=store).rows[1:]
    return [_line(budget, one, other) for one, other in zip(by_threshold, by_rank, strict=True)]


def _met(row: Row) -> Density:
    return Density(row.active_heads, row.active_neurons)


def _line(budget: str, one: Row, other: Row) -> str:
    found = difference(one.metrics[0], other.metrics[0])
    cells = (
        budget,
        f"{one.setting.density.heads:g}",
        f"{one.active_heads:.3f}",
        f"{one.active_neurons:.3f}",
        f"{one.sparsity:.1%}, {other.sparsity:.1%}",
        f"{other.metrics[0].value:.4f}",
        f"{one.metrics[0].value:.4f}",
        f"{found.value:+.4f}",
        f"{found.low:+.4f} {found.high:+.4f}",
    )
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--predictor", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budgets", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--limit", type=int, help="first windows only")
    given = parser.parse_args(arguments)
    try:
        _print(given)
    except ShadowcError as error:
        parser.error(f"{error}: {error.hint}" if error.hint else str(error))
    return 0


def _print(given: argparse.Namespace) -> None:
    model = torch_model(Origin(given.model, "auto", 0), given.predictor, progress=NullProgress())
    style = style_in(given.predictor)
    corpus, store = text_corpus(model, given.text, limit=given.limit), Store()
    facts = corpus.facts
    sys.stdout.write(f"{facts['name']}, sha256 {facts['sha256']}: {facts['tokens']:,} tokens\n")
    sys.stdout.write(f"{model.name} {model.identity}\n\n")
    sys.stdout.write(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n")
    for budget in given.budgets:
        for line in compared(model, corpus, budget, given.densities, store, style):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
