# SPDX-License-Identifier: Apache-2.0
"""Brings models, corpora and settings together: computes what is missing, and makes rows of what is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shadowc.eval.likelihood import not_finite, refuse_not_finite
from shadowc.eval.means import Mean, means
from shadowc.eval.metric import Interval, difference, interval
from shadowc.eval.model import dense_setting
from shadowc.eval.request import Setting
from shadowc.eval.store import Store
from shadowc.spec.density import UNIT_KINDS
from shadowc.spec.progress import NullProgress, Progress

if TYPE_CHECKING:
    from shadowc.eval.corpus import Corpus, Described, Item
    from shadowc.eval.metric import Metric
    from shadowc.eval.model import EvaluatedModel
    from shadowc.eval.request import Outcome, Protocol
    from shadowc.spec.density import Density

TOKENS_AT_ONCE = 8192
"""Fed in one piece of work: what a kill loses at most."""


@dataclass(frozen=True, slots=True)
class Row:
    """One setting on one corpus."""

    corpus: Described
    setting: Setting
    metrics: tuple[Metric, ...]
    intervals: tuple[Interval, ...]
    """Of each metric over documents."""
    above_dense: tuple[Interval, ...]
    """Of each metric, over the dense model's (paired)."""
    active_heads: float
    """Mean share over the masked tokens, in the predicted layers; 1 where nothing is masked."""
    active_neurons: float
    masked_share: float
    """Share of the scored tokens that were predicted under a mask."""
    sparsity: float
    """Effective: share of a dense token's layer bytes that a masked token does not read; a predictor is read."""
    bytes_read: float
    """Of the layers and the predictor, per masked token."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two methods on the same corpus at the same density, scope and protocol."""

    corpus: Described
    one: Setting
    other: Setting
    metric: str
    difference: Interval
    """How far `one` lies above `other`, paired."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All rows."""

    model: EvaluatedModel
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    seed: int
    means: tuple[Mean, ...] = ()
    """Over tasks, where there are several."""


