# SPDX-License-Identifier: Apache-2.0
"""Parity B: engine and masked torch model both generate freely, each with its own masks, and must agree.

A difference is excused only where rounding may decide: a unit whose score lies at the threshold, two
logits that tie, or anything after such a unit: in later tokens (its effect stays in the cache) and, where every layer
scores its own units, in later layers of the same token. All are counted.

Letters: B prompts, S prompt tokens, L predicted layers, N units per layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowc.spec.density import UNIT_KINDS, Density
from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.runtime.engine import Engine
    from shadowc.runtime.probe import Probe
    from shadowc.sparsity.reference import MaskedModel
    from shadowc.spec.options import Style

NEAR_THRESHOLD = 1e-5
"""A unit this close to the threshold may fall either way: a share of the spread of the scores ranked together, which
are those of its layer (local) or of all layers that are not exempt (global)."""
LOGIT_TIE = 1e-4
"""Two top logits closer than this share of the largest |logit| may change places (fp32)."""
EXCUSED_LIMIT = 0.005
"""At most this share of the tokens may be excused."""
_COUNTS = (
    "tokens", "near_units", "near_ties",
    "masks_excused", "masks_after", "masks_wrong", "tokens_excused", "tokens_wrong",
)  # fmt: skip

Step = dict[str, "npt.NDArray[Any]"]
"""`logits` [B,V], and per kind `scores.*` [B,L,N] and `threshold.*` [B,L] of one token per prompt."""


@dataclass(frozen=True, slots=True)
class FreeRun:
    """Counts over all prompts of one setting, up to and including each prompt's first differing token."""

    density: Density
    scope: str
    tokens: int
    near_units: int
    """Tokens where another unit is as close to the threshold as the one that sets it: either may be active."""
    near_ties: int
    """Tokens whose two top logits tie."""
    masks_excused: int
    """Tokens whose masks differ in units at the threshold only."""
    masks_after: int
    """Tokens whose masks differ elsewhere, but after such a unit, of the token or of one before it."""
    masks_wrong: int
    tokens_excused: int
    """Tokens that differ by a tie, or after a unit at the threshold."""
    tokens_wrong: int

    def passed(self) -> bool:
        """No difference without an excuse, and few with one."""
        return self.masks_wrong == self.tokens_wrong == 0 and self.excused <= EXCUSED_LIMIT * self.tokens

    @property
    def excused(self) -> int:
        """Differences with an excuse, of masks and of tokens."""
        return self.masks_excused + self.masks_after + self.tokens_excused


def free_run(
    engine: Engine,
    masked: MaskedModel,
    prompts_BS: npt.NDArray[np.int64],
    *,
    tokens: int,
    density: Density,
) -> FreeRun:
    """Lets both generate `tokens` tokens greedily after each prompt (dense prompt, then a mask per token).

    Args:
        engine: fp32, with a predictor.
        masked: the masked torch model of the same checkpoint, predictor and plan.
        prompts_BS: prompts of equal length, without padding.
        tokens: tokens generated per prompt.
        density: shares kept.

    Raises:
        InputError: the engine is dense.
    """
    sparsity = engine.manifest.sparsity
    if sparsity is None:
        raise InputError(
            "a dense engine makes no masks that could differ", hint="shadowc compile without --predictor none"
        )
    ranked = sparsity.select == "exact"
    rows = [_Row(sparsity.scope, sparsity.exempt, sparsity.style, ranked) for _ in prompts_BS]
    ours, theirs = _engine_steps(engine.prober()(), prompts_BS, density), _torch_steps(masked, prompts_BS, density)
    mine, other = ours(None), theirs(None)
    for _ in range(tokens):
        ids_B, wanted_B = mine["logits"].argmax(axis=1), other["logits"].argmax(axis=1)
        for index, row in enumerate(rows):
            row.token(_of(mine, index), _of(other, index), same=bool(ids_B[index] == wanted_B[index]))
        if all(row.parted for row in rows):
            break
        mine, other = ours(ids_B), theirs(wanted_B)
        for index, row in enumerate(rows):
            row.masks(_of(mine, index), _of(other, index))
    totals = {name: sum(getattr(row, name) for row in rows) for name in _COUNTS}
    return FreeRun(density=density, scope=sparsity.scope, **totals)


