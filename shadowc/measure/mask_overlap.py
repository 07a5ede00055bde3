# SPDX-License-Identifier: Apache-2.0
"""An engine beside the masked torch model on a text: do they compute the same units, and lose the same bits?

Each runs with its own scores, thresholds and masks, and with K/V made under those masks, so rounding in one layer moves
the masks of later layers and tokens. What parity A forces and parity B excuses is simply counted here.

Letters: S tokens, Z masked tokens (the last of the S), L predicted layers, N units of a kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch

from shadowc.eval.likelihood import log_likelihood
from shadowc.eval.metric import Interval, Metric, difference
from shadowc.eval.request import Outcome, Setting
from shadowc.spec.density import UNIT_KINDS
from shadowc.spec.errors import InputError, VerificationError
from shadowc.spec.progress import NullProgress, Progress

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.eval.request import Request
    from shadowc.eval.texts import TextCorpus
    from shadowc.runtime.engine import Engine
    from shadowc.sparsity.reference import MaskedModel
    from shadowc.spec.density import Density

    Masks = npt.NDArray[np.bool_]

LEAST_SHARED: Mapping[str, float] = MappingProxyType({"fp32": 0.999, "bf16": 0.95, "int8": 0.95, "int4": 0.5})
"""By type of weights, the share of the units that either computes which both must compute. fp32 parts where two sums of
the same numbers do. The others also round weights and the K/V, so a unit near the threshold changes sides."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Masks of one kind, summed over all masked tokens and predicted layers."""

    alike: float
    """Share of all units on which both decide alike; high by itself where nearly all are kept or skipped."""
    shared: float
    """Of the units that either computes, the share that both compute."""
    tokens_alike: float
    """Share of the masked tokens whose masks are the same in every layer."""


@dataclass(frozen=True, slots=True)
class OverlapRow:
    """One density on one text; dense at 1/1, where no mask can differ."""

    density: Density
    masked: int
    """Tokens under a mask."""
    heads: Agreement
    neurons: Agreement
    engine: float
    """Bits per byte."""
    torch: float
    above: Interval
    """Bits per byte of the engine above torch's, paired over documents."""


@dataclass(frozen=True, slots=True)
class OverlapReport:
    """All densities of one engine."""

    engine: str
    """Its build key."""
    weights: str
    style: str
    text_sha256: str
    tokens: int
    window: int
    rows: tuple[OverlapRow, ...]

    def require(self) -> None:
        """Refuse an engine whose masks are not torch's.

        Raises:
            VerificationError: at some density fewer units are shared than the rounding of its weights explains.
        """
        least = LEAST_SHARED[self.weights]
        wrong = [
            f"{row.density.heads:g}/{row.density.neurons:g}: {getattr(row, kind).shared:.1%} of the {kind} that either "
            f"computes are computed by both, expected at least {least:.1%}"
            for row in self.rows
            for kind in UNIT_KINDS
            if not getattr(row, kind).shared >= least
        ]
        if wrong:
            raise VerificationError(
                f"the {self.weights} engine does not choose the units that torch chooses",
                hint="name the predictor it was compiled with; shadowc verify ENGINE --against MODEL names the part",
                problems=wrong,
            )


