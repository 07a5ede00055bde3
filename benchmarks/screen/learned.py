# SPDX-License-Identifier: Apache-2.0
"""Traces and predictors of a screen, each in a folder of its own: made once, and refused if they are of something else.

`traces/CRITERION` and `predictors/CRITERION-STYLE-SEED`. Either appears when it is complete; a trace that a kill cut
short is continued. A predictor names the key of its trace, so one of another trace is told apart.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.screen.plan import Plan
from shadowc.sparsity.collect import collect, trace_key
from shadowc.sparsity.importance import ImportanceTrace, Origin
from shadowc.sparsity.predictor import META_FILE, Predictor
from shadowc.sparsity.rank import normalised_static_scores, predicted_scores, ranking_of
from shadowc.sparsity.targets import chosen_labels
from shadowc.sparsity.train import train
from shadowc.spec.density import UNIT_KINDS
from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shadowc.checkpoint.resolve import ModelCheckpoint
    from shadowc.spec.options import Style
    from shadowc.spec.progress import Progress


class Learned:
    """Makes traces and predictors, or finds them made.

    Args:
        folder: of the screen.
        plan: how they are made.
        checkpoint: of what.
        model: the same as a torch model.
        origin: the model as it was typed.
        progress: told about stages.
        say: told about what is begun.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        checkpoint: ModelCheckpoint,
        model: Any,
        origin: Origin,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._plan, self._origin = folder, plan, origin
        self._checkpoint, self._model, self._progress, self._say = checkpoint, model, progress, say
        self.left_out: dict[str, str] = {}
        """Criterion -> why it has no trace of this text."""

    def trace(self, criterion: str) -> ImportanceTrace:
        """Return a criterion's trace.

        Raises:
            InputError: the criterion cannot score this text, or a trace of something else is in its place.
        """
        folder = self._folder / "traces" / criterion
        options = self._plan.collecting(criterion)
        key = trace_key(self._checkpoint, options)
        found = ImportanceTrace.finished(folder, key)
        if found is not None:
            return found
        if folder.exists():
            raise InputError(
                f"{folder} is not the trace of {criterion} that this screen takes: another text, model, number of "
                "positions or criterion",
                hint=f"rm -r {folder}, or --out OTHER",
            )
        self._say(f"{criterion}: records what matters")
        folder.parent.mkdir(parents=True, exist_ok=True)
        return collect(self._checkpoint, options, folder, self._progress, model=self._model, origin=self._origin)

    def traces(self) -> dict[str, ImportanceTrace]:
        """Return the traces of all criteria; one that cannot score this text is left out, with its reason."""
        found = {}
        for criterion in self._plan.criteria:
            try:
                found[criterion] = self.trace(criterion)
            except InputError as error:
                if (self._folder / "traces" / criterion).exists():
                    raise
                self.left_out[criterion] = str(error)
                self._say(f"{criterion} is left out: {error}")
        return found

    def predictor(self, trace: ImportanceTrace, style: Style, seed: int, of: str = "") -> Predictor:
        """Return the predictor of a style that learned a trace; `of` tells traces of one criterion apart.

        Raises:
            InputError: a predictor of something else is in its place, or the trace teaches nothing.
        """
        criterion = str(trace.meta["criterion"])
        folder = self._folder / "predictors" / f"{criterion}-{style}-{seed} {of}".strip()
        options = chosen_labels(self._plan.training(style, seed), criterion)
        if not (folder / META_FILE).is_file():
            self._say(f"{criterion}: trains style {style}, seed {seed}")
            folder.parent.mkdir(parents=True, exist_ok=True)
            return train(trace, self._checkpoint.facts, options, folder, self._progress, calibrated=False)
        found = Predictor.load(folder, self._checkpoint.facts)
        wanted = {"criterion": criterion, "trace_key": trace.meta["key"], "training": options.model_dump()}
        differing = [name for name, value in wanted.items() if found.meta.get(name) != value]
        if differing:
            raise InputError(
                f"{folder} is not the predictor that this screen takes; it has another {', '.join(differing)}",
                hint=f"rm -r {folder}, or --out OTHER",
                problems=[f"{name}: {found.meta.get(name)}, expected {wanted[name]}" for name in differing],
            )
        return found


def with_rankings(host: Predictor, trace: ImportanceTrace) -> Predictor:
    """Return a predictor whose controls are the rankings of another trace, in its units.

    A kind that the criterion has no formula for keeps the host's ranking.
    """
    static = ranking_of(trace, host.orders_LF, host.block, host.controls["static"])
    raw = predicted_scores(trace, host.orders_LF, host.block)
    borrowed = lacking(trace)
    scaled = [
        host.controls["normalised"][number] if kind in borrowed else normalised_static_scores(scores)
        for number, (kind, scores) in enumerate(zip(UNIT_KINDS, raw, strict=True))
    ]
    return replace(host, controls={"static": static, "normalised": (scaled[0], scaled[1])})


def lacking(trace: ImportanceTrace) -> list[str]:
    """Return the kinds that a trace's criterion has no formula for."""
    return [kind for kind in UNIT_KINDS if kind not in trace.meta.get("kinds", UNIT_KINDS)]
