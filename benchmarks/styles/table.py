# SPDX-License-Identifier: Apache-2.0
"""The ledger of both styles as Markdown: bytes and time of one model, quality of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.decoding import DENSE
from benchmarks.rounds import Ledger, figures, surroundings
from shadowc.spec.density import UNIT_KINDS

_METHODS = ("predictor", "normalised", "static", "random")
_RECALL_AT = ("0.5", "0.2")


def speed(names: Sequence[str], ledger: Ledger, model: str) -> str:
    """One line per predictor with at least one round: bytes, ms per token, parts of the time."""
    settings = [text for text in ledger.asked.settings if text != DENSE]
    heads = ["predictor", "MB per token", "of a dense token", "dense twin, ms"]
    heads += [f"{text}, ms (over the twin)" for text in settings]
    heads += [f"predictor + selection at {text}" for text in settings]
    lines = _head(heads)
    for name in names:
        facts, rounds = ledger.facts(name), ledger.rounds(name)
        found = {text: figures(rounds, text, DENSE) for text in ledger.asked.settings}
        cells = [
            name,
            f"{facts['predictor_bytes'] / 1e6:.1f}",
            f"{facts['predictor_bytes'] / facts['dense_bytes']:.1%}",
            f"{found[DENSE].ms:.2f}",
        ]
        cells += [f"{found[text].ms:.2f} ({1 / found[text].ratio:.2f}x)" for text in settings]
        cells += [_parts(facts["parts"][text]) for text in settings]
        lines.append(_line(cells))
    note = (
        f"{model}, dummy weights, batch 1, `skip_zeros` off, a mask per token ranked within layers; the number is the "
        "width. Medians of rounds in which the predictors take turns; *over the twin*: in the same round. *predictor + "
        f"selection*: shares of a token's time under ONNX Runtime's profiler. {surroundings(ledger)}"
    )
    return "\n".join([*lines, "", note]) + "\n"


def _parts(parts: Mapping[str, Any]) -> str:
    both = parts["predictor"] + parts["selection"]
    return f"{parts['predictor']:.1%} + {parts['selection']:.1%} ({both * parts['ms_per_token']:.2f} ms)"


def quality(content: Mapping[str, Any]) -> str:
    """Bits per byte by predictor and control, then recall per layer."""
    rows, densities = content["rows"], content["asked"]["densities"]
    heads = ["masks", "labels, criterion", "ranked", "kB per token", *densities, "recall: heads", "recall: neurons"]
    lines = _head(heads)
    for row in rows.values():
        lines += [_line(cells) for cells in _quality_lines(row, len(densities))]
    first = next(iter(rows.values()))["report"]
    note = (
        f"{content['asked']['model']} in fp32: bits per byte at heads/neurons kept, dense {first['dense']:.4f}; "
        f"{first['text_bytes']:,} bytes (SHA-256 {first['text_sha256'][:12]}), windows of {first['window']}, protocol "
        f"{first['protocol']}. *recall*: of the important units of held-out calibration text, kept "
        f"{' and '.join(_RECALL_AT)}, by the criterion of the row and dense inputs."
    )
    return "\n".join([*lines, "", note, "", *_by_layer(rows)]) + "\n"


def _quality_lines(row: Mapping[str, Any], settings: int) -> list[list[str]]:
    report, name = row["report"]["rows"], f"{row['contestant']['style']}-{row['contestant']['width']}"
    found = []
    for method in _METHODS:
        bits = [f"{one['bits_per_byte']:.4f}" for one in report if one["method"] == method]
        if len(bits) != settings:
            continue
        own = method == "predictor"
        recalls = [
            " / ".join(f"{row['recall'][kind][at][method]['recall']:.3f}" for at in _RECALL_AT) for kind in UNIT_KINDS
        ]
        taught = f"{row['labels']}, {row['criterion']}" if own else "-"
        size = f"{row['predictor_bytes'] / 1e3:.0f}" if own else "0"
        found.append([name if own else method, taught, row["scope"], size, *bits, *recalls])
    return found


def _by_layer(rows: Mapping[str, Any]) -> list[str]:
    """Recall at the smaller share, layer by layer, of what is ranked within layers by the first criterion."""
    first = next(iter(rows.values()))
    shown = [row for row in rows.values() if row["scope"] == "local" and row["criterion"] == first["criterion"]]
    lines = []
    for kind in UNIT_KINDS:
        at = _RECALL_AT[-1]
        columns = {
            f"{row['contestant']['style']}-{row['contestant']['width']}, {row['labels']}": row["recall"][kind][at][
                "predictor"
            ]
            for row in shown
        }
        columns |= {name: shown[0]["recall"][kind][at][name] for name in _METHODS[1:]}
        lines += [*_head([f"recall of {kind} at {at}", *columns])]
        per_layer = [column["recall_per_layer"] for column in columns.values()]
        for layer, values in enumerate(zip(*per_layer, strict=True), start=1):
            lines.append(_line([f"layer {layer}", *(f"{value:.3f}" for value in values)]))
        lines.append("")
    return lines


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), f"|{' --- |' * len(cells)}"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
