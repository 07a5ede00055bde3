# SPDX-License-Identifier: Apache-2.0
"""Runs the dense model over calibration text and records what mattered, position by position.

In: a checkpoint and `CollectOptions`. Out: an `ImportanceTrace`: for each sampled position t the layer-0 attention
context of t itself before out_proj and what the attention of every later layer reads at t (the inputs of a predictor of
either style: they depend on tokens 0..t only), and the criterion's score of every head and neuron of every layer at t
(the predictor's target: may depend on the losses after t).

Letters: B sequences, T tokens, M recorded positions, N sequences in all, L model layers, E hidden, H heads,
D head size, F neurons, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowc.sparsity.calibration import SELF, calibration_text, read_text, sequence_count, sequence_length
from shadowc.sparsity.criteria import find_criterion
from shadowc.sparsity.importance import SCHEMA, ImportanceTrace, Origin, TraceWriter, relative, trace_layout
from shadowc.sparsity.means import head_means, named
from shadowc.sparsity.record import Rows, record_batch, texts_at_once
from shadowc.sparsity.text import Ranking, rank_text
from shadowc.spec.errors import InputError
from shadowc.spec.progress import NullProgress

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.checkpoint.facts import ModelFacts
    from shadowc.checkpoint.resolve import ModelCheckpoint
    from shadowc.sparsity.criteria import Criterion
    from shadowc.spec.options import CollectOptions
    from shadowc.spec.progress import Progress

__all__ = ["ImportanceTrace", "collect", "record_batch", "sampled_positions", "trace_key"]


_COUNTED = "counts"
"""Part of a trace's key: an unfinished trace from before sequences were counted is begun anew."""


def collect(
    checkpoint: ModelCheckpoint,
    options: CollectOptions,
    out: Path,
    progress: Progress | None = None,
    *,
    model: Any = None,  # transformers' model, which has no types
    origin: Origin | None = None,
) -> ImportanceTrace:
    """Record the importance trace of a checkpoint into the folder `out`; an interrupted run is continued.

    Args:
        checkpoint: the model.
        options: what is recorded.
        out: folder of the trace; appears when it is complete, replaces an older trace.
        progress: told about every batch.
        model: the checkpoint as a torch model, if the caller has it already.
        origin: the model as the user typed it, kept beside the trace.

    A sequence with a score that is not finite is dropped: its positions are not in the trace, `meta["dropped"]` tells
    where it was. A criterion that ranks the units once for a whole text gives a trace with a single row.

    Raises:
        InputError: unknown criterion, unusable text, no sequence with finite numbers, a checkpoint that
            changed meanwhile, or `out` is something else.
        SetupError: the disk has no room for the trace.
    """
    progress = progress or NullProgress()
    criterion = find_criterion(options.criterion)
    writer = TraceWriter(out, trace_key(checkpoint, options))
    if model is None:
        from shadowc.sparsity.reference import load_torch_model

        model = load_torch_model(checkpoint)
    if not writer.started:
        with progress.stage("calibration text"):
            _begin(writer, model, checkpoint, options, criterion, progress)
    ids_NT = writer.read("tokens").astype(np.int64)
    positions = sampled_positions(len(ids_NT), ids_NT.shape[1], options.positions, options.seed)
    length = ids_NT.shape[1]
    batch = texts_at_once(checkpoint.facts, length, gradients=criterion.gradients, curvature=criterion.curvature)
    if criterion.per == "text":
        ranking = rank_text(model, criterion, ids_NT, positions, batch, options.seed, progress.advance)
        checkpoint.require_unchanged()
        return _put_ranking(writer, ranking).finish(origin)
    done = np.cumsum([0, *(len(of_sequence) for of_sequence in positions)])
    first = int(np.searchsorted(done, writer.rows))
    means = writer.means()
    for begin in range(first, len(ids_NT), batch):
        end = min(begin + batch, len(ids_NT))
        rows = record_batch(model, checkpoint.facts, criterion, ids_NT[begin:end], positions[begin:end], means)
        _put(writer, rows, int(done[begin]), begin)
        writer.commit(int(done[end]), _counted(writer.meta, rows, begin))
        for row, place in rows.dropped.items():
            progress.note(f"sequence {begin + row} is dropped: {place}")
        progress.advance(int(done[end]), options.positions, "positions")
    checkpoint.require_unchanged()
    return _finished(writer, checkpoint.facts, len(ids_NT)).finish(origin)


