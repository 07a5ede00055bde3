# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N815 - fields carry their shape letters
"""Trains the predictor on an importance trace: the published recipe, with neuron blocks and a fair report.

In: a trace, the model's facts, `TrainOptions`. Out: a `Predictor`. Inputs are the token's own layer-0 context,
min-max scaled; targets are the importances of the predicted layers, min-max scaled per layer and token; two
networks, mean squared error, AdamW, cosine to zero (ShadowLLM, arXiv 2406.16635, variant b1eL).

Four things are ours and change nothing in the network's form. Inputs are standardised and targets centred while
training, and both are folded into the weights afterwards, exactly. Dropout while training. The last matrix starts at
zero, so training starts from the mean score, the normalised static ranking, and the epoch that is best on held-out
sequences is kept: where the context says nothing, the predictor stays the static ranking instead of learning noise.
The report is made on the same held-out sequences that chose the epoch: one choice among a few dozen, a small favour.
Whole sequences are held out, since neighbouring tokens resemble each other.

The same trace and options give the same weights. Small networks are trained in one thread (see threads.py); for large
ones all threads work, and then their number decides in which order sums are added.

Letters: M positions, E hidden, P width, Lp predicted layers, H heads, N neuron blocks, U = units of a kind per
layer (H or N), O = Lp * U outputs of a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowc.sparsity.cluster import neuron_orders
from shadowc.sparsity.predictor import (
    Network,
    Predictor,
    blocks_of,
    check_out,
    cost_share,
    default_width,
    minmax_scaled,
)
from shadowc.sparsity.rank import (
    minmax_rows,
    normalised_static_scores,
    predicted_scores,
    random_scores,
    static_scores,
)
from shadowc.sparsity.recall import found_report
from shadowc.sparsity.threads import threads_for
from shadowc.spec.errors import InputError
from shadowc.spec.progress import NullProgress

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Generator, Tensor

    from shadowc.checkpoint.opt import OptFacts
    from shadowc.sparsity.importance import ImportanceTrace
    from shadowc.spec.options import TrainOptions
    from shadowc.spec.progress import Progress

    Floats = npt.NDArray[np.float32]

WEIGHT_DECAY = 0.1
INPUT_DROPOUT, HIDDEN_DROPOUT = 0.1, 0.5
"""A few thousand positions are few for 100,000 weights. On a partly trained opt-mini dropout lowered the held-out error
of the neuron network by 7 to 11 %; without it the best epoch was one of the first, before the cosine had come down."""
LEAST_SPREAD = 0.1
"""Inputs that vary less than this share of the average one are not blown up further when standardised."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs and targets of one network, training and validation part."""

    inputs_ME: Floats
    targets_MO: Floats
    held_inputs_ME: Floats
    held_targets_MO: Floats


@dataclass(frozen=True, slots=True)
class Fit:
    """A trained network and how it came about."""

    network: Network
    epoch: int
    """The epoch kept; 0 is the mean score."""
    error: float
    """Mean squared error on the held-out positions."""
    mean_error: float
    """The same for the mean score."""


