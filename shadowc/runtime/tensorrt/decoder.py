# SPDX-License-Identifier: Apache-2.0
"""One batch of sequences moving through the two plans.

Letters: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shadowc.runtime.tensorrt.device import with_room
from shadowc.spec.errors import InputError, InternalError

if TYPE_CHECKING:
    from shadowc.runtime.decoder import Floats, Outputs
    from shadowc.runtime.mask_trace import TokenMasks
    from shadowc.runtime.prompts import Batch, Ids
    from shadowc.runtime.tensorrt.workspace import Arrays, Prefill, Workspace

_DIALS = ("density_heads", "density_neurons")
_SUMMED = ("read",)
"""Outputs that count over a whole run; all others have a token axis."""


class DeviceDecoder:
    """Feeds tokens of one batch, in order; see generation.TokenDecoder.

    Args:
        space: cache and buffers of this batch size; they belong to the decoder that was made last.
        prefill: the dense pass.
        batch: where each row starts.
        chunk: most tokens that the decode plan takes at once.
        make_room: frees memory of other batch sizes; False: there is none.
    """

    predicts = True
    """Every run asks the predictor."""

    def __init__(
        self, space: Workspace, prefill: Prefill, batch: Batch, chunk: int, make_room: Callable[[], bool]
    ) -> None:
        self._space = space
        self._turn = space.begin()
        self._prefill = prefill
        self._batch = batch
        self._chunk = chunk
        self._make_room = make_room
        self._filled = 0
        self._density = {name: np.ones(batch.rows, np.float32) for name in _DIALS}

    @property
    def filled(self) -> int:
        """Slots in the cache."""
        return self._filled

    def set_density(self, heads: float | Floats, neurons: float | Floats) -> None:
        """Set the density of all rows (a number) or of each row ([B]); it holds from the next run on."""
        for name, value in zip(_DIALS, (heads, neurons), strict=True):
            self._density[name][:] = value

    def mute(self, row: int) -> None:
        """Compute as little as possible for a finished row from now on."""
        for values in self._density.values():
            values[row] = 0.0

    def prefill(self, ids_BS: Ids) -> Floats:
        """Run a prompt without masks; returns the logits [B,V] after its last token."""
        S = ids_BS.shape[1]
        self._require_turn()
        if self._filled:
            raise InternalError(f"a prompt must come first, {self._filled} slots are filled")
        self._require_room(S)
        values: Arrays = {"input_ids": ids_BS, "attention_mask": self._batch.mask(S)}
        logits_BV = with_room(lambda: self._prefill.run(values, self._space), self._make_room)
        self._filled = S
        return logits_BV

    def prompt_logits(self, ids_BS: Ids) -> Floats:
        """Run a prompt without masks; returns the logits [B,S,V] after each of its tokens."""
        return np.asarray(self.feed(ids_BS, sparse_tail=0, outputs=("logits",))["logits"], np.float32)

    def feed(self, ids_BS: Ids, *, sparse_tail: int, outputs: Sequence[str]) -> Outputs:
        """Run any number of tokens, all of them masked or none, and return the named outputs."""
        S = ids_BS.shape[1]
        if sparse_tail not in (0, S):
            raise InternalError(f"{sparse_tail} of {S} tokens are masked; the decode plan masks all or none")
        parts: dict[str, list[npt.NDArray[Any]]] = {}
        for start in range(0, S, self._chunk):
            piece_BS = ids_BS[:, start : start + self._chunk]
            found = self._run(piece_BS, dense=sparse_tail == 0)
            for name in outputs:
                if name in found:
                    parts.setdefault(name, []).append(found[name].copy())
        return {name: _joined(name, pieces) for name, pieces in parts.items()}

    def step(self, ids_B: Ids) -> Outputs:
        """Run one masked token per row; the arrays returned are overwritten by the next step."""
        return self._run(ids_B[:, None], dense=False)

    def masks(self) -> TokenMasks:
        """Plans do not put their scores out; the engine refuses to be asked."""
        raise InternalError("a plan shows no masks (callers check first)")

    def _run(self, ids_BS: Ids, *, dense: bool) -> Arrays:
        S = ids_BS.shape[1]
        self._require_turn()
        self._require_room(S)
        density = {name: np.ones_like(values) if dense else values for name, values in self._density.items()}
        past_B = np.full(self._batch.rows, self._filled, np.int64)
        values: Arrays = {"input_ids": ids_BS, "past": past_B, "start": self._batch.starts, **density}
        if S == 1:
            outputs = self._space.step(values)
        else:
            outputs = with_room(lambda: self._space.feed(values, S), self._make_room)
        read = outputs.get("read")
        if read is not None and (read < 0).any():
            raise InternalError(f"a kernel dropped keys: {self._filled} + {S} slots of {self._space.capacity}")
        self._filled += S
        return outputs

    def _require_turn(self) -> None:
        if self._space.turn != self._turn:
            raise InputError(
                "another sequence was begun on this engine, and its keys and values took the place of this one's",
                hint="end one sequence before the next, or load the engine once for each",
            )

    def _require_room(self, tokens: int) -> None:
        if self._filled + tokens > self._space.capacity:
            raise InternalError(
                f"{self._filled} + {tokens} slots wanted, the cache has {self._space.capacity} (callers check first)"
            )


def _joined(name: str, pieces: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    if name in _SUMMED:
        total: npt.NDArray[Any] = np.sum(pieces, axis=0)
        return total
    return np.concatenate(pieces, axis=1)