@dataclass(slots=True)
class _Row:
    """Counts of one prompt, until its two texts part."""

    scope: str
    exempt: Sequence[int]
    style: Style = "shadow"
    ranked: bool = True
    """One of the units sets the threshold."""
    tokens: int = 0
    near_units: int = 0
    near_ties: int = 0
    masks_excused: int = 0
    masks_after: int = 0
    masks_wrong: int = 0
    tokens_excused: int = 0
    tokens_wrong: int = 0
    parted: bool = False
    """The texts differ from here on: nothing more is counted."""
    _touched: bool = False
    """A mask of this prompt already differed, so its cache does too."""

    def token(self, mine: Step, other: Step, *, same: bool) -> None:
        """Counts one chosen token."""
        if self.parted:
            return
        self.tokens += 1
        tie = _ties(mine["logits"]) or _ties(other["logits"])
        self.near_ties += tie
        self.parted = not same
        if self.parted and (tie or self._touched):
            self.tokens_excused += 1
        elif self.parted:
            self.tokens_wrong += 1

    def masks(self, mine: Step, other: Step) -> None:
        """Counts the masks of one token; S: the selections of all layers, each layer's heads before its neurons."""
        if self.parted:
            return
        near = False
        differ: list[npt.NDArray[np.bool_]] = []
        beyond: list[npt.NDArray[np.bool_]] = []
        for kind in UNIT_KINDS:
            a, b = _mask(mine, kind), _mask(other, kind)
            close = near_threshold(
                other[f"scores.{kind}"], other[f"threshold.{kind}"], scope=self.scope, exempt=self.exempt
            )
            together = (1, 2) if self.scope == "global" else 2
            near |= bool((close.sum(axis=together) > int(self.ranked)).any())  # the unit that sets it is always close
            differ.append((a != b).any(axis=(0, 2)))
            beyond.append(((a != b) & ~close).any(axis=(0, 2)))
        self.near_units += near
        differ_S, beyond_S = (np.stack(parts, axis=1).reshape(-1) for parts in (differ, beyond))  # as they are made
        if not differ_S.any():
            return
        if not beyond_S.any():
            self.masks_excused += 1
        elif self._touched or not self._caused(int(differ_S.argmax()), beyond_S):
            self.masks_after += 1
        else:
            self.masks_wrong += 1
        self._touched = True

    def _caused(self, first: int, beyond_S: npt.NDArray[np.bool_]) -> bool:
        """Whether no unit at the threshold explains a token's differences; `first` is the first selection that has any.

        Scores of style shadow are made at once, those of dejavu by layer, those of shadow+ selection by selection.
        """
        together = {"shadow": len(beyond_S), "dejavu": len(UNIT_KINDS), "shadow+": 1}[self.style]
        begin = first // together * together
        return bool(beyond_S[begin : begin + together].any())


def _of(step: Step, row: int) -> Step:
    """The step of one prompt, as a batch of one."""
    return {name: value[row : row + 1] for name, value in step.items()}


def _mask(step: Step, kind: str) -> npt.NDArray[np.bool_]:
    return ~(step[f"scores.{kind}"] < step[f"threshold.{kind}"][..., None])


def near_threshold(
    scores_BLN: npt.NDArray[np.float32], threshold_BL: npt.NDArray[np.float32], *, scope: str, exempt: Sequence[int]
) -> npt.NDArray[np.bool_]:
    """Units whose score lies at a finite threshold, [B,L,N]; none where the spread is not finite."""
    ranked = [layer for layer in range(scores_BLN.shape[1]) if layer not in exempt]
    axes = 2 if scope == "local" else (1, 2)
    near_BLN = np.zeros(scores_BLN.shape, np.bool_)
    if ranked:
        scores_BRN = scores_BLN[:, ranked].astype(np.float64)
        with np.errstate(invalid="ignore"):
            distance_BRN = np.abs(scores_BRN - threshold_BL[:, ranked, None])
            spread = scores_BRN.max(axis=axes, keepdims=True) - scores_BRN.min(axis=axes, keepdims=True)
            near_BLN[:, ranked] = np.isfinite(spread) & (distance_BRN <= NEAR_THRESHOLD * spread)
    return near_BLN


def _ties(logits_BV: npt.NDArray[np.float32]) -> bool:
    second, first = np.partition(logits_BV[0], -2)[-2:]
    return bool(first - second <= LOGIT_TIE * np.abs(logits_BV).max())


def _engine_steps(
    probe: Probe, prompts_BS: npt.NDArray[np.int64], density: Density
) -> Callable[[npt.NDArray[np.int64] | None], Step]:
    """None feeds the prompts, ids [B] the next tokens; returns what the engine's graph put out for the last token."""

    def step(ids_B: npt.NDArray[np.int64] | None) -> Step:
        if ids_B is None:
            outputs = probe.step(prompts_BS, density=density, sparse_tail=0)
            return {"logits": outputs["logits"][:, -1]}
        outputs = probe.step(ids_B[:, None], density=density, sparse_tail=-1)
        names = ["logits", *(f"{part}.{kind}" for part in ("scores", "threshold") for kind in UNIT_KINDS)]
        return {name: outputs[name][:, -1] for name in names}

    return step


def _torch_steps(
    masked: MaskedModel, prompts_BS: npt.NDArray[np.int64], density: Density
) -> Callable[[npt.NDArray[np.int64] | None], Step]:
    """The same for the masked torch model."""
    from shadowc.sparsity.reference import MaskedState

    state = MaskedState()
    first = prompts_BS.shape[1]

    def step(ids_B: npt.NDArray[np.int64] | None) -> Step:
        ids_BS = prompts_BS if ids_B is None else ids_B[:, None]
        result = masked.logits(ids_BS, density=density, masked_from=first, state=state)
        if ids_B is None:
            return {"logits": result.logits[:, -1].numpy()}
        found = {
            "scores.heads": result.scores_heads,
            "scores.neurons": result.scores_neurons,
            "threshold.heads": result.threshold_heads,
            "threshold.neurons": result.threshold_neurons,
        }
        steps = {name: value[:, -1].numpy() for name, value in found.items() if value is not None}
        return {"logits": result.logits[:, -1].numpy(), **steps}

    return step
