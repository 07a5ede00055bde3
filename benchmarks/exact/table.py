# SPDX-License-Identifier: Apache-2.0
"""The table of the exact control: time, bytes and ratios to the same engine dense."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.decoding import DENSE, ZEROS, Setting
from benchmarks.rounds import FLOOR_TOLD, Ledger, above, figures, surroundings
from shadowc.spec.manifest import EngineManifest

_HEADS = (
    "engine", "zeros", "kept", "zeros skipped", "ms per token", "lowest to highest", "MB per token", "speed-up",
    "of its bytes", "floor, ms", "above it",
)  # fmt: skip


def zeros_counted(manifest: EngineManifest, dense: float, skipping: float) -> float:
    """Share of ReLU outputs that were zero, from the bytes per token of the dense twin without and with `skip_zeros`.

    Every row of every record has the same bytes: 4 E rows of attention and 2 F of the FFN in a layer, of which the
    F of fc2 are skipped where ReLU gave 0.
    """
    model, fixed = manifest.model, manifest.bytes_per_token
    kernels = dense - fixed.lm_head - fixed.other
    return (dense - skipping) / kernels * (4 * model.hidden + 2 * model.ffn) / model.ffn


def markdown(engines: Sequence[tuple[str, EngineManifest]], ledger: Ledger) -> str:
    """One line per engine and setting."""
    lines = [f"| {' | '.join(_HEADS)} |", f"|{' --- |' * len(_HEADS)}"]
    for name, manifest in engines:
        rounds = ledger.rounds(name)
        found = {text: figures(rounds, text, DENSE) for text in ledger.asked.settings}
        zeros = zeros_counted(manifest, found[DENSE].size, found[DENSE + ZEROS].size)
        for text, figure in found.items():
            setting = Setting.parse(text)
            cells = (
                name,
                f"{zeros:.1%}",
                "dense twin" if setting.density is None else text.removesuffix(ZEROS),
                "yes" if setting.skip_zeros else "no",
                f"{figure.ms:.2f}",
                f"{figure.lowest:.2f} to {figure.highest:.2f}",
                f"{figure.size / 1e6:.1f}",
                f"{1 / figure.ratio:.2f}x",
                f"{figure.size / found[DENSE].size:.1%}",
                f"{figure.floor_ms:.2f}",
                above(figure),
            )
            lines.append(f"| {' | '.join(cells)} |")
    fewest = min(len(ledger.rounds(name)) for name, _ in engines)
    note = (
        "Medians of {} rounds, one engine after the other in each. *zeros*: share of ReLU outputs that were 0 while "
        "the dense twin decoded, from the bytes that its kernels counted. *kept*: heads/neurons, a random predictor's "
        "for dummy weights, the trained one's for opt-mini. *speed-up*: over the same engine's dense twin in the same "
        "round. {} {}"
    )
    return "\n".join([*lines, "", note.format(fewest, FLOOR_TOLD, surroundings(ledger))]) + "\n"