def evaluate(
    model: EvaluatedModel,
    corpora: Sequence[Corpus],
    settings: Sequence[Setting],
    *,
    store: Store | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a model on corpora, dense and under the settings; what the store knows is not computed again.

    Args:
        model: what answers.
        corpora: on what.
        settings: under which masks; equal ones count once, and the dense model comes first in any case.
        store: of earlier outcomes.
        seed: of the bootstrap.
        progress: told about items.

    Raises:
        InputError, UnsupportedError: a setting is not one of the model's, before anything is computed; or logits are
            not finite.
    """
    progress, store = progress or NullProgress(), store or Store()
    model.check(*settings)
    wanted = list(dict.fromkeys((dense_setting(model), *settings)))
    unique = {setting.key: dense_setting(model) if setting.unmasked else setting for setting in wanted}
    work = sum(len(corpus.items) for corpus in corpora) * len(unique)
    done = 0
    with progress.stage("eval"):
        for corpus in corpora:
            for indices in _pieces(corpus.items):
                for setting in unique.values():
                    _compute(model, corpus, setting, indices, store)
                    done += len(indices)
                    progress.advance(done, work, "items under masks")
    rows = [row for corpus in corpora for row in _rows(model, corpus, wanted, store, seed)]
    return gathered(model, rows, seed)


def gathered(model: EvaluatedModel, rows: Sequence[Row], seed: int) -> Evaluation:
    """Return rows of a model with what follows from them: comparisons, and means over tasks.

    Rows of one corpus hold the same object, and the first of them is the dense model's.
    """
    return Evaluation(model, tuple(rows), tuple(_comparisons(rows, seed)), seed, tuple(means(rows, seed)))


def _compute(model: EvaluatedModel, corpus: Corpus, setting: Setting, indices: Sequence[int], store: Store) -> None:
    """Ask what is not known of some items.

    Raises:
        InputError: logits are not finite; nothing of these items is kept.
    """
    key = corpus.key, setting.key
    known = store.of(key)
    # Stores of before this was refused may hold answers that are no numbers: those are asked for again.
    missing = [index for index in indices if index not in known or not_finite(known[index])]
    if not missing:
        return
    owner = [index for index in missing for _ in corpus.items[index].requests]
    answers = model.score([one for index in missing for one in corpus.items[index].requests], setting)
    refuse_not_finite(model.name, setting, answers, lambda number: corpus.place(owner[number]))
    found: dict[int, list[Outcome]] = {index: [] for index in missing}
    for index, answer in zip(owner, answers, strict=True):
        found[index].append(answer)
    store.put(key, found)


def _pieces(items: Sequence[Item]) -> Iterator[list[int]]:
    """Cut items into pieces of work; settings take turns on a piece, so that they share what is read of it."""
    piece: list[int] = []
    tokens = 0
    for index, item in enumerate(items):
        if piece and tokens + item.tokens > TOKENS_AT_ONCE:
            yield piece
            piece, tokens = [], 0
        piece.append(index)
        tokens += item.tokens
    if piece:
        yield piece


def _rows(model: EvaluatedModel, corpus: Corpus, settings: Sequence[Setting], store: Store, seed: int) -> Iterator[Row]:
    base: tuple[Metric, ...] | None = None
    for setting in settings:
        known = store.of((corpus.key, setting.key))
        outcomes = [known[index] for index in range(len(corpus.items))]
        metrics = corpus.metrics(outcomes)
        base = metrics if base is None else base
        every = [outcome for one in outcomes for outcome in one]
        heads, neurons = _active(every)
        # Answers of one token are predicted by the prompt: nothing is masked, so no predictor is read either.
        dense = setting.dense or not any(outcome.masked for outcome in every)
        yield Row(
            corpus=corpus,
            setting=setting,
            metrics=metrics,
            intervals=tuple(interval(metric, seed) for metric in metrics),
            above_dense=tuple(difference(one, other, seed) for one, other in zip(metrics, base, strict=True)),
            active_heads=heads,
            active_neurons=neurons,
            masked_share=corpus.masked_share(setting),
            sparsity=0.0 if dense else model.ledger.sparsity(setting, heads, neurons),
            bytes_read=model.ledger.dense if dense else model.ledger.read(setting, heads, neurons),
        )


def _active(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Return the mean shares of active heads and neurons over all masked tokens."""
    masked = sum(outcome.masked for outcome in outcomes)
    if not masked:
        return 1.0, 1.0
    heads, neurons = (sum(getattr(outcome, kind) for outcome in outcomes) for kind in UNIT_KINDS)
    return heads / masked, neurons / masked


def _comparisons(rows: Sequence[Row], seed: int) -> Iterator[Comparison]:
    """Compare the main figures of methods that differ in nothing else; each with those behind it in the order given."""
    for at, one in enumerate(rows):
        for other in rows[at + 1 :]:
            same = one.corpus is other.corpus and not one.setting.dense and _others(one) == _others(other)
            if same and one.setting.method != other.setting.method:
                found = difference(one.metrics[0], other.metrics[0], seed)
                yield Comparison(one.corpus, one.setting, other.setting, one.metrics[0].name, found)


def _others(row: Row) -> tuple[object, ...]:
    setting = row.setting
    return setting.density, setting.protocol, setting.scope, setting.prompt_tokens


def settings_of(
    methods: Sequence[str],
    densities: Sequence[Density],
    protocols: Sequence[Protocol],
    scopes: Sequence[str] = ("",),
    prompt_tokens: int | None = None,
) -> list[Setting]:
    """Every combination; the density runs slowest, the method fastest."""
    return [
        Setting(method, density, protocol, scope, prompt_tokens)
        for density in densities
        for protocol in protocols
        for scope in scopes
        for method in methods
    ]
