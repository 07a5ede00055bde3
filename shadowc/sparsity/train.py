# SPDX-License-Identifier: Apache-2.0

"""Trains the predictor on an importance trace: the published recipes, with neuron blocks and a fair report.

In: a trace, the model's facts, `TrainOptions`. Out: a `Predictor`.

Style shadow (ShadowLLM, arXiv 2406.16635, variant b1eL): inputs are the token's own layer-0 context, min-max scaled;
two networks learn all predicted layers. Style dejavu (DejaVu, arXiv 2310.17157): two networks for every layer, whose
inputs are what the attention of that layer reads. Style shadow+: two linear networks for every layer; what its FFN
reads scores its neurons (linear.py), and a table of shares (shares.py). All take the same examples, epochs and batches.

Labels "scores": the importances of the predicted layers, min-max scaled per layer and token, with mean squared error
(ShadowLLM's). Labels "top": whether a unit is among the first of its layer, with cross entropy (DejaVu's). Either style
can learn either, by any criterion, so that what style, labels and criterion are worth can be told apart.

Ours, and no change of the networks' form (fit.py): the epoch that is best on held-out sequences is kept, the mean score
included, so where the inputs say nothing, the predictor stays the static ranking instead of learning noise. The report
is made on the same held-out sequences that chose the epoch: one choice among a few dozen, a small favour. Whole
sequences are held out, since neighbouring tokens resemble each other.

Letters: M positions, E hidden, P width, Lp predicted layers, H heads, N neuron blocks, U = units of a kind per
layer (H or N).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowc.checkpoint.digest import differing_part
from shadowc.sparsity import thresholds
from shadowc.sparsity.cluster import neuron_orders
from shadowc.sparsity.criteria import find_criterion, require_trainable
from shadowc.sparsity.fit import Examples, Fit, fit
from shadowc.sparsity.linear import fit_linear
from shadowc.sparsity.networks import LayerNetworks, blocks_of, cost_share, default_width, minmax_scaled, widths
from shadowc.sparsity.predictor import Networks, Predictor, check_out
from shadowc.sparsity.rank import (
    normalised_static_scores,
    predicted_scores,
    random_scores,
    ranking_of,
    static_scores,
)
from shadowc.sparsity.recall import found_report
from shadowc.sparsity.shares import shares_of
from shadowc.sparsity.targets import chosen_labels, objective_of, targets_of
from shadowc.spec.density import UNIT_KINDS
from shadowc.spec.errors import InputError
from shadowc.spec.progress import NullProgress

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.checkpoint.facts import ModelFacts
    from shadowc.sparsity.importance import ImportanceTrace
    from shadowc.spec.options import TrainOptions
    from shadowc.spec.progress import Progress

    Floats = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.intp]

SHARED_SCORES = 1 << 25
"""Scores of one kind that decide the shares of the layers, at most about."""


def train(
    trace: ImportanceTrace,
    facts: ModelFacts,
    options: TrainOptions,
    out: Path | None = None,
    progress: Progress | None = None,
    *,
    rankings: Sequence[ImportanceTrace] = (),
    calibrated: bool = True,
) -> Predictor:
    """Train a predictor and write it to the folder `out`.

    Args:
        trace: what it learns from.
        facts: of the model.
        options: how it is trained.
        out: the predictor's folder; None: it is not written.
        progress: told about stages.
        rankings: traces of the same model by other criteria; their static rankings become controls beside the trace's
            own, named static-CRITERION.
        calibrated: whether thresholds are made too, see thresholds.py; that takes as long as a few epochs.

    Raises:
        InputError: the trace is of another model, of a criterion that no predictor can learn, too small to hold
            sequences out, or its scores do not vary; a ranking is of another model, or two are of one criterion; or
            `out` holds something else than a predictor.
    """
    progress = progress or NullProgress()
    if out is not None:
        check_out(out)
    require_trainable(trace.meta["criterion"], trace.meta.get("per", "token"))
    options = chosen_labels(options, trace.meta["criterion"])
    _require_fit(trace, facts, options)
    _require_one_each(rankings)
    _require_same_model(trace, rankings)
    held_M: npt.NDArray[np.bool_] = held_out(trace.sequence_M, options.validation, options.seed)
    taught, held = np.flatnonzero(~held_M), np.flatnonzero(held_M)
    block = options.neuron_block
    width = options.width or default_width(facts, block, options.style)
    with progress.stage("neuron order"):
        orders_LF = neuron_orders(trace, block, rows=taught)
    raw = dict(zip(UNIT_KINDS, predicted_scores(trace, orders_LF, block), strict=True))
    fits: dict[str, list[Fit]] = {}
    dropped: dict[str, int] = {}
    for kind in UNIT_KINDS:
        targets_MLU = targets_of(raw[kind], options)
        valid_M = _valid(kind, targets_MLU, taught, held)
        dropped[kind] = int((~valid_M).sum())
        rows = taught[valid_M[taught]], held[valid_M[held]]
        with progress.stage(f"train {kind}"):
            fits[kind] = _fits(trace, kind, targets_MLU, rows, width, options, progress)
        del targets_MLU  # as large as the scores
    heads, neurons = (_networks(fits[kind], options) for kind in UNIT_KINDS)
    predictor = Predictor(
        heads=heads,
        neurons=neurons,
        layers=facts.layers - 1,
        block=block,
        orders_LF=orders_LF,
        meta=_meta(trace, facts, options, width),
        controls=_controls(raw, taught, rankings, orders_LF, block),
        means_LHD=_means(trace),
    )
    if options.style == "shadow+":
        predictor = replace(predictor, shares=_shares(predictor, trace, taught, options))
    if calibrated:
        predictor = replace(predictor, thresholds=_thresholds(predictor, trace, raw, taught, options))
    held_scores = dict(zip(UNIT_KINDS, predictor.scores(_inputs(trace, held, options)), strict=True))
    predictor.meta["report"] = {
        "positions": {"taught": len(taught), "held_out": len(held), "dropped": dropped},
        **_errors(fits, options),
        "found": _report(predictor, held_scores, {k: raw[k][held] for k in raw}, options.seed),
        "met": thresholds.met_report(predictor.thresholds, held_scores),
    }
    if out is not None:
        predictor.save(out)
    return predictor


def _valid(kind: str, targets_MLU: Floats, taught: Rows, held: Rows) -> npt.NDArray[np.bool_]:
    """The positions whose targets are finite, of which some are taught and some held out."""
    valid_M: npt.NDArray[np.bool_] = np.asarray(np.isfinite(targets_MLU).all(axis=(1, 2)))
    if not valid_M[taught].any() or not valid_M[held].any():
        raise InputError(
            f"no position has varying {kind} scores in every layer, so there is nothing to learn",
            hint="collect more --positions, or use another --criterion",
        )
    return valid_M


def _controls(
    raw: Mapping[str, Floats],
    taught: Rows,
    rankings: Sequence[ImportanceTrace],
    orders_LF: npt.NDArray[np.int32],
    block: int,
) -> dict[str, tuple[Floats, Floats]]:
    """Rankings that know no context, by name: of the trace's own means, and by other criteria."""
    controls = {
        name: (ranking(raw["heads"][taught]), ranking(raw["neurons"][taught]))
        for name, ranking in (("static", static_scores), ("normalised", normalised_static_scores))
    }
    for other in rankings:
        controls[f"static-{other.meta['criterion']}"] = ranking_of(other, orders_LF, block, controls["static"])
    return controls


