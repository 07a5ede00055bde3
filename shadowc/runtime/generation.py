# SPDX-License-Identifier: Apache-2.0
"""The two loops over a decoder: greedy generation, and teacher forcing in chunks.

Letters: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import numpy as np
import numpy.typing as npt

from shadowc.runtime.decoder import Decoder, Outputs
from shadowc.runtime.prompts import Batch, Ids
from shadowc.runtime.stats import Meter
from shadowc.spec.density import Density
from shadowc.spec.manifest import ModelPart

CHUNK_TOKENS = 128
"""Tokens per run, all rows together at most twice that: bounds the memory of logits and scores."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a row ends."""

    most: int
    least: int
    eos: int
    pad: int
    positions: int


def greedy(
    decoder: Decoder,
    batch: Batch,
    limits: Limits,
    density: Density,
    meter: Meter,
    stream: Callable[[Ids], object] | None,
) -> tuple[Ids, tuple[str, ...]]:
    """Dense pass over the prompt, then one masked token at a time.

    Returns:
        The new ids [B,n], pad tokens after a row's end, and why each row ended.
    """
    started = perf_counter()
    logits_BV = _prefill(decoder, batch)
    meter.prefill_seconds = perf_counter() - started
    decoder.set_density(density.heads, density.neurons)
    room = min(limits.most, limits.positions - batch.slots)
    new_BN = np.full((batch.rows, room), limits.pad, np.int64)
    live_B = np.ones(batch.rows, np.bool_)
    for count in range(1, room + 1):
        began = perf_counter()
        if count <= limits.least:
            logits_BV[:, limits.eos] = -np.inf
        ids_B = np.where(live_B, logits_BV.argmax(axis=1), limits.pad)
        new_BN[:, count - 1] = ids_B
        for row in np.flatnonzero(live_B & (ids_B == limits.eos)):
            live_B[row] = False
            decoder.mute(int(row))
        going_on = count < room and bool(live_B.any())
        if going_on:
            outputs = decoder.step(ids_B)
            meter.add(outputs, live_B[:, None])
            logits_BV = outputs["logits"][:, 0]
            meter.seconds += perf_counter() - began
        if stream is not None:
            stream(ids_B)
        if not going_on:
            new_BN = new_BN[:, :count]
            break
    cut = "length" if room == limits.most else "context"
    return new_BN, tuple(cut if live else "eos" for live in live_B)


def _prefill(decoder: Decoder, batch: Batch) -> npt.NDArray[np.float32]:
    """The prompt without masks; returns the logits after its last token, [B,V]."""
    outputs: Outputs = {}
    for start, stop in chunks(0, batch.slots, batch.rows):
        last = ("logits",) if stop == batch.slots else ()
        outputs = decoder.feed(batch.ids[:, start:stop], sparse_tail=0, outputs=last)
    return np.ascontiguousarray(outputs["logits"][:, -1])


def chunks(start: int, stop: int, rows: int) -> Iterator[tuple[int, int]]:
    """Pieces of `start..stop` of bounded size; many rows make them shorter."""
    size = max(min(CHUNK_TOKENS, 2 * CHUNK_TOKENS // rows), 1)
    return ((at, min(at + size, stop)) for at in range(start, stop, size))


def teacher_forced(
    decoder: Decoder,
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
                meter.add(result, np.repeat(masked_B[:, None], tail, axis=1))
            else:
                meter.prefill_seconds += perf_counter() - began
            yield start, tail, result


def limits_of(model: ModelPart, most: int, least: int) -> Limits:
    """The limits that a model and a call give."""
    return Limits(most=most, least=least, eos=model.eos, pad=model.pad, positions=model.positions)
