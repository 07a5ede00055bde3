# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N815 - fields carry their shape letters
"""How well every criterion ranks units by what masking them really costs: rank correlations with the truth.

In: a model and a text. Out: for every criterion and kind of unit, Spearman's correlation between its scores and the
change of the loss when a unit is masked (`sparsity/truth.py`), over the same sampled units:

- token: the unit masked at one token, compared with the criterion's score of that token; one ranking for each
  sampled token.
- text: the unit masked at all tokens of a sequence, compared with the sum of the scores over its tokens; one ranking
  for each sequence.
- static: the same truth, compared with the mean of the text scores over all *other* sequences: what is left of a
  criterion when the ranking may not depend on the text.

Each with the change itself (a unit whose absence helps ranks last) and with its size; over all units, within each
layer, and over the units that are heard, whose absence changes anything at all (most neurons do not fire, and telling
those from the others is half of a ranking). A criterion that has one score a sequence, or one for the whole text, is
compared with the same truths. The mean over rankings has an interval from a bootstrap over sequences. Rankings in which
the truth does not vary are left out; one in which only the scores do not vary counts as 0.

Letters: N sequences, T tokens, P sampled tokens of a sequence, U sampled units, L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from shadowc.measure.rank_correlation import Interval, within_groups
from shadowc.sparsity.criteria import Criterion, find_criterion
from shadowc.sparsity.families import Decoder, decoder_of
from shadowc.sparsity.text import TextRows, text_scores
from shadowc.sparsity.truth import DenseRun, Units, sampled_units
from shadowc.sparsity.whole import whole_signals
from shadowc.spec.density import UNIT_KINDS
from shadowc.spec.errors import InputError
from shadowc.spec.progress import NullProgress

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from shadowc.sparsity.signals import LayerSignals
    from shadowc.spec.progress import Progress

    Floats = npt.NDArray[np.float64]

Level = Literal["token", "text", "static"]
LEVELS: tuple[Level, ...] = get_args(Level)
MEASURES = ("change", "size")
SCOPES = ("all", "layer", "heard")


@dataclass(frozen=True, slots=True)
class Agreed:
    """One criterion and one kind of unit."""

    criterion: str
    kind: str
    zeros: float
    """Share of its scores of the sampled units that are exactly zero."""
    ranks: dict[str, Interval]
    """"LEVEL MEASURE SCOPE" -> correlation, such as "token change all"."""


@dataclass(frozen=True, slots=True)
class AgreementReport:
    """All rows, and what they were measured on."""

    rows: tuple[Agreed, ...]
    units: dict[str, int]
    runs: int
    """Masked runs behind the truth; neurons that would have said nothing are not run."""
    sequences: int
    length: int
    tokens: int
    """Sampled tokens of a sequence at which units were masked alone."""
    seed: int
    loss: float
    """Of the dense model, nats per token."""
    truth: dict[str, dict[str, float]]
    """Kind -> level -> median size of the change, and the share of changes that are negative (the model got better)."""
    dropped: tuple[str, ...] = ()
    """Sequences with numbers that are not finite, each with its place, and criteria that the text is too short for."""


@dataclass(slots=True)
class _Seen:
    """What one kind of unit gave, per sequence."""

    units: Units
    token_NPU: list[Floats] = field(default_factory=list)
    text_NU: list[Floats] = field(default_factory=list)
    scores: dict[str, list[tuple[Floats, Floats]]] = field(default_factory=dict)
    """Criterion -> of each sequence scores at the sampled tokens [P,U] (or [1,U]) and of the text [U]."""
    zeros: dict[str, list[float]] = field(default_factory=dict)


def measure_agreement(
    model: Any,
    ids_NT: npt.NDArray[np.int64],
    criteria: Sequence[str],
    *,
    units: int = 128,
    tokens: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
) -> AgreementReport:
    """Mask sampled units and compare every criterion with what it did to the loss.

    Args:
        model: transformers' model of a family that is handled; float32, eager attention.
        ids_NT: sequences, each from its first token on.
        criteria: their names.
        units: sampled units of each kind.
        tokens: sampled tokens of each sequence at which units are masked alone.
        seed: of the samples and of the bootstrap.
        progress: told about every sequence.

    Raises:
        InputError: an unknown criterion, fewer than two sequences, or no sequence whose numbers are finite.
    """
    progress = progress or NullProgress()
    found = [find_criterion(name) for name in criteria]
    if len(ids_NT) < 2:
        raise InputError(
            f"correlations over texts need several sequences; found {len(ids_NT)}", hint="--sequences 16, a longer text"
        )
    decoder = decoder_of(model)
    seen = [_Seen(sampled_units(decoder, kind, units, seed)) for kind in UNIT_KINDS]
    rows = TextRows(decoder, seed)
    generator = np.random.default_rng([seed, len(UNIT_KINDS)])
    count, length = ids_NT.shape
    runs, losses, dropped = 0, [], []
    for n in range(count):
        position_P = np.sort(generator.permutation(np.arange(1, length - 1))[:tokens])
        ids_T = torch.from_numpy(ids_NT[n])
        dense = DenseRun(decoder, ids_T)
        taken = _Sequence(decoder, dense, position_P, found)
        problem = taken.run(seen)
        if problem:
            dropped.append(f"sequence {n}: {problem}")
        else:
            losses.append(float(dense.losses_T.mean()))
            taken.keep(seen, rows, len(losses) - 1)
            runs += taken.runs
        progress.advance(n + 1, count, "sequences")
    if len(losses) < 2:
        raise InputError(
            f"{len(losses)} of {count} sequences have finite scores; expected 2 or more",
            hint="check the checkpoint for NaN and Inf",
            problems=dropped,
        )
    dropped += _add_text_criteria(seen, rows, [one for one in found if one.per == "text"])
    return AgreementReport(
        rows=tuple(_agreed(one, of_kind, seed) for of_kind in seen for one in found),
        units={of_kind.units.kind: len(of_kind.units) for of_kind in seen},
        runs=runs,
        sequences=len(losses),
        length=length,
        tokens=min(tokens, length - 2),
        seed=seed,
        loss=float(np.mean(losses)),
        truth={of_kind.units.kind: _spread(of_kind) for of_kind in seen},
        dropped=tuple(dropped),
    )


class _Sequence:
    """One sequence: truth and scores, kept only if all of them are finite."""

    def __init__(
        self, decoder: Decoder, dense: DenseRun, position_P: npt.NDArray[np.int64], criteria: list[Criterion]
    ) -> None:
        self._decoder = decoder
        self._dense = dense
        self._position_P = position_P
        self._criteria = [one for one in criteria if one.per != "text"]
        self._wanted = {
            "curvature": any(one.curvature for one in criteria),
            "rows": any(one.weights for one in self._criteria),
        }
        self._signals: list[LayerSignals] = []
        self._truth: dict[str, tuple[Floats, Floats]] = {}
        self._scores: dict[tuple[str, str], tuple[Floats, Floats, float]] = {}
        self.runs = 0

    def run(self, seen: Sequence[_Seen]) -> str:
        """Compute everything; return what is not finite, with its place, or nothing."""
        self._signals, _ = whole_signals(self._decoder, self._dense.ids_T[None], **self._wanted)
        for one in self._criteria:
            problem = self._score(one, [of_kind.units for of_kind in seen])
            if problem:
                return problem
        for of_kind in seen:
            text_U, runs = self._dense.changes(of_kind.units, None)
            at_tokens = [self._dense.changes(of_kind.units, int(p)) for p in self._position_P]
            self.runs += runs + sum(more for _, more in at_tokens)
            token_PU = torch.stack([changes_U for changes_U, _ in at_tokens])
            if not bool(torch.isfinite(text_U).all() and torch.isfinite(token_PU).all()):
                return f"the loss without one of the {of_kind.units.kind} is not finite"
            self._truth[of_kind.units.kind] = token_PU.numpy(), text_U.numpy()
        return ""

    def _score(self, one: Criterion, units: list[Units]) -> str:
        layers = [one.score(of_layer) for of_layer in self._signals]
        for layer, pair in enumerate(layers):
            for kind, values in zip(UNIT_KINDS, pair, strict=True):
                if not bool(torch.isfinite(values).all()):
                    unit = int(torch.nonzero(~torch.isfinite(values))[0, -1])
                    return f"{one.name} of {kind[:-1]} {unit} in layer {layer} is not finite"
        for of_kind, values_L in zip(units, zip(*layers, strict=True), strict=True):
            scores = of_kind.of([values[0] for values in values_L]).double()
            self._scores[one.name, of_kind.kind] = (
                (scores[torch.from_numpy(self._position_P)] if one.per == "token" else scores[None]).numpy(),
                (scores.sum(0) if one.per == "token" else scores).numpy(),
                float((scores == 0).double().mean()),
            )
        return ""

    def keep(self, seen: Sequence[_Seen], rows: TextRows, number: int) -> None:
        """Put everything where it is gathered."""
        for of_kind in seen:
            token_PU, text_U = self._truth[of_kind.units.kind]
            of_kind.token_NPU.append(token_PU)
            of_kind.text_NU.append(text_U)
            for one in self._criteria:
                token, text, zeros = self._scores[one.name, of_kind.units.kind]
                of_kind.scores.setdefault(one.name, []).append((token, text))
                of_kind.zeros.setdefault(one.name, []).append(zeros)
        positions = torch.arange(1, len(self._dense.ids_T) - 1)
        rows.begin(torch.full_like(positions, number), self._dense.ids_T[positions + 1])
        for layer, signals in enumerate(self._signals):
            rows.add(layer, signals, torch.zeros_like(positions), positions)
        self._signals = []


def _add_text_criteria(seen: Sequence[_Seen], rows: TextRows, criteria: list[Criterion]) -> list[str]:
    """Score the whole text once, put the same scores beside every sequence; return what could not be scored."""
    if not criteria:
        return []
    layers: dict[str, list[tuple[Tensor | None, Tensor | None]]] = {one.name: [] for one in criteria}
    problems: dict[str, str] = {}
    for sample in rows.samples():
        for one in criteria:
            try:
                layers[one.name].append(text_scores(one, sample))
            except InputError as error:
                problems.setdefault(one.name, error.message)
    for name in problems:
        del layers[name]
    for number, of_kind in enumerate(seen):
        for name, pairs in layers.items():
            values = [pair[number] for pair in pairs]
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                scores_U = of_kind.units.of(known).double().numpy()
                of_kind.scores[name] = [(scores_U[None], scores_U)] * len(of_kind.text_NU)
                of_kind.zeros[name] = [float((scores_U == 0).mean())]
    return list(problems.values())


def _agreed(one: Criterion, seen: _Seen, seed: int) -> Agreed:
    """Correlate one criterion with the truth."""
    if one.name not in seen.scores:
        names = itertools.product(LEVELS, MEASURES, SCOPES)
        nothing = {f"{level} {measure} {scope}": Interval.none() for level, measure, scope in names}
        return Agreed(one.name, seen.units.kind, float("nan"), nothing)
    text_NU = np.stack([text for _, text in seen.scores[one.name]])
    others_NU = text_NU if one.per == "text" else (text_NU.sum(0) - text_NU) / (len(text_NU) - 1)
    ranks = {}
    for measure in MEASURES:
        for scope in SCOPES:
            groups = seen.units.layer_U if scope == "layer" else np.zeros_like(seen.units.layer_U)
            found: dict[str, list[list[float | None]]] = {level: [] for level in LEVELS}
            for n, (token, text_U) in enumerate(seen.scores[one.name]):
                truth_PU = _measured(seen.token_NPU[n], measure)
                truth_U = _measured(seen.text_NU[n], measure)
                pairs = {
                    "token": zip(np.broadcast_to(token, truth_PU.shape), truth_PU, strict=True),
                    "text": [(text_U, truth_U)],
                    "static": [(others_NU[n], truth_U)],
                }
                for level, ranked in pairs.items():
                    found[level].append([_correlated(s, t, groups, heard=scope == "heard") for s, t in ranked])
            for level, per_sequence in found.items():
                ranks[f"{level} {measure} {scope}"] = Interval.of(per_sequence, seed)
    return Agreed(one.name, seen.units.kind, float(np.mean(seen.zeros[one.name])), ranks)


def _correlated(scores_U: Floats, truth_U: Floats, group_U: npt.NDArray[np.int64], *, heard: bool) -> float | None:
    """Correlate over all units, or over those whose absence changes anything at all."""
    if heard:
        chosen_U = truth_U != 0
        scores_U, truth_U, group_U = scores_U[chosen_U], truth_U[chosen_U], group_U[chosen_U]
    return within_groups(scores_U, truth_U, group_U) if len(truth_U) > 1 else None


def _measured(change: Floats, measure: str) -> Floats:
    return change if measure == "change" else np.abs(change)


def _spread(seen: _Seen) -> dict[str, float]:
    token, text = np.concatenate(seen.token_NPU).ravel(), np.stack(seen.text_NU).ravel()
    found = {}
    for level, values in (("token", token[token != 0]), ("text", text[text != 0])):
        found[f"{level} median size"] = float(np.median(np.abs(values))) if len(values) else 0.0
        found[f"{level} negative"] = float((values < 0).mean()) if len(values) else 0.0
    return found