def train(
    trace: ImportanceTrace,
    facts: OptFacts,
    options: TrainOptions,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Predictor:
    """Train a predictor and write it to the folder `out`.

    Raises:
        InputError: the trace is of another model, too small to hold sequences out, or its scores do not vary; or
            `out` holds something else than a predictor.
    """
    progress = progress or NullProgress()
    if out is not None:
        check_out(out)
    _require_fit(trace, facts, options)
    held_M: npt.NDArray[np.bool_] = held_out(trace.sequence_M, options.validation, options.seed)
    taught, held = np.flatnonzero(~held_M), np.flatnonzero(held_M)
    block, width = options.neuron_block, options.width or default_width(facts, options.neuron_block)
    with progress.stage("neuron order"):
        orders_LF = neuron_orders(trace, block, rows=taught)
    raw = dict(zip(("heads", "neurons"), predicted_scores(trace, orders_LF, block), strict=True))
    inputs_ME = minmax_scaled(trace.context_ME)
    fits: dict[str, Fit] = {}
    dropped: dict[str, int] = {}
    targets = {kind: layer_minmax(raw_MLU) for kind, raw_MLU in raw.items()}
    for number, (kind, targets_MLU) in enumerate(targets.items()):
        valid_M: npt.NDArray[np.bool_] = np.asarray(np.isfinite(targets_MLU).all(axis=(1, 2)))
        dropped[kind] = int((~valid_M).sum())
        used, used_held = taught[valid_M[taught]], held[valid_M[held]]
        if not len(used) or not len(used_held):
            raise InputError(
                f"no position has varying {kind} scores in every layer, so there is nothing to learn",
                hint="collect more --positions, or use another --criterion",
            )
        flat_MO = targets_MLU.reshape(len(targets_MLU), -1)
        examples = Examples(inputs_ME[used], flat_MO[used], inputs_ME[used_held], flat_MO[used_held])
        with progress.stage(f"train {kind}"):
            fits[kind] = fit(examples, width, options, options.seed + number, progress)
    predictor = Predictor(
        heads=fits["heads"].network,
        neurons=fits["neurons"].network,
        layers=facts.layers - 1,
        block=block,
        orders_LF=orders_LF,
        meta=_meta(trace, facts, options, width),
        controls={
            name: (ranking(raw["heads"][taught]), ranking(raw["neurons"][taught]))
            for name, ranking in (("static", static_scores), ("normalised", normalised_static_scores))
        },
    )
    predictor.meta["report"] = {
        "positions": {"taught": len(taught), "held_out": len(held), "dropped": dropped},
        "epoch": {kind: fitted.epoch for kind, fitted in fits.items()},
        "error": {kind: {"predictor": f.error, "mean": f.mean_error} for kind, f in fits.items()},
        "found": _report(predictor, trace.context_ME[held], {k: raw[k][held] for k in raw}, options.seed),
    }
    if out is not None:
        predictor.save(out)
    return predictor


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


def layer_minmax(scores_MLU: Floats) -> Floats:
    """Scale to 0..1 per position and layer.

    A row that is constant or not finite becomes NaN, and its position is dropped from training, as published. A layer
    whose rows are all like that (it never does anything) would drop every position; it becomes zeros instead.
    """
    layers = [minmax_rows(scores_MLU[:, layer]) for layer in range(scores_MLU.shape[1])]
    never = [np.isnan(scaled_MU).any(axis=1).all() for scaled_MU in layers]
    return np.stack([np.zeros_like(s) if dead else s for s, dead in zip(layers, never, strict=True)], axis=1)


def fit(examples: Examples, width: int, options: TrainOptions, seed: int, progress: Progress | None = None) -> Fit:
    """Train one network; return the state of the epoch that is best on the held-out positions."""
    work = options.batch * width * (examples.inputs_ME.shape[1] + examples.targets_MO.shape[1])
    with threads_for(work):
        return _fit(examples, width, options, seed, progress or NullProgress())


def _fit(examples: Examples, width: int, options: TrainOptions, seed: int, progress: Progress) -> Fit:
    import torch

    generator = torch.Generator().manual_seed(seed)
    centre_E, spread_E = _spread(examples.inputs_ME)
    mean_O = examples.targets_MO.mean(axis=0, dtype=np.float64).astype(np.float32)
    scale = float(np.sqrt(np.mean((examples.targets_MO - mean_O) ** 2, dtype=np.float64))) or 1.0
    x_ME, held_x_ME = (
        torch.from_numpy((part - centre_E) / spread_E) for part in (examples.inputs_ME, examples.held_inputs_ME)
    )
    y_MO, held_y_MO = (
        torch.from_numpy((part - mean_O) / np.float32(scale))
        for part in (examples.targets_MO, examples.held_targets_MO)
    )
    inputs, outputs = x_ME.shape[1], y_MO.shape[1]
    weights = [
        torch.randn(width, inputs, generator=generator) / math.sqrt(inputs),
        torch.zeros(width),
        torch.zeros(outputs, width),
        torch.zeros(outputs),
    ]
    mean_error = float((held_y_MO**2).mean())
    best, best_error, best_epoch = [w.clone() for w in weights], mean_error, 0
    steps = -(-len(x_ME) // options.batch)
    step = _stepper(weights, options.rate, options.epochs * steps)
    for epoch in range(1, options.epochs + 1):
        for rows in torch.split(torch.randperm(len(x_ME), generator=generator), options.batch):
            masks = _dropout_masks(generator, len(rows), inputs, width)
            step(x_ME[rows], y_MO[rows], masks)
        with torch.no_grad():
            error = float(((_forward(weights, held_x_ME) - held_y_MO) ** 2).mean())
        if error < best_error:
            best, best_error, best_epoch = [w.detach().clone() for w in weights], error, epoch
        progress.advance(epoch, options.epochs, "epochs")
    network = _folded([w.numpy() for w in best], centre_E, spread_E, mean_O, scale)
    return Fit(network, best_epoch, best_error * scale**2, mean_error * scale**2)


Masks = tuple["Tensor", "Tensor"]


def _dropout_masks(generator: Generator, rows: int, inputs: int, width: int) -> Masks:
    """Return factors for the inputs and the hidden units: 0 for those left out, more than 1 for the others."""
    import torch

    shares = ((inputs, 1 - INPUT_DROPOUT), (width, 1 - HIDDEN_DROPOUT))
    kept = [torch.empty(rows, size).bernoulli_(share, generator=generator) / share for size, share in shares]
    return kept[0], kept[1]


def _forward(weights: list[Tensor], x_ME: Tensor, masks: Masks | None = None) -> Tensor:
    from torch.nn import functional as F

    x_ME = x_ME if masks is None else x_ME * masks[0]
    hidden_MP = F.linear(x_ME, weights[0], weights[1]).relu()
    hidden_MP = hidden_MP if masks is None else hidden_MP * masks[1]
    return F.linear(hidden_MP, weights[2], weights[3])


def _stepper(weights: list[Tensor], rate: float, steps: int) -> Callable[[Tensor, Tensor, Masks], None]:
    """Return a function that takes one optimiser step on a batch."""
    import torch

    for weight in weights:
        weight.requires_grad_()
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def step(x_ME: Tensor, y_MO: Tensor, masks: Masks) -> None:
        optimiser.zero_grad()
        loss = ((_forward(weights, x_ME, masks) - y_MO) ** 2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()

    return step


def _spread(inputs_ME: Floats) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of every input, the latter bounded from below."""
    centre_E = inputs_ME.mean(axis=0, dtype=np.float64)
    spread_E = inputs_ME.std(axis=0, dtype=np.float64)
    least = max(LEAST_SPREAD * float(spread_E.mean()), 1e-6)
    return centre_E.astype(np.float32), np.maximum(spread_E, least).astype(np.float32)


def _folded(weights: list[Floats], centre_E: Floats, spread_E: Floats, mean_O: Floats, scale: float) -> Network:
    """Put the standardisation of the inputs into fc1 and the scale of the targets into fc2, in float64."""
    fc1_weight_PE = weights[0].astype(np.float64) / spread_E
    return Network(
        fc1_weight_PE.astype(np.float32),
        (weights[1] - fc1_weight_PE @ centre_E.astype(np.float64)).astype(np.float32),
        (weights[2] * np.float64(scale)).astype(np.float32),
        (weights[3] * np.float64(scale) + mean_O).astype(np.float32),
    )


def _report(predictor: Predictor, context_ME: Floats, raw: dict[str, Floats], seed: int) -> dict[str, Any]:
    """Return recall and captured importance on held-out positions, beside the controls'."""
    layers = predictor.layers
    scores = dict(zip(("heads", "neurons"), predictor.scores(context_ME), strict=True))
    heads, blocks = predictor.units
    chance = dict(zip(("heads", "neurons"), random_scores(seed, (layers, heads), (layers, blocks)), strict=True))
    report = {}
    for number, kind in enumerate(("heads", "neurons")):
        rivals = {name: pair[number] for name, pair in predictor.controls.items()} | {"random": chance[kind]}
        report[kind] = found_report(raw[kind], {"predictor": scores[kind], **rivals})
    return report


def _require_fit(trace: ImportanceTrace, facts: OptFacts, options: TrainOptions) -> None:
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


def _meta(trace: ImportanceTrace, facts: OptFacts, options: TrainOptions, width: int) -> dict[str, Any]:
    return {
        "origin": "trained",
        "criterion": trace.meta["criterion"],
        "model": trace.meta["model"],
        "text": trace.meta["text"],
        "source": trace.meta["source"],
        "positions": trace.meta["positions"],
        "collect_seed": trace.meta["seed"],
        "seed": options.seed,
        "width": width,
        "training": options.model_dump(),
        "parameters_share": round(cost_share(facts, options.neuron_block, width), 5),
    }