def _fits(
    trace: ImportanceTrace,
    kind: str,
    targets_MLU: Floats,
    rows: tuple[Rows, Rows],
    width: int,
    options: TrainOptions,
    progress: Progress,
) -> list[Fit]:
    """Fit the networks of one kind: one, or one for every layer; `rows` are those taught and those held out."""
    used, held = rows
    number = UNIT_KINDS.index(kind)
    seed = options.seed + number
    if options.style == "shadow":
        inputs_ME = minmax_scaled(trace.context_ME)
        flat_MO = targets_MLU.reshape(len(targets_MLU), -1)
        examples = Examples(inputs_ME[used], flat_MO[used], inputs_ME[held], flat_MO[held])
        return [fit(examples, width, options, seed, progress)]
    found = []
    wide = widths(trace.facts, options.neuron_block, width, options.style)[number]
    objective = objective_of(targets_MLU, used, options)
    for layer in range(1, trace.layers):
        inputs_ME, of_layer_MU = _read(trace, kind, layer, options), targets_MLU[:, layer - 1]
        examples = Examples(inputs_ME[used], of_layer_MU[used], inputs_ME[held], of_layer_MU[held])
        with progress.stage(f"layer {layer}"):
            own = seed + len(UNIT_KINDS) * layer
            if objective is None:
                found.append(fit(examples, wide, options, own, progress))
            else:
                found.append(fit_linear(examples, objective, wide, options, own, progress))
    return found


