# SPDX-License-Identifier: Apache-2.0
"""The loops over a decoder: greedy generation, token by token or several in a run, and teacher forcing in chunks.

Letters: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Protocol

import numpy as np

from shadowc.runtime.decoder import AT_ONCE, NO_ID, Decoder, Floats, Outputs, chunks
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
    at_once: int = AT_ONCE,
) -> tuple[Ids, tuple[str, ...]]:
    """Dense pass over the prompt, then one masked token at a time; of one row up to `at_once` in one run.

    Returns:
        The new ids [B,n], pad tokens after a row's end, and why each row ended.
    """
    started = perf_counter()
    logits_BV = decoder.prefill(batch.ids)
    meter.prefill_seconds = perf_counter() - started
    decoder.set_density(density.heads, density.neurons)
    room = min(limits.most, limits.positions - batch.slots)
    cut = "length" if room == limits.most else "context"
    if isinstance(decoder, Decoder) and watch is None and min(decoder.at_once, at_once) > 1:
        ids = _in_runs(decoder, logits_BV, replace(limits, most=room), min(decoder.at_once, at_once), meter, stream)
        return np.array([ids], np.int64), ("eos" if ids[-1] == limits.eos else cut,)
    new_BN = np.full((batch.rows, room), limits.pad, np.int64)
    live_B, living, all_live = np.ones(batch.rows, np.bool_), True, True
    for count in range(1, room + 1):
        began = perf_counter()
        ids_B = _choose(logits_BV, limits, count)
        if not all_live:
            ids_B[~live_B] = limits.pad
        new_BN[:, count - 1] = ids_B
        if limits.eos in ids_B.tolist():
            for row in np.flatnonzero(live_B & (ids_B == limits.eos)):
                live_B[row] = False
                decoder.mute(int(row))
            living, all_live = bool(live_B.any()), bool(live_B.all())
        if stream is not None:
            spent = perf_counter() - began
            stream(ids_B.copy())  # the next step reads them
            began = perf_counter() - spent
        if count == room or not living:
            new_BN = new_BN[:, :count]
            break
        outputs = decoder.step(ids_B)
        meter.add(outputs, live_B[:, None], predictions=int(decoder.predicts))
        logits_BV = outputs["logits"][:, 0]
        meter.seconds += perf_counter() - began
        if watch is not None:
            watch(decoder.masks())
    return new_BN, tuple(cut if live else "eos" for live in live_B)


def _choose(logits_BV: Floats, limits: Limits, count: int) -> Ids:
    """The ids [B] of token number `count`; the end token is none of them before it may be."""
    if count <= limits.least:
        logits_BV[:, limits.eos] = -np.inf
    # Few calls of numpy: between two tokens its code and data have left the caches, and each takes 10 us.
    ids_B: Ids = logits_BV.argmax(axis=1)
    return ids_B


def _in_runs(
    decoder: Decoder, logits_1V: Floats, limits: Limits, at_once: int, meter: Meter,
    stream: Callable[[Ids], object] | None,
) -> list[int]:  # fmt: skip
    """The new tokens of the only row, several of them in one run of the graph but the first two."""
    ids: list[int] = []
    new, most = _choose(logits_1V, limits, 1).tolist(), 1
    while True:
        ids += new
        if stream is not None:
            for token in new:
                stream(np.array([token], np.int64))
        if len(ids) == limits.most or ids[-1] == limits.eos:
            return ids
        began, most = perf_counter(), min(most, limits.most - len(ids))
        banned = NO_ID
        if len(ids) < limits.least:
            banned, most = limits.eos, min(most, limits.least - len(ids))
        run = decoder.run_on(ids[-1], most, end=limits.eos, banned=banned)
        meter.add(run.outputs, np.ones((len(run.ids), 1), np.bool_), calls=len(run.ids), predictions=run.predictions)
        meter.seconds += perf_counter() - began
        # What masks made anew cut short the next run makes good, so that whoever counts tokens finds whole runs.
        new, most = run.ids, at_once - (len(ids) + len(run.ids) - 2) % at_once


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
                meter.add(result, np.repeat(masked_B[:, None], tail, axis=1), predictions=int(decoder.predicts))
            else:
                meter.prefill_seconds += perf_counter() - began
            yield start, tail, result


def limits_of(model: ModelPart, most: int, least: int) -> Limits:
    """The limits that a model and a call give."""
    return Limits(most=most, least=least, eos=model.eos, pad=model.pad, positions=model.positions)