def sampled_positions(count: int, length: int, positions: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Return for each sequence the positions recorded, ascending; together `positions` (or all, if there are fewer).

    The first position (bos, always the same) and the last (its successor is unknown) are never among them.
    """
    generator = np.random.default_rng([seed, 1])
    usable = np.arange(1, length - 1)
    wanted = min(positions, count * len(usable))
    shares = [wanted * (n + 1) // count - wanted * n // count for n in range(count)]
    return [np.sort(generator.permutation(usable)[:share]) for share in shares]


def _begin(
    writer: TraceWriter,
    model: Any,
    checkpoint: ModelCheckpoint,
    options: CollectOptions,
    criterion: Criterion,
    progress: Progress,
) -> None:
    """Make the calibration text and lay out the trace."""
    facts = checkpoint.facts
    text = calibration_text(model, checkpoint, options, progress)
    count, length = text.ids_NT.shape
    rows = sum(len(p) for p in sampled_positions(count, length, options.positions, options.seed))
    meta = {
        "criterion": options.criterion,
        "per": criterion.per,
        "model": checkpoint.described,
        "facts": asdict(facts),
        "fill": "mean" if _filled(options) else "zero",
        "source": text.source,
        "text": text.text.to_meta(),
        "seed": options.seed,
        "positions": rows,
        "sequences": count,
        "length": length,
        "loss": 0.0,
        "dropped": [],
        "counts": {"positions": 0, "tokens": 0, "heads": 0, "neurons": 0},
    }
    ranking, filled = criterion.per == "text", _filled(options)
    writer.begin(trace_layout(facts, 1 if ranking else rows, count, length, exact=ranking, filled=filled), meta)
    writer.put("tokens", text.ids_NT)
    if filled:
        positions = sampled_positions(count, length, options.positions, options.seed)
        for name, mean_HD in named(head_means(model, text.ids_NT, positions, progress.advance)).items():
            writer.put(name, mean_HD)
    writer.commit(0, meta)


def _filled(options: CollectOptions) -> bool:
    """Whether a trace has means of heads; a ranking of a whole text is measured from zero."""
    return options.fill == "mean" and find_criterion(options.criterion).per != "text"


def _counted(meta: dict[str, Any], rows: Rows, sequence: int) -> dict[str, Any]:
    """Return the meta with one batch added: what was dropped, counts, and the mean loss so far."""
    kept = int((rows.sequence_M >= 0).sum())
    new = {"positions": kept, "tokens": rows.tokens, "heads": rows.zeros[0], "neurons": rows.zeros[1]}
    counts = {name: meta["counts"][name] + more for name, more in new.items()}
    loss = (meta["loss"] * meta["counts"]["tokens"] + rows.loss) / max(counts["tokens"], 1)
    dropped = [{"sequence": sequence + row, "place": place} for row, place in rows.dropped.items()]
    return meta | {"counts": counts, "loss": loss, "dropped": meta["dropped"] + dropped}


def _finished(writer: TraceWriter, facts: ModelFacts, sequences: int) -> TraceWriter:
    """Turn counts into what a reader wants to know.

    Raises:
        InputError: nothing is left.
    """
    meta = dict(writer.meta)
    counts = meta.pop("counts")
    if not counts["positions"]:
        writer.discard()  # the next run would only be refused at the same place
        first = meta["dropped"][0]
        raise InputError(
            f"{facts.name}: no calibration sequence of {sequences} has finite scores; "
            f"in sequence {first['sequence']} the {first['place'].removeprefix('the ')}; the weights may be damaged",
            hint="check the checkpoint for NaN and Inf",
        )
    scores = counts["positions"] * facts.layers
    meta["positions"] = counts["positions"]
    meta["zeros"] = {
        "heads": round(counts["heads"] / (scores * facts.heads), 6),
        "neurons": round(counts["neurons"] / (scores * facts.ffn), 6),
    }
    writer.meta = meta
    return writer


def _put_ranking(writer: TraceWriter, ranking: Ranking) -> TraceWriter:
    """Write a trace of one row: the ranking of a whole text; zeros for a kind that has no formula."""
    meta = dict(writer.meta)
    del meta["counts"]
    heads_LH, neurons_LF = ranking
    meta |= {"positions": 1, "loss": None, "kinds": [], "zeros": {}}
    for kind, values in (("heads", heads_LH), ("neurons", neurons_LF)):
        if values is not None:
            meta["kinds"] = [*meta["kinds"], kind]
            meta["zeros"][kind] = round(float((values == 0).mean()), 6)
    if heads_LH is not None:
        writer.put("heads", heads_LH[None])
    if neurons_LF is not None:
        for layer, neurons_F in enumerate(neurons_LF):
            writer.put(f"neurons.{layer}", neurons_F[None])
    writer.put("neurons.scale", np.ones_like(writer.read("neurons.scale")))
    writer.commit(1, meta)
    return writer


def _put(writer: TraceWriter, rows: Rows, row: int, sequence: int) -> None:
    writer.put("sequence", np.where(rows.sequence_M < 0, -1, rows.sequence_M + sequence), row)
    writer.put("position", rows.position_M, row)
    writer.put("context", rows.context_ME, row)
    writer.put("heads", rows.heads_MLH, row)
    scales = []
    for layer, neurons_MF in enumerate(rows.neurons_LMF):
        relative_MF, scale_M = relative(neurons_MF)
        writer.put(f"neurons.{layer}", relative_MF, row)
        scales.append(scale_M)
    writer.put("neurons.scale", np.stack(scales, axis=1), row)
    for name, inputs_LME in (("input", rows.inputs_LME), ("ffn_input", rows.ffn_inputs_LME)):
        for layer, input_ME in enumerate(inputs_LME, start=1):
            writer.put(f"{name}.{layer}", input_ME, row)


def trace_key(checkpoint: ModelCheckpoint, options: CollectOptions) -> str:
    """Return a hash of everything that decides the trace."""
    text = SELF if options.data == SELF else read_text(Path(options.data))[1].sha256
    counts = [sequence_count(options, checkpoint.facts), sequence_length(options, checkpoint.facts)]
    decided = [SCHEMA, _COUNTED, checkpoint.identity, options.model_dump(exclude={"data", "fill"}), text, counts]
    if _filled(options):  # the others are what they were before there were means
        decided.append("means")
    if Path(options.data).suffix == ".txt":  # the others are what they were before this was told apart
        decided.append("one document")
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()
