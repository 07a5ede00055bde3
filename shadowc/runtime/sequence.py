# SPDX-License-Identifier: Apache-2.0
"""A mask that holds for a sequence: the last token of the prompt makes it, all later tokens are computed under it.

Scores depend on layer 0's attention context alone, and layer 0 is dense. So a small graph makes them (embedding, layer
0's attention, predictor), over the cache that the decoding graph fills. Another one turns scores and densities into
thresholds. Both run once per mask; a step runs the decoding graph and nothing else.

Letters: B rows, S new tokens, L predicted layers, N units of a kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shadowc.runtime.decoder import NO_ID, Decoder, TokensRun
from shadowc.runtime.mask_trace import TokenMasks
from shadowc.runtime.variants import CONTEXT_READ
from shadowc.spec.density import UNIT_KINDS

if TYPE_CHECKING:
    from shadowc.runtime.cache import KvCache
    from shadowc.runtime.decoder import Floats, ModelSizes, Outputs, ScoreSource
    from shadowc.runtime.prompts import Batch, Ids
    from shadowc.runtime.session import Session

Read = npt.NDArray[np.int64]
SELECTED = tuple(f"{part}.{kind}" for part in ("threshold", "active") for kind in UNIT_KINDS)
"""What a selection gives, [B,S,L]."""


@dataclass(frozen=True, slots=True)
class Graphs:
    """What a mask per sequence takes."""

    predicting: Session
    """Tokens to scores, see `variants.predicting`."""
    selecting: Session
    """Scores and densities to thresholds, see `variants.selecting`."""
    decoding: Session
    """Everything else; `mask_scores.*` and `threshold.*` are inputs."""


class ScoreMaker:
    """Scores of all units for tokens of one batch.

    Args:
        session: the predicting graph.
        batch: where each row starts.
        cache: of the batch; the slots before the tokens are filled in layer 0.
        control: replaces the predictor.
    """

    def __init__(self, session: Session, batch: Batch, cache: KvCache, control: ScoreSource | None = None) -> None:
        self._session = session
        self._batch = batch
        self._cache = cache
        self._control = control
        self.predicts = control is None

    def scores(self, ids_BS: Ids, past: int) -> tuple[tuple[Floats, ...], Read]:
        """Scores of heads and of neuron units [B,S,L,N] for the tokens in slots `past` on, and what was read [2]."""
        B, S = ids_BS.shape
        if self._control is not None:
            given = tuple(np.broadcast_to(scores, (B, *scores.shape[1:])) for scores in self._control(S))
            return given, np.zeros(2, np.int64)
        names = [f"scores.{kind}" for kind in UNIT_KINDS]
        names += [CONTEXT_READ] if CONTEXT_READ in self._session.outputs else []
        binding = self._session.bind()
        binding.give("input_ids", np.ascontiguousarray(ids_BS))
        binding.give("attention_mask", self._batch.mask(past + S))
        binding.give("sparse_tail", np.array([S], np.int64))
        for name in names:
            binding.take(name)
        self._cache.bind(binding, layers=1)  # writes again what the decoding graph writes, the same numbers
        values = [value.numpy() for value in binding.run()[: len(names)]]
        return (values[0], values[1]), values[2] if len(values) > 2 else np.zeros(2, np.int64)


class SequenceDecoder(Decoder):
    """Feeds tokens of one batch, in order.

    Args:
        graphs: what runs.
        model: its sizes.
        batch: where each row starts.
        units: units of a layer, "heads" and "neurons".
        origins_B: slot of the token of each row that makes its mask, the last one of its prompt.
        refresh: later tokens make the mask anew, each so many after the one before, for itself and those that follow;
            0: none does.
        likely, in_place: see KvCache.
        control: replaces the predictor.
    """

    def __init__(
        self,
        graphs: Graphs,
        model: ModelSizes,
        batch: Batch,
        *,
        units: Mapping[str, int],
        origins_B: Ids,
        refresh: int = 0,
        likely: int = 0,
        in_place: bool = True,
        control: ScoreSource | None = None,
    ) -> None:
        super().__init__(graphs.decoding, model, batch, likely=likely, in_place=in_place)
        B, L = batch.rows, model.layers - 1
        self._scores_held = {f"mask_scores.{kind}": np.zeros((B, 1, L, units[kind]), np.float32) for kind in UNIT_KINDS}
        self._selected: Outputs = {
            name: np.zeros((B, 1, L), np.float32 if name.startswith("threshold") else np.int32) for name in SELECTED
        }
        self._stale = True
        self._inputs = {**self._scores_held, **_thresholds(self._selected)}
        self._selecting = graphs.selecting
        self._maker = ScoreMaker(graphs.predicting, batch, self._cache, control)
        self._origins_B = origins_B
        self._refresh = refresh
        self.predicts = False

    @property
    def mask(self) -> dict[str, Floats]:
        """What the masks are made of now: scores of "heads" and "neurons" [B,1,L,N]."""
        return {kind: self._scores_held[f"mask_scores.{kind}"] for kind in UNIT_KINDS}

    def masks(self) -> TokenMasks:
        """See Decoder.masks."""
        return TokenMasks.of(self.mask, {kind: self._selected[f"threshold.{kind}"] for kind in UNIT_KINDS})

    def set_density(self, heads: float | Floats, neurons: float | Floats) -> None:
        """See Decoder.set_density."""
        super().set_density(heads, neurons)
        self._stale = True

    def mute(self, row: int) -> None:
        """See Decoder.mute."""
        super().mute(row)
        self._stale = True

    def reorder(self, rows_B: npt.NDArray[np.integer[Any]]) -> None:
        """See Decoder.reorder; masks go along."""
        super().reorder(rows_B)
        for held_B1LN in self._scores_held.values():
            held_B1LN[:] = held_B1LN[rows_B]
        self._origins_B = self._origins_B[rows_B]
        self._stale = True

    def feed(self, ids_BS: Ids, *, sparse_tail: int, outputs: Sequence[str], logits_from: int = 0) -> Outputs:
        """See Decoder.feed; `sparse_tail` is 0, or all of the tokens, where rows at density 1 are dense."""
        self.predicts, read, of_steps = False, None, self._inputs
        if sparse_tail:
            scores, read = self._scores_of(ids_BS)
            selected = self._select(scores)
            self._inputs = {**scores, **_thresholds(selected)}
        else:
            selected = {name: array_B1L[:, :0] for name, array_B1L in self._selected.items()}
            self._inputs = {name: array_B1X[:, :0] for name, array_B1X in of_steps.items()}
        computed = [name for name in outputs if name not in selected]
        result = super().feed(ids_BS, sparse_tail=sparse_tail, outputs=computed, logits_from=logits_from)
        self._inputs = of_steps
        ending_B = self._origins_B == self.filled - 1
        if not sparse_tail and ending_B.any():
            self._make(ids_BS[:, -1:], self.filled - 1, ending_B)
        result |= {name: selected[name] for name in outputs if name in selected}
        return _with_read(result, read)

    def step(self, ids_B: Ids) -> Outputs:
        """See Decoder.step."""
        read = self._prepare(ids_B)
        return _with_read(super().step(ids_B) | self._selected, read)

    def run_on(self, token: int, most: int, *, end: int, banned: int = NO_ID) -> TokensRun:
        """See Decoder.run_on; it ends where masks have to be made."""
        read = self._prepare(np.array([token]))
        if self._refresh:
            most = min(most, self._refresh - int(self.filled - self._origins_B[0]) % self._refresh)
        run = super().run_on(token, most, end=end, banned=banned)
        active = (name for name in SELECTED if name.startswith("active."))
        counts = {name: np.repeat(self._selected[name], len(run.ids), axis=0) for name in active}
        return replace(run, outputs=_with_read(run.outputs | counts, read), predictions=int(self.predicts))

    def _prepare(self, ids_B: Ids) -> Read | None:
        """Have masks for the next tokens, of which these are the first; what making them read, if they were made."""
        self.predicts, read = False, None
        if self._refresh:
            making_B = (self.filled - self._origins_B) % self._refresh == 0
            if making_B.any():
                self._reserve(1)
                read = self._make(ids_B[:, None], self.filled, making_B)
        if self._stale:
            for name, array_B1L in self._select(self._scores_held).items():
                self._selected[name][:] = array_B1L
            self._stale = False
        return read

    def _begin_prompt(self, tokens: int) -> None:
        """Let the last of the next tokens make the masks from there on."""
        self._origins_B = np.full(self._batch.rows, self.filled + tokens - 1)

    def _make(self, ids_B1: Ids, past: int, rows_B: npt.NDArray[np.bool_]) -> Read:
        """Let the tokens in slot `past` make the masks of some rows."""
        scores, read = self._maker.scores(ids_B1, past)
        self.predicts, self._stale = self._maker.predicts, True
        for held_B1LN, new_B1LN in zip(self._scores_held.values(), scores, strict=True):
            held_B1LN[rows_B] = new_B1LN[rows_B]
        return read

    def _select(self, scores: Mapping[str, Floats]) -> Outputs:
        """Thresholds and numbers of active units [B,S,L] for scores [B,S,L,N], at the rows' densities."""
        binding = self._selecting.bind()
        for name, array in (*scores.items(), *self._density.items()):
            binding.give(name, array)
        for name in SELECTED:
            binding.take(name)
        return {name: value.numpy() for name, value in zip(SELECTED, binding.run(), strict=True)}

    def _scores_of(self, ids_BS: Ids) -> tuple[dict[str, Floats], Read | None]:
        """Scores [B,S,L,N] behind the masks of the next tokens; rows whose prompt goes on get any: they are dense."""
        B, S = ids_BS.shape
        past = self.filled
        since_BS = np.arange(past, past + S) - self._origins_B[:, None]
        maker_BS = since_BS // self._refresh * self._refresh if self._refresh else np.zeros((B, S), np.int64)
        at_BS = maker_BS + self._origins_B[:, None] - past  # which of these tokens made it; below 0: an earlier one
        here_BS = (since_BS >= 0) & (at_BS >= 0)
        if not here_BS.any():
            return {name: np.repeat(held_B1LN, S, axis=1) for name, held_B1LN in self._scores_held.items()}, None
        self._reserve(S)
        scores, read = self._maker.scores(ids_BS, past)
        self.predicts, self._stale = self._maker.predicts, True
        row_B1, found = np.arange(B)[:, None], {}
        for (name, held_B1LN), new_BSLN in zip(self._scores_held.items(), scores, strict=True):
            chosen_BSLN = new_BSLN[row_B1, np.where(here_BS, at_BS, 0)]
            found[name] = np.where(here_BS[:, :, None, None], chosen_BSLN, held_B1LN)
            held_B1LN[:] = found[name][:, -1:]
        return found, read


def _thresholds(selected: Outputs) -> Outputs:
    return {name: array for name, array in selected.items() if name.startswith("threshold.")}


def _with_read(outputs: Outputs, read: Read | None) -> Outputs:
    """Count what making the masks read as layer 0's attention."""
    if read is not None and "read" in outputs:
        outputs["read"][0, 0] += read
    return outputs
