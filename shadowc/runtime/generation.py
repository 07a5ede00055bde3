# SPDX-License-Identifier: Apache-2.0
"""The two loops over a decoder: greedy generation, and teacher forcing in chunks.

Letters: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Protocol

import numpy as np

from shadowc.runtime.decoder import Floats, Outputs, chunks
from shadowc.runtime.mask_trace import TokenMasks
from shadowc.runtime.prompts import Batch, Ids
from shadowc.runtime.stats import Meter
from shadowc.spec.density import Density
from shadowc.spec.manifest import ModelPart

Watch = Callable[[TokenMasks], object]
"""Called with the masks of every token after the first new one, in order."""


class TokenDecoder(Protocol):
    """Feeds the tokens of one batch, in order; what runs the graph stands behind it."""

    @property
    def predicts(self) -> bool:
        """Whether the last run asked the predictor."""

    def set_density(self, heads: float | Floats, neurons: float | Floats) -> None:
        """Set the density of all rows (a number) or of each row ([B]); it holds from the next run on."""

    def mute(self, row: int) -> None:
        """Compute as little as possible for a finished row from now on."""

    def prefill(self, ids_BS: Ids) -> Floats:
        """Run a prompt without masks; returns the logits [B,V] after its last token."""

    def prompt_logits(self, ids_BS: Ids) -> Floats:
        """Run a prompt without masks; returns the logits [B,S,V] after each of its tokens."""

    def feed(self, ids_BS: Ids, *, sparse_tail: int, outputs: Sequence[str]) -> Outputs:
        """Run any number of tokens and return the named outputs; the last `sparse_tail` tokens are masked."""

    def step(self, ids_B: Ids) -> Outputs:
        """Run one masked token per row; the arrays returned are overwritten by the next step."""

    def masks(self) -> TokenMasks:
        """What the last step computed; the decoder was made to show it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a row ends."""

    most: int
    least: int
    eos: int
    pad: int
    positions: int


def greedy(
    decoder: TokenDecoder,
    batch: Batch,
    limits: Limits,
    density: Density,
    meter: Meter,
    stream: Callable[[Ids], object] | None,
    watch: Watch | None = None,
) -> tuple[Ids, tuple[str, ...]]:
    """Dense pass over the prompt, then one masked token at a time.

    Returns:
        The new ids [B,n], pad tokens after a row's end, and why each row ended.
    """
    started = perf_counter()
    logits_BV = decoder.prefill(batch.ids)
    meter.prefill_seconds = perf_counter() - started
    decoder.set_density(density.heads, density.neurons)
    room = min(limits.most, limits.positions - batch.slots)
    new_BN = np.full((batch.rows, room), limits.pad, np.int64)
    live_B, living, all_live = np.ones(batch.rows, np.bool_), True, True
    for count in range(1, room + 1):
        began = perf_counter()
        if count <= limits.least:
            logits_BV[:, limits.eos] = -np.inf
        # Few calls of numpy: between two tokens its code and data have left the caches, and each takes 10 us.
        ids_B = logits_BV.argmax(axis=1)
        if not all_live:
            ids_B[~live_B] = limits.pad
        new_BN[:, count - 1] = ids_B
        if limits.eos in ids_B.tolist():
            for row in np.flatnonzero(live_B & (ids_B == limits.eos)):
                live_B[row] = False
                decoder.mute(int(row))
            living, all_live = bool(live_B.any()), bool(live_B.all())
        going_on = count < room and living
        if going_on:
            outputs = decoder.step(ids_B)
            meter.add(outputs, live_B[:, None], predicted=decoder.predicts)
            logits_BV = outputs["logits"][:, 0]
            meter.seconds += perf_counter() - began
            if watch is not None:
                watch(decoder.masks())
        if stream is not None:
            stream(ids_B)
        if not going_on:
            new_BN = new_BN[:, :count]
            break
    cut = "length" if room == limits.most else "context"
    return new_BN, tuple(cut if live else "eos" for live in live_B)


def teacher_forced(
    decoder: TokenDecoder,
    batch: Batch,
    density: Density,
    meter: Meter,
    *,
    prompt_tokens: int | None,
    outputs: Sequence[str],
) -> Iterator[tuple[int, int, Outputs]]:
    """Run all tokens in chunks; yields (first slot, masked tokens of the chunk, outputs).

    `prompt_tokens` of each row stay dense (its padding does not count); None: all of them.
    """
    first_B = batch.starts + prompt_tokens if prompt_tokens is not None else np.full(batch.rows, batch.slots)
    edges = sorted({0, batch.slots, *np.minimum(first_B, batch.slots).tolist()})
    for begin, end in pairwise(edges):
        masked_B = first_B <= begin
        decoder.set_density(np.where(masked_B, density.heads, 1.0), np.where(masked_B, density.neurons, 1.0))
        for start, stop in chunks(begin, end, batch.rows):
            tail = stop - start if masked_B.any() else 0
            began = perf_counter()
            result = decoder.feed(batch.ids[:, start:stop], sparse_tail=tail, outputs=outputs)
            if tail:
                meter.seconds += perf_counter() - began
                meter.add(result, np.repeat(masked_B[:, None], tail, axis=1), predicted=decoder.predicts)
            else:
                meter.prefill_seconds += perf_counter() - began
            yield start, tail, result


def limits_of(model: ModelPart, most: int, least: int) -> Limits:
    """The limits that a model and a call give."""
    return Limits(most=most, least=least, eos=model.eos, pad=model.pad, positions=model.positions)
