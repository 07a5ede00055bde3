# SPDX-License-Identifier: Apache-2.0
"""A 5-gram model with interpolated modified Kneser-Ney smoothing over opt-mini's tokens: the bar to clear.

In: a stream of token ids. Out: the probability of each token of a text given the four before it. An n-gram is
stored as one integer, (rank of its first n-1 tokens) * vocabulary + last token, in a sorted array per order;
its rank is its place there. Ten million tokens fit into about 2 GB, without a dictionary.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Level:
    """All n-grams of one order; arrays named `context_*` have one entry per (n-1)-gram."""

    codes: Ints  # sorted; position is rank
    counts: Ints  # occurrences at the highest order, distinct tokens to the left below it
    discounts: Floats  # by min(count, 3)
    context_total: Floats  # sum of the counts that follow a context
    context_discount: Floats  # sum of the discounts taken from them


class KneserNey:
    """An n-gram model of token streams."""

    def __init__(self, stream: NDArray[np.integer], vocab: int, order: int = 5) -> None:
        """Count `stream`; ids are below `vocab`."""
        self.vocab, self.order = vocab, order
        self.levels: list[Level] = []
        tokens = stream.astype(np.int64)
        ranks = tokens  # rank of the n-gram that starts at each position; order 1: the id itself
        occurrences = np.bincount(tokens, minlength=vocab)
        codes: Ints = np.arange(vocab)
        contexts = 1  # order 1 has one context, the empty one
        for n in range(1, order + 1):
            if n == order:
                self.levels.append(_level(codes, occurrences, contexts, vocab))
                break
            longer = ranks[:-1] * vocab + tokens[n:]
            next_codes, first, next_ranks, next_occurrences = np.unique(
                longer, return_index=True, return_inverse=True, return_counts=True
            )
            # The suffix of a longer n-gram at i is the n-gram at i + 1; each distinct one brings a left token.
            left_tokens = np.bincount(ranks[first + 1], minlength=len(codes))
            self.levels.append(_level(codes, left_tokens, contexts, vocab))
            contexts = len(codes)
            codes, ranks, occurrences = next_codes, next_ranks, next_occurrences

    def probabilities(self, ids: NDArray[np.integer]) -> Floats:
        """Return the probability of `ids[1:]`, each given at most order - 1 ids before it."""
        tokens = ids.astype(np.int64)
        probability = np.full(len(tokens), 1.0 / self.vocab)
        ranks: Ints = np.zeros(len(tokens) + 1, dtype=np.int64)  # rank of the empty context
        for n, level in enumerate(self.levels, start=1):
            context = ranks[: len(tokens) - n + 1]  # the (n-1)-gram in front of tokens[n-1:]
            known = context >= 0
            safe = np.where(known, context, 0)
            place = np.searchsorted(level.codes, wanted := safe * self.vocab + tokens[n - 1 :])
            found = known & (level.codes[np.minimum(place, len(level.codes) - 1)] == wanted)
            count = np.where(found, level.counts[np.where(found, place, 0)], 0)
            total = np.where(known, level.context_total[safe], 0.0)
            rest = level.context_discount[safe]
            backoff = probability[n - 1 :]
            with np.errstate(invalid="ignore", divide="ignore"):
                mixed = (count - level.discounts[np.minimum(count, 3)] + rest * backoff) / total
            probability[n - 1 :] = np.where(total > 0, mixed, backoff)
            ranks = np.where(found, place, -1)
        return probability[1:]


def _level(codes: Ints, counts: Ints, contexts: int, vocab: int) -> Level:
    parents = codes // vocab
    discounts = _discounts(counts)
    taken = discounts[np.minimum(counts, 3)]
    return Level(
        codes,
        counts,
        discounts,
        np.bincount(parents, weights=counts, minlength=contexts).astype(np.float64),
        np.bincount(parents, weights=taken, minlength=contexts).astype(np.float64),
    )


def _discounts(counts: Ints) -> Floats:
    """Return the discounts of counts 0, 1, 2 and 3 or more (Chen and Goodman 1998), none above its count."""
    n1, n2, n3, n4 = (int(np.sum(counts == k)) for k in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:  # a text too small to estimate from
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    raw = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    return np.array([0.0, *(min(max(d, 0.0), float(k)) for k, d in enumerate(raw, start=1))])


def main() -> None:
    """Train on a run's tokens and write bits per byte of the held-out text."""
    import run_state  # here, because it loads torch

    parser = argparse.ArgumentParser(description="Evaluate 5-gram Kneser-Ney on opt-mini's texts.")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="the files that train.py was given")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run (its tokenizer is used)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--order", type=int, default=5)
    a = parser.parse_args()
    corpus = run_state.prepare_corpus(a.text, a.run, vocab=0, seed=0)
    model = KneserNey(corpus.train, corpus.tokenizer.get_vocab_size(), a.order)
    bits: dict[str, float] = {}
    size: dict[str, int] = {}
    for source, documents in corpus.held_out.items():
        bits[source] = -sum(float(np.log2(model.probabilities(ids)).sum()) for ids in documents)
        size[source] = int(sum(corpus.token_bytes[ids].sum() for ids in documents))
    result: dict[str, object] = {source: round(bits[source] / size[source], 4) for source in bits}
    result["all"] = round(sum(bits.values()) / sum(size.values()), 4)
    grams = [len(level.codes) for level in model.levels]
    whole = {"order": a.order, "bits_per_byte": result, "bytes": size, "n_grams": grams}
    a.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    sys.stderr.write(json.dumps(whole) + "\n")
    assert all(math.isfinite(value) for value in bits.values())


if __name__ == "__main__":
    main()
