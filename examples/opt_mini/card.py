# SPDX-License-Identifier: Apache-2.0
"""Put the numbers of report.json into the model card, between its two markers.

In: report.json. Out: README.md with tables that say what the report says; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
HERE = Path(__file__).resolve().parent


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def render(report: Mapping[str, Any]) -> str:
    """Return the numbers as Markdown."""
    ours, other = report["bits_per_byte"]["opt-mini"], report["bits_per_byte"]["kneser-ney-5"]
    size = report["heldout_bytes"]
    bits = [(s, size.get(s, sum(size.values())), f"{ours[s]:.3f}", f"{other[s]:.3f}") for s in ours]
    gain = 100 * (1 - ours["all"] / other["all"])
    relu = report["relu_by_layer"]
    layers = list(enumerate(zip(relu["zeros"], relu["neurons_never_active"], strict=True)))
    seen, passes = report["tokens_seen"], report["tokens_seen"] / report["training_tokens"]
    return "\n\n".join(
        [
            f"{report['parameters'] / 1e6:.2f} million parameters; {seen / 1e6:.1f} million tokens seen, "
            f"{passes:.1f} passes over {report['training_tokens'] / 1e6:.2f} million, in "
            f"{report['training_seconds'] / 3600:.1f} hours on two shared CPU cores.",
            "Bits per byte of the held-out text (lower is better):",
            table(("source", "bytes", "opt-mini", "5-gram Kneser-Ney"), bits),
            f"Over all of it opt-mini needs {abs(gain):.1f} % {'fewer' if gain > 0 else 'more'} bits than Kneser-Ney.",
            f"Protocol: context {report['protocol']['context']}, windows move by {report['protocol']['stride']}, each "
            "byte counts once; Kneser-Ney has the same tokenizer, training text and held-out text.",
            "Zeros behind the ReLU on the held-out text, and neurons that never fired there:",
            table(
                ("layer", "zeros", "never active"),
                [(n, f"{100 * zero:.1f} %", f"{100 * dead:.1f} %") for n, (zero, dead) in layers],
            ),
            "Training (held-out: a sample of the windows, without overlap, so a little above the table above):",
            table(
                ("tokens (million)", "phase", "training loss (nats)", "held-out bits per byte"),
                [
                    (f"{p['tokens'] / 1e6:.1f}", p["phase"], f"{p['train_loss']:.2f}", f"{p['heldout_bpb']['all']:.3f}")
                    for p in report["curve"]
                ],
            ),
        ]
    )


def with_numbers(card: str, report: Mapping[str, Any]) -> str:
    """Return the card with the block between the markers replaced."""
    before, rest = card.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{render(report)}\n\n{END}{after}"


def main() -> None:
    """Rewrite the card of this folder."""
    report = json.loads((HERE / "report.json").read_text(encoding="utf-8"))
    card = HERE / "README.md"
    card.write_text(with_numbers(card.read_text(encoding="utf-8"), report), encoding="utf-8")


if __name__ == "__main__":
    main()
