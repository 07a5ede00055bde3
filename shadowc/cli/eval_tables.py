# SPDX-License-Identifier: Apache-2.0
"""An evaluation on a terminal: a line of facts and a table for every corpus, and what the protocols mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowc.cli import render

if TYPE_CHECKING:
    from shadowc.eval.corpus import Described
    from shadowc.eval.run import Evaluation, Row


def show(evaluation: Evaluation) -> None:
    """Print everything."""
    from shadowc.eval.report import COMPARED, MEANS, cells, columns, compared, corpora, mean_cells
    from shadowc.eval.request import PROTOCOLS

    for corpus in corpora(evaluation):
        rows = [row for row in evaluation.rows if row.corpus is corpus]
        render.line(_facts(corpus, rows[0]))
        render.table(columns(corpus, rows), [cells(row) for row in rows])
        against = [compared(one) for one in evaluation.comparisons if one.corpus is corpus]
        if against:
            render.table(COMPARED, against, title=f"paired over {corpus.facts['drawn']}")
    for name in dict.fromkeys(one.name for one in evaluation.means):
        render.table(MEANS, [mean_cells(one) for one in evaluation.means if one.name == name], title=name)
    for name in dict.fromkeys(row.setting.protocol for row in evaluation.rows if not row.setting.dense):
        render.line(f"protocol {name}: {PROTOCOLS[name]}")


def _facts(corpus: Described, dense: Row) -> str:
    facts = corpus.facts
    figure = f"dense: {dense.metrics[0].value:.4f} {dense.metrics[0].name.replace('_', ' ')}"
    if facts["kind"] == "task":
        return f"{facts['task']}, {facts['shots']} shots: {facts['examples']:,} examples; {figure}"
    documents = f" of {facts['documents']:,} documents" if facts["documents"] != 1 else ""
    return (
        f"{facts['name']}: {facts['bytes']:,} bytes{documents}, {facts['tokens']:,} tokens in windows of "
        f"{facts['window']:,}; {figure}"
    )
