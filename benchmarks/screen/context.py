# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N815 - fields carry their shape letters
"""Does a predictor know the context? Its control learned from the same positions, with inputs of other tokens.

What is dealt out anew are the positions' inputs, one permutation for all layers; scores, epochs and widths are alike.
Such a predictor can know which units matter on average, and no more: what a predictor is ahead of it, it knows of the
token. `--dealt-out N` trains and evaluates them of the N best criteria.

Letters: M recorded positions, E hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.screen.table import heading, kept, main_metric, row_of, span
from shadowc.eval.metric import difference
from shadowc.sparsity.importance import ImportanceTrace
from shadowc.spec.density import UNIT_KINDS

if TYPE_CHECKING:
    import numpy.typing as npt

    from benchmarks.screen.measured import Line
    from benchmarks.screen.table import Found
    from shadowc.sparsity.predictor import Predictor

DEALT = "dealt out"
"""Behind the style of a predictor whose inputs were."""


@dataclass(frozen=True, slots=True)
class DealtOut(ImportanceTrace):
    """A trace whose positions have each other's inputs."""

    order_M: npt.NDArray[np.intp]

    def input_ME(self, layer: int) -> npt.NDArray[np.float32]:  # noqa: N802 - the name carries its shape
        """See ImportanceTrace.input_ME."""
        return ImportanceTrace.input_ME(self, layer)[self.order_M]

    def ffn_input_ME(self, layer: int) -> npt.NDArray[np.float32]:  # noqa: N802 - the name carries its shape
        """See ImportanceTrace.ffn_input_ME."""
        return ImportanceTrace.ffn_input_ME(self, layer)[self.order_M]


def dealt_out(trace: ImportanceTrace, seed: int) -> DealtOut:
    """Return a trace of the same scores, whose inputs are those of other positions; its key tells it apart."""
    order_M = np.random.default_rng([seed, 5]).permutation(len(trace.sequence_M))
    values = {field.name: getattr(trace, field.name) for field in fields(trace)}
    values["context_ME"] = trace.context_ME[order_M]
    values["meta"] = {**trace.meta, "key": f"{trace.meta['key']} {DEALT} {seed}"}
    return DealtOut(**values, order_M=order_M)


def known(predictor: Predictor) -> dict[str, Any]:
    """What a predictor finds on the positions that training held out, of units ranked within layers, and its epochs."""
    report = predictor.meta["report"]
    found = {
        kind: {
            density: {method: one["recall"] for method, one in methods.items()}
            for density, methods in report["found"][kind]["local"].items()
        }
        for kind in UNIT_KINDS
    }
    return {"recall": found, "epoch": report["epoch"]}


def as_markdown(found: Found) -> str:
    """Return the tables of every criterion whose predictors have the control."""
    recalls = found.about["context"].items()
    return "\n".join(part for criterion, styles in recalls for part in (*_bits(found, criterion), *_recalls(styles)))


def _bits(found: Found, criterion: str) -> Iterator[str]:
    yield f"## Does a predictor know the context? `{criterion}`\n"
    yield (
        f"*{DEALT}*: learned from inputs of other tokens. The last columns are how far that control, and the "
        "normalised ranking of the same scope, which reads no predictor, lie behind, paired.\n"
    )
    yield heading("style", "kept", "above dense", DEALT, "behind", "95 %", "normalised", "behind", "95 %")
    lines = {
        (line.criterion, line.style, line.row.setting.scope, line.row.setting.density): line
        for line in found.lines
        if line.seed in (None, found.dealt[0].seed)
    }
    for other in found.dealt:
        if other.criterion == criterion:
            setting = other.row.setting
            style = other.style.removesuffix(f" {DEALT}")
            own, ranking = (lines[criterion, one, setting.scope, setting.density] for one in (style, "normalised"))
            cells = [f"{style} {setting.scope}".strip(), kept(setting.density), f"{own.above_dense:+.4f}"]
            for control in (other, ranking):
                cells += [f"{control.above_dense:+.4f}", *_behind(control, own)]
            yield row_of(*cells)
    yield ""


def _behind(line: Line, first: Line) -> tuple[str, str]:
    gap = difference(main_metric(line), main_metric(first))
    return f"{gap.value:+.4f}", span(gap)


def _recalls(styles: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "Of the units that matter at held-out positions, within layers, the share that is found:\n"
    yield heading("style", "kind", "kept", "predictor", DEALT, "normalised", "chance", "epochs", f"epochs, {DEALT}")
    for style, one in styles.items():
        own, other = one["own"], one[DEALT]
        for kind in UNIT_KINDS:
            epochs = [_epochs(each["epoch"][kind]) for each in (own, other)]
            for density, recall in own["recall"][kind].items():
                control = other["recall"][kind][density]
                shares = recall["predictor"], control["predictor"], recall["normalised"], recall["random"]
                yield row_of(style, kind, density, *(f"{share:.3f}" for share in shares), *epochs)
    yield ""


def _epochs(kept_epochs: int | Sequence[int]) -> str:
    """Return the epoch that was kept, or the least and the most of several networks; 0 is the mean score."""
    every = [kept_epochs] if isinstance(kept_epochs, int) else kept_epochs
    least, most = min(every), max(every)
    return f"{least}" if least == most else f"{least} to {most}"
