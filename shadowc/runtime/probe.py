# SPDX-License-Identifier: Apache-2.0
"""Runs an engine step by step with its inner tensors as outputs: what parity looks at.

Letters: B batch, S new tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shadowc.runtime.decoder import Decoder, ModelSizes, Outputs, Tables
from shadowc.runtime.prompts import Batch
from shadowc.spec.density import Density

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from shadowc.runtime.prompts import Ids
    from shadowc.runtime.sequence import SequenceDecoder
    from shadowc.runtime.session import Session


class Probe:
    """Unpadded sequences through an engine, all graph outputs on show; the cache goes on from step to step.

    Args:
        session, model, in_place, tables: as Decoder takes them.
    """

    def __init__(
        self, session: Session, model: ModelSizes, *, in_place: bool = True, tables: Tables | None = None
    ) -> None:
        self._session = session
        self._model = model
        self._in_place = in_place
        self._tables = tables
        self._decoder: Decoder | None = None

    def step(self, ids_BS: npt.NDArray[np.int64], *, density: Density, sparse_tail: int) -> Outputs:
        """Run the next tokens; returns every output but the cache by name, and the tokens' part of the cache.

        That is `cached.{layer}.key` and `.value` [B,S,H,D], copied.
        """
        if self._decoder is None:
            batch = Batch(ids_BS, np.zeros(len(ids_BS), np.int64))
            self._decoder = Decoder(self._session, self._model, batch, in_place=self._in_place, tables=self._tables)
        self._decoder.set_density(density.heads, density.neurons)
        ids = np.ascontiguousarray(ids_BS, np.int64)
        before = self._decoder.filled
        outputs = self._decoder.feed(ids, sparse_tail=sparse_tail, outputs=self._session.outputs)
        return outputs | {f"cached.{name}": slots for name, slots in self._decoder.cached(before).items()}


class SequenceProbe:
    """As Probe, under one mask: the last dense token of the first step makes it, and later steps are all masked.

    Args:
        decoder_of: a decoder for a batch and the slots of the tokens that make its masks.
        outputs: outputs of its graph, inner tensors included.
    """

    def __init__(self, decoder_of: Callable[[Batch, Ids], SequenceDecoder], outputs: Sequence[str]) -> None:
        self._decoder_of = decoder_of
        self._outputs = [name for name in outputs if name != "read"]  # it has no axis of tokens
        self._decoder: SequenceDecoder | None = None

    def step(self, ids_BS: npt.NDArray[np.int64], *, density: Density, sparse_tail: int) -> Outputs:
        """Run the next tokens; returns what Probe.step returns, but for outputs without an axis of tokens."""
        ids = np.ascontiguousarray(ids_BS, np.int64)
        parts: list[Outputs] = []
        before = 0 if self._decoder is None else self._decoder.filled
        if self._decoder is None:
            dense, rows = ids.shape[1] - sparse_tail, len(ids)
            self._decoder = self._decoder_of(Batch(ids, np.zeros(rows, np.int64)), np.full(rows, dense - 1))
            parts.append(self._decoder.feed(ids[:, :dense], sparse_tail=0, outputs=self._outputs))
            ids = np.ascontiguousarray(ids[:, dense:])
        self._decoder.set_density(density.heads, density.neurons)
        parts.append(self._decoder.feed(ids, sparse_tail=ids.shape[1], outputs=self._outputs))
        joined = {name: np.concatenate([part[name] for part in parts], axis=1) for name in self._outputs}
        for kind, mask_B1LN in self._decoder.mask.items():
            joined[f"scores.{kind}"] = np.repeat(mask_B1LN, ids.shape[1], axis=1)
        return joined | {f"cached.{name}": slots for name, slots in self._decoder.cached(before).items()}