def _read(trace: ImportanceTrace, kind: str, layer: int, options: TrainOptions) -> Floats:
    """Return what the network of a layer reads, [M, E]."""
    behind = options.style == "shadow+" and kind == "neurons"
    return trace.ffn_input_ME(layer) if behind else trace.input_ME(layer)


def _shares(predictor: Predictor, trace: ImportanceTrace, taught: Rows, options: TrainOptions) -> tuple[Floats, Floats]:
    """Return the tables of both kinds, from the scores of as many taught positions as SHARED_SCORES allows."""
    heads, neurons = predictor.scores(_inputs(trace, _some(predictor, taught), options))
    return shares_of(heads), shares_of(neurons)


def _thresholds(
    predictor: Predictor, trace: ImportanceTrace, raw: dict[str, Floats], taught: Rows, options: TrainOptions
) -> dict[str, thresholds.Tables]:
    """Return the tables of all budgets, from the same positions."""
    rows = _some(predictor, taught)
    scores = zip(UNIT_KINDS, predictor.scores(_inputs(trace, rows, options)), strict=True)
    heads, neurons = (thresholds.calibrate(found, raw[kind][rows]) for kind, found in scores)
    return {budget: (heads[budget], neurons[budget]) for budget in thresholds.BUDGETS}


def _some(predictor: Predictor, taught: Rows) -> Rows:
    """Return as many taught positions as SHARED_SCORES allows, spread over all of them."""
    most = max(SHARED_SCORES // (predictor.layers * max(predictor.units)), 64)
    return taught[:: -(-len(taught) // most)]


def _networks(fits: Sequence[Fit], options: TrainOptions) -> Networks:
    if options.style == "shadow":
        return fits[0].network
    return LayerNetworks(tuple(one.network for one in fits))


def _errors(fits: dict[str, list[Fit]], options: TrainOptions) -> dict[str, Any]:
    """Return the epochs kept and the errors on held-out positions; with several networks, a list and their mean.

    The curve is the error after every epoch, the mean score's in front.
    """
    several = options.style != "shadow"
    epochs = {kind: [one.epoch for one in found] for kind, found in fits.items()}
    return {
        "epoch": epochs if several else {kind: found[0] for kind, found in epochs.items()},
        "error": {
            kind: {
                "predictor": float(np.mean([one.error for one in found])),
                "mean": float(np.mean([one.mean_error for one in found])),
            }
            for kind, found in fits.items()
        },
        "curve": {kind: np.mean([one.curve for one in found], axis=0).tolist() for kind, found in fits.items()},
    }


def _inputs(trace: ImportanceTrace, rows: Rows, options: TrainOptions) -> Floats:
    """Return what the predictor reads at these positions, see `Predictor.scores`."""
    if options.style == "shadow":
        return trace.context_ME[rows]
    kinds = UNIT_KINDS if options.style == "shadow+" else UNIT_KINDS[:1]
    layers = range(1, trace.layers)
    read = [np.stack([_read(trace, kind, layer, options)[rows] for layer in layers], axis=1) for kind in kinds]
    return read[0] if len(read) == 1 else np.stack(read, axis=1)


def held_out(sequence_M: npt.NDArray[np.int32], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return which positions are kept for validation: all of at least one sequence, never of all.

    Raises:
        InputError: the trace has fewer than two sequences.
    """
    sequences = np.unique(sequence_M)
    if len(sequences) < 2:
        raise InputError("one sequence cannot be split for validation", hint="collect more --positions")
    count = min(max(round(share * len(sequences)), 1), len(sequences) - 1)
    chosen = np.random.default_rng([seed, 3]).permutation(sequences)[:count]
    return np.isin(sequence_M, chosen)


def _report(predictor: Predictor, scores: dict[str, Floats], raw: dict[str, Floats], seed: int) -> dict[str, Any]:
    """Return recall and captured importance on held-out positions, beside the controls'."""
    layers = predictor.layers
    heads, blocks = predictor.units
    chance = dict(zip(UNIT_KINDS, random_scores(seed, (layers, heads), (layers, blocks)), strict=True))
    report = {}
    for number, kind in enumerate(UNIT_KINDS):
        rivals = {name: pair[number] for name, pair in predictor.controls.items()} | {"random": chance[kind]}
        report[kind] = found_report(raw[kind], {"predictor": scores[kind], **rivals})
    return report


def _require_fit(trace: ImportanceTrace, facts: ModelFacts, options: TrainOptions) -> None:
    problems = [
        f"{size} {getattr(trace.facts, size)}, expected {getattr(facts, size)}"
        for size in ("layers", "hidden", "heads", "ffn")
        if getattr(trace.facts, size) != getattr(facts, size)
    ]
    if problems:
        raise InputError(
            f"the trace in {trace.folder} is not of {facts.name}: {'; '.join(problems)}",
            hint="record one of this model: shadowc collect",
            problems=problems,
        )
    if blocks_of(facts.ffn, options.neuron_block) < 2:
        raise InputError(
            f"a neuron block of {options.neuron_block} leaves one unit in a layer of {facts.ffn} neurons",
            hint="--neuron-block 16",
        )


def _means(trace: ImportanceTrace) -> Floats | None:
    """Return what skipped heads will leave in their place, [Lp, H, D]; None: zero."""
    means = trace.means()
    return np.stack([means[layer] for layer in range(1, trace.layers)]) if means else None


def _require_one_each(rankings: Sequence[ImportanceTrace]) -> None:
    """Refuse two rankings of one name: the second would take the place of the first."""
    folders: dict[str, list[str]] = {}
    for other in rankings:
        folders.setdefault(str(other.meta["criterion"]), []).append(str(other.folder))
    twice = [f"{name} in {' and '.join(some)}" for name, some in folders.items() if len(some) > 1]
    if twice:
        raise InputError(
            f"a criterion has one ranking, static-CRITERION; found {'; '.join(twice)}",
            hint="--ranking once a criterion",
        )


def _require_same_model(trace: ImportanceTrace, rankings: Sequence[ImportanceTrace]) -> None:
    """Refuse rankings of another checkpoint, or measured from something else than skipped heads leave."""
    mine = trace.meta["model"]
    for other in rankings:
        its = other.meta["model"]
        if its["identity"] != mine["identity"]:
            raise InputError(
                f"the ranking in {other.folder} is of another checkpoint: {its['name']} {its['identity'][:12]}, the "
                f"trace in {trace.folder} is of {mine['name']} {mine['identity'][:12]}; {differing_part(its, mine)}",
                hint=f"shadowc collect {trace.origin.flags} --criterion {other.meta['criterion']}",
            )
        fills = [str(one.meta.get("fill", "zero")) for one in (trace, other)]
        if find_criterion(str(other.meta["criterion"])).per != "text" and fills[0] != fills[1]:
            raise InputError(
                f"the ranking in {other.folder} was measured from {fills[1]}, but heads that a predictor of the trace "
                f"in {trace.folder} skips leave {'their mean' if fills[0] == 'mean' else 'zero'}",
                hint=f"shadowc collect {trace.origin.flags} --criterion {other.meta['criterion']} --fill {fills[0]}",
            )


def _meta(trace: ImportanceTrace, facts: ModelFacts, options: TrainOptions, width: int) -> dict[str, Any]:
    return {
        "origin": "trained",
        "criterion": trace.meta["criterion"],
        "labels": options.learned,
        "model": trace.meta["model"],
        "text": trace.meta["text"],
        "source": trace.meta["source"],
        "positions": trace.meta["positions"],
        "collect_seed": trace.meta["seed"],
        "trace_key": trace.meta.get("key"),
        "seed": options.seed,
        "width": width,
        "training": options.model_dump(),
        "parameters_share": round(cost_share(facts, options.neuron_block, width, options.style), 5),
    }