def overlap(
    engine: Engine,
    masked: MaskedModel,
    corpus: TextCorpus,
    densities: Sequence[Density],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> OverlapReport:
    """Run both over the windows of a text under protocol `decode` and compare masks and likelihoods.

    Args:
        engine: of target cpu, loaded with `exact_prompts`, that makes a mask for every token.
        masked: the torch model of the checkpoint and the predictor that it should have been compiled from, with the
            plan that it should follow.
        corpus: windows of running text.
        densities: shares kept.
        seed: of the bootstrap.
        progress: told about windows.

    Raises:
        InputError: the engine is dense, makes a mask for a sequence, or has other units than the predictor.
    """
    sparsity = engine.manifest.sparsity
    if sparsity is None or sparsity.mask != "token":
        raise InputError(
            "only an engine that makes a mask for every token has masks to compare token by token",
            hint="shadowc compile --predictor FOLDER --mask token",
        )
    if sparsity.neuron_block != masked.plan.block or sparsity.style != masked.plan.style:
        raise InputError(
            f"the engine has style {sparsity.style} with blocks of {sparsity.neuron_block} neurons, the predictor has "
            f"style {masked.plan.style} with blocks of {masked.plan.block}",
            hint="name the predictor that the engine was compiled with",
        )
    progress, rows = progress or NullProgress(), []
    work = len(corpus.items) * len(densities)
    for number, density in enumerate(densities):
        counts = {kind: _Counts() for kind in UNIT_KINDS}
        outcomes: tuple[list[list[Outcome]], list[list[Outcome]]] = ([], [])
        for done, item in enumerate(corpus.items, start=number * len(corpus.items) + 1):
            (request,) = item.requests
            for known, outcome in zip(outcomes, _both(engine, masked, request, density, counts), strict=True):
                known.append([outcome])
            progress.advance(done, work, "windows")
        mine, other = (corpus.metrics(known)[0] for known in outcomes)
        rows.append(_row(density, counts, mine, other, seed))
    return OverlapReport(
        engine=engine.manifest.build_key,
        weights=engine.manifest.weights,
        style=sparsity.style,
        text_sha256=corpus.sha256,
        tokens=corpus.tokens,
        window=corpus.window,
        rows=tuple(rows),
    )


class _Counts:
    """Adds up the masks of one kind."""

    def __init__(self) -> None:
        self.tokens = self.same_tokens = self.units = self.alike = self.both = self.either = 0

    def add(self, mine_ZLN: Masks, other_ZLN: Masks) -> None:
        """Count the masked tokens of a window."""
        if mine_ZLN.shape != other_ZLN.shape:
            raise InputError(
                f"tokens, layers, units: the engine masks {list(mine_ZLN.shape)}, torch {list(other_ZLN.shape)}",
                hint="name the checkpoint and the predictor that the engine was compiled from",
            )
        same_ZLN = mine_ZLN == other_ZLN
        self.tokens += len(same_ZLN)
        self.same_tokens += int(same_ZLN.all(axis=(1, 2)).sum())
        self.units += same_ZLN.size
        self.alike += int(same_ZLN.sum())
        self.both += int((mine_ZLN & other_ZLN).sum())
        self.either += int((mine_ZLN | other_ZLN).sum())

    def agreement(self) -> Agreement:
        """Their shares; 1 where there is nothing to disagree on."""
        return Agreement(
            alike=self.alike / max(self.units, 1),
            shared=self.both / self.either if self.either else 1.0,
            tokens_alike=self.same_tokens / max(self.tokens, 1),
        )


def _both(
    engine: Engine, masked: MaskedModel, request: Request, density: Density, counts: Mapping[str, _Counts]
) -> tuple[Outcome, Outcome]:
    """Run a window through both, count its masks, and return what each says of the text: engine, torch."""
    first = Setting("predictor", density).dense_tokens(request)
    ids_1S = request.inputs[None]
    with torch.inference_mode():
        result = masked.logits(ids_1S, density=density, masked_from=first)
    if first < ids_1S.shape[1]:
        trace = engine.trace(ids_1S, density, prompt_tokens=first)
        for kind, mask in zip(UNIT_KINDS, (result.mask_heads, result.mask_neurons), strict=True):
            counts[kind].add(trace.mask(kind)[0], mask[0].numpy())
        mine_1SV = trace.logits
    else:  # a last piece of one token, which is dense
        mine_1SV = engine.logits(ids_1S, density, prompt_tokens=first)
    logits = mine_1SV[0], result.logits[0].numpy()
    mine, other = (Outcome(*log_likelihood(one[-request.scored :], request.targets)) for one in logits)
    return mine, other


def _row(density: Density, counts: Mapping[str, _Counts], mine: Metric, other: Metric, seed: int) -> OverlapRow:
    return OverlapRow(
        density=density,
        masked=counts["heads"].tokens,
        heads=counts["heads"].agreement(),
        neurons=counts["neurons"].agreement(),
        engine=mine.value,
        torch=other.value,
        above=difference(mine, other, seed),
    )
