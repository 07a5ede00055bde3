# SPDX-License-Identifier: Apache-2.0
"""Runs an engine step by step with its inner tensors as outputs: what parity looks at.

Letters: B batch, S new tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shadowc.runtime.decoder import Decoder, ModelSizes, Outputs
from shadowc.runtime.prompts import Batch
from shadowc.spec.density import Density

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.runtime.session import Session


class Probe:
    """Unpadded sequences through an engine, all graph outputs on show; the cache goes on from step to step."""

    def __init__(self, session: Session, model: ModelSizes, *, in_place: bool = True) -> None:
        self._session = session
        self._model = model
        self._in_place = in_place
        self._decoder: Decoder | None = None

    def step(self, ids_BS: npt.NDArray[np.int64], *, density: Density, sparse_tail: int) -> Outputs:
        """Run the next tokens; returns every output but the cache by name, and the tokens' part of the cache.

        That is `cached.{layer}.key` and `.value` [B,S,H,D], copied.
        """
        if self._decoder is None:
            batch = Batch(ids_BS, np.zeros(len(ids_BS), np.int64))
            self._decoder = Decoder(self._session, self._model, batch, in_place=self._in_place)
        self._decoder.set_density(density.heads, density.neurons)
        ids = np.ascontiguousarray(ids_BS, np.int64)
        before = self._decoder.filled
        outputs = self._decoder.feed(ids, sparse_tail=sparse_tail, outputs=self._session.outputs)
        return outputs | {f"cached.{name}": slots for name, slots in self._decoder.cached(before).items()}
