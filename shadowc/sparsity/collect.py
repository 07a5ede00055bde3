# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N815 - fields carry their shape letters
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowc.sparsity.calibration import SELF, calibration_text, read_text, sequence_count, sequence_length
from shadowc.sparsity.criteria import Criterion, LayerSignals, find_criterion
from shadowc.sparsity.importance import SCHEMA, ImportanceTrace, Origin, TraceWriter, relative, trace_layout
from shadowc.spec.errors import InputError
from shadowc.spec.progress import NullProgress

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from shadowc.checkpoint.opt import OptFacts
    from shadowc.checkpoint.resolve import Checkpoint
    from shadowc.spec.options import CollectOptions
    from shadowc.spec.progress import Progress

__all__ = ["ImportanceTrace", "collect", "record_batch", "sampled_positions", "trace_key"]

BATCH_BYTES = 1 << 30
"""Rough bound on activations, gradients and logits of one batch."""


def collect(
    checkpoint: Checkpoint,
    options: CollectOptions,
    out: Path,
    progress: Progress | None = None,
    *,
    model: Any = None,  # transformers' OPTForCausalLM, which has no types
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

    Raises:
        InputError: unknown criterion, unusable text, numbers that are not finite, or `out` is something else.
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
            _begin(writer, model, checkpoint, options, progress)
    ids_NT = writer.read("tokens").astype(np.int64)
    positions = sampled_positions(len(ids_NT), ids_NT.shape[1], options.positions, options.seed)
    batch = _batch(checkpoint.facts, ids_NT.shape[1], criterion)
    done = np.cumsum([0, *(len(of_sequence) for of_sequence in positions)])
    first = int(np.searchsorted(done, writer.rows))
    for begin in range(first, len(ids_NT), batch):
        end = min(begin + batch, len(ids_NT))
        try:
            rows = record_batch(model, checkpoint.facts, criterion, ids_NT[begin:end], positions[begin:end])
        except InputError:
            writer.discard()  # the next run would only be refused at the same place
            raise
        _put(writer, rows, int(done[begin]), begin)
        loss = writer.meta["loss"] + rows.loss / (ids_NT.size - len(ids_NT))
        writer.commit(int(done[end]), writer.meta | {"loss": loss})
        progress.advance(int(done[end]), options.positions, "positions")
    return writer.finish(origin)


def sampled_positions(count: int, length: int, positions: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Return for each sequence the positions recorded, ascending; together `positions` (or all, if there are fewer).

    The first position (bos, always the same) and the last (its successor is unknown) are never among them.
    """
    generator = np.random.default_rng([seed, 1])
    usable = np.arange(1, length - 1)
    wanted = min(positions, count * len(usable))
    shares = [wanted * (n + 1) // count - wanted * n // count for n in range(count)]
    return [np.sort(generator.permutation(usable)[:share]) for share in shares]


@dataclass(slots=True)
class Rows:
    """What one batch gives: M recorded positions."""

    sequence_M: npt.NDArray[np.int32]
    """Row within the batch."""
    position_M: npt.NDArray[np.int32]
    context_ME: npt.NDArray[np.float32]
    heads_MLH: npt.NDArray[np.float32]
    neurons_LMF: list[npt.NDArray[np.float32]] = field(default_factory=list)
    inputs_LME: list[npt.NDArray[np.float32]] = field(default_factory=list)
    """What the attentions of layers 1.. read."""
    loss: float = 0.0
    """Sum of all token losses."""


def record_batch(
    model: Any,
    facts: OptFacts,
    criterion: Criterion,
    ids_BT: npt.NDArray[np.int64],
    positions: list[npt.NDArray[np.int64]],
) -> Rows:
    """Run one batch and score its recorded positions.

    Raises:
        InputError: an activation or gradient is not finite.
    """
    import torch

    ids = torch.from_numpy(ids_BT)
    row_M = torch.from_numpy(np.repeat(np.arange(len(ids_BT)), [len(p) for p in positions]))
    position_M = torch.from_numpy(np.concatenate(positions))
    with _layer_inputs(model, row_M, position_M) as inputs_LME:
        context_BTE, fc1_BTF, loss, gradients = _signals(model, ids, criterion.gradients)
    layers, split = facts.layers, (*ids.shape, facts.heads, facts.head_size)
    heads, neurons = [], []
    for layer in range(layers):
        of_layer = LayerSignals(
            context_BTE[layer].reshape(split),
            fc1_BTF[layer],
            gradients[layer].reshape(split) if gradients else None,
            gradients[layers + layer] if gradients else None,
        )
        heads_BTH, neurons_BTF = criterion.score(of_layer)
        heads.append(heads_BTH[row_M, position_M])
        neurons.append(neurons_BTF[row_M, position_M])
        if not bool(torch.isfinite(heads[-1]).all() and torch.isfinite(neurons[-1]).all()):
            raise InputError(
                f"{facts.name}: importance in layer {layer} is not finite; the weights may be damaged",
                hint="check the checkpoint for NaN and Inf",
            )
    return Rows(
        row_M.numpy().astype(np.int32),
        position_M.numpy().astype(np.int32),
        context_BTE[0][row_M, position_M].numpy(),
        torch.stack(heads, dim=1).numpy(),
        [values.numpy() for values in neurons],
        [values.numpy() for values in inputs_LME],
        loss,
    )


@contextmanager
def _layer_inputs(model: Any, row_M: Tensor, position_M: Tensor) -> Iterator[list[Tensor]]:
    """Give a list that a run of the model fills with [M,E] of layers 1.. in order; other positions are not kept."""
    seen: list[Tensor] = []

    def keep(_: Any, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0].detach()[row_M, position_M])

    hooks = [layer.self_attn.q_proj.register_forward_pre_hook(keep) for layer in model.model.decoder.layers[1:]]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _signals(
    model: Any, ids_BT: Tensor, with_gradients: bool
) -> tuple[list[Tensor], list[Tensor], float, list[Tensor]]:
    """Return contexts [B,T,E] and fc1 outputs [B,T,F] of all layers, the sum of losses, and gradients of both."""
    import torch
    from torch.nn import functional as F

    decoder = model.model.decoder
    contexts: list[Tensor] = []
    hidden: list[Tensor] = []
    hooks = []
    for layer in decoder.layers:
        hooks.append(layer.self_attn.out_proj.register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[0])))
        hooks.append(layer.fc1.register_forward_hook(lambda _, __, output: hidden.append(output)))
    try:
        with torch.set_grad_enabled(with_gradients):
            # Gradients start at the embeddings, so that the weights need none.
            embeddings = decoder.embed_tokens(ids_BT).detach().requires_grad_(with_gradients)
            logits_BTV = model(inputs_embeds=embeddings, use_cache=False).logits
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum")
            gradients = list(torch.autograd.grad(loss, [*contexts, *hidden])) if with_gradients else []
    finally:
        for hook in hooks:
            hook.remove()
    shape = (*ids_BT.shape, -1)  # transformers flattens [B,T] before fc1
    count = len(contexts)
    return (
        [context.detach().reshape(shape) for context in contexts],
        [values.detach().reshape(shape) for values in hidden],
        float(loss.detach()),
        [g.reshape(ids_BT.shape[0], ids_BT.shape[1], -1) for g in gradients] if count else [],
    )


def _begin(
    writer: TraceWriter, model: Any, checkpoint: Checkpoint, options: CollectOptions, progress: Progress
) -> None:
    """Make the calibration text and lay out the trace."""
    facts = checkpoint.facts
    text = calibration_text(model, checkpoint, options, progress)
    count, length = text.ids_NT.shape
    rows = sum(len(p) for p in sampled_positions(count, length, options.positions, options.seed))
    meta = {
        "criterion": options.criterion,
        "model": {"name": facts.name, "identity": checkpoint.identity},
        "facts": asdict(facts),
        "source": text.source,
        "text": text.text.to_meta(),
        "seed": options.seed,
        "positions": rows,
        "sequences": count,
        "length": length,
        "loss": 0.0,
    }
    writer.begin(trace_layout(facts, rows, count, length), meta)
    writer.put("tokens", text.ids_NT)
    writer.commit(0, meta)


def _put(writer: TraceWriter, rows: Rows, row: int, sequence: int) -> None:
    writer.put("sequence", rows.sequence_M + sequence, row)
    writer.put("position", rows.position_M, row)
    writer.put("context", rows.context_ME, row)
    writer.put("heads", rows.heads_MLH, row)
    scales = []
    for layer, neurons_MF in enumerate(rows.neurons_LMF):
        relative_MF, scale_M = relative(neurons_MF)
        writer.put(f"neurons.{layer}", relative_MF, row)
        scales.append(scale_M)
    writer.put("neurons.scale", np.stack(scales, axis=1), row)
    for layer, input_ME in enumerate(rows.inputs_LME, start=1):
        writer.put(f"input.{layer}", input_ME, row)


def _batch(facts: OptFacts, length: int, criterion: Criterion) -> int:
    """Return how many sequences run at once within `BATCH_BYTES`."""
    per_layer = 12 * facts.hidden + 3 * facts.ffn + 3 * facts.heads * length
    kept = (2 if criterion.gradients else 1) * facts.layers * per_layer + 3 * facts.vocab
    return max(BATCH_BYTES // (4 * length * kept), 1)


def trace_key(checkpoint: Checkpoint, options: CollectOptions) -> str:
    """Return a hash of everything that decides the trace."""
    text = SELF if options.data == SELF else read_text(Path(options.data))[1].sha256
    counts = [sequence_count(options, checkpoint.facts), sequence_length(options, checkpoint.facts)]
    decided = [SCHEMA, checkpoint.identity, options.model_dump(exclude={"data"}), text, counts]
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()
