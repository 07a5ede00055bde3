# SPDX-License-Identifier: Apache-2.0
"""What `Engine.trace` shows: scores, thresholds and masks of every masked token.

Letters: B rows, S tokens, Z masked tokens, V vocabulary, L predicted layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shadowc.spec.density import UNIT_KINDS

if TYPE_CHECKING:
    from shadowc.runtime.decoder import Outputs

Floats = npt.NDArray[np.float32]

PARTS = ("scores", "threshold", "active")
SEEN = tuple(f"{part}.{kind}" for part in PARTS for kind in UNIT_KINDS)
"""The graph outputs that make a trace."""


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Which units one masked token of every row computed, in the predicted layers."""

    heads: npt.NDArray[np.bool_]
    """[B,L,heads]"""
    neurons: npt.NDArray[np.bool_]
    """[B,L,units of neurons]"""

    @staticmethod
    def of(scores: Mapping[str, Floats], threshold: Mapping[str, Floats]) -> TokenMasks:
        """From "heads" and "neurons" -> scores [B,1,L,units] and thresholds [B,1,L]."""
        return TokenMasks(*(~(scores[kind][:, 0] < threshold[kind][:, 0, :, None]) for kind in UNIT_KINDS))


@dataclass(frozen=True, slots=True)
class MaskTrace:
    """Logits of all tokens, and scores and masks of the masked ones in order."""

    logits: Floats
    """[B,S,V]"""
    scores: Mapping[str, Floats]
    """"heads" and "neurons" -> [B,Z,L,units]."""
    threshold: Mapping[str, Floats]
    """"heads" and "neurons" -> [B,Z,L]."""
    active: Mapping[str, npt.NDArray[np.int32]]
    """"heads" and "neurons" -> [B,Z,L], as the engine counted them."""

    @staticmethod
    def joined(logits: Floats, chunks: Sequence[Outputs]) -> MaskTrace:
        """Put the outputs of successive runs together, along the tokens."""

        def along_tokens(name: str) -> npt.NDArray[Any]:
            return np.concatenate([outputs[name] for outputs in chunks], axis=1)

        parts = {part: {kind: along_tokens(f"{part}.{kind}") for kind in UNIT_KINDS} for part in PARTS}
        return MaskTrace(logits=logits, **parts)

    def mask(self, kind: str) -> npt.NDArray[np.bool_]:
        """Which units were computed, [B,Z,L,units]."""
        masked: npt.NDArray[np.bool_] = ~(self.scores[kind] < self.threshold[kind][..., None])
        return masked
