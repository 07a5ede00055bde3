# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N815 - fields carry their shape letters
"""One batch of texts through the dense model: each layer's signals, one after the other, and what is kept of them.

Without gradients a layer's signals are given while the model runs. With gradients the layers are walked backwards in
groups: only the last group's graph exists after the forward pass, every other group is run once more from its stored
input when its turn has come. So memory holds one group, whatever the depth of the model; a single group runs once.

Letters: B sequences, T tokens, M recorded positions, L model layers, E hidden, H heads, D head size, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shadowc.sparsity.families import Decoder, decoder_of, watched
from shadowc.sparsity.held import Give, Held

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.checkpoint.facts import ModelFacts
    from shadowc.sparsity.criteria import Criterion
    from shadowc.sparsity.signals import LayerSignals

BATCH_BYTES = 1 << 30
"""Rough bound on the activations, gradients and logits of one batch that are in memory at once."""
WHOLE_BYTES = 3 << 30
"""The same for criteria of second order that keep all layers (whole.py), which takes less than half of the time that
groups of layers take (curved.py)."""
_SECOND_ORDER = 3
"""Numbers in memory for each of first order: the second backward pass keeps the first one, or changes are carried."""


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
    ffn_inputs_LME: list[npt.NDArray[np.float32]] = field(default_factory=list)
    """What the FFNs of layers 1.. read."""
    loss: float = 0.0
    """Sum of the token losses of the sequences that are kept."""
    tokens: int = 0
    """How many losses that are."""
    zeros: tuple[int, int] = (0, 0)
    """Scores of heads and of neurons that are exactly zero, at the positions that are kept."""
    dropped: dict[int, str] = field(default_factory=dict)
    """Row within the batch -> what is not finite there. Its positions are of sequence -1, and zeros."""


def record_batch(
    model: Any,
    facts: ModelFacts,
    criterion: Criterion,
    ids_BT: npt.NDArray[np.int64],
    positions: list[npt.NDArray[np.int64]],
    means: Mapping[int, npt.NDArray[np.float32]] = MappingProxyType({}),
) -> Rows:
    """Run one batch and score its recorded positions; a text with a score that is not finite is dropped.

    Args:
        model: transformers' model.
        facts: its sizes, and its name for messages.
        criterion: what scores.
        ids_BT: the texts.
        positions: of every text, those recorded.
        means: model layer -> what skipped heads leave in their place [H,D]; the criterion sees heads as they differ
            from that. Layers that are not in it: zero.
    """
    decoder = decoder_of(model)
    row_M = torch.from_numpy(np.repeat(np.arange(len(ids_BT)), [len(p) for p in positions]))
    position_M = torch.from_numpy(np.concatenate(positions))
    heads: dict[int, Tensor] = {}
    neurons: dict[int, Tensor] = {}
    seen: dict[tuple[str, int], Tensor] = {}

    def score(layer: int, signals: LayerSignals) -> None:
        if layer in means:
            signals = replace(signals, context_BTHD=signals.context_BTHD - torch.from_numpy(means[layer]))
        taken = (row_M, position_M) if criterion.per == "token" else (row_M,)
        heads[layer], neurons[layer] = (values[taken] for values in criterion.score(signals))

    def keep(what: str, layer: int) -> Callable[[Tensor], None]:
        def act(tensor: Tensor) -> None:
            if (what, layer) not in seen:  # a group that is run again shows the same
                seen[what, layer] = tensor.detach().reshape(*ids_BT.shape, -1)[row_M, position_M]

        return act

    later = [(layer, block) for layer, block in enumerate(decoder.blocks) if layer]
    inputs = [(block.reads, keep("attention", layer)) for layer, block in later]
    inputs += [(block.ffn_reads, keep("ffn", layer)) for layer, block in later]
    with watched((decoder.blocks[0].context, keep("context", 0)), *inputs):
        losses_B = _read(decoder, torch.from_numpy(ids_BT), score, facts, criterion)
    layers = range(len(decoder.blocks))
    dropped = _dropped([heads[layer] for layer in layers], [neurons[layer] for layer in layers], row_M, losses_B)
    gone_M = torch.isin(row_M, torch.tensor([*dropped], dtype=row_M.dtype))
    for scores in (heads, neurons, seen):
        for values in scores.values():
            values[gone_M] = 0.0
    kept_B = [row not in dropped for row in range(len(ids_BT))]
    return Rows(
        torch.where(gone_M, -1, row_M).numpy().astype(np.int32),
        position_M.numpy().astype(np.int32),
        seen["context", 0].numpy(),
        torch.stack([heads[layer] for layer in layers], dim=1).numpy(),
        [neurons[layer].numpy() for layer in layers],
        [seen["attention", layer].numpy() for layer in layers[1:]],
        [seen["ffn", layer].numpy() for layer in layers[1:]],
        float(losses_B[kept_B].sum()),
        sum(kept_B) * (ids_BT.shape[1] - 1),
        (_zeros(heads, ~gone_M), _zeros(neurons, ~gone_M)),
        dropped,
    )


def _read(decoder: Decoder, ids_BT: Tensor, score: Give, facts: ModelFacts, criterion: Criterion) -> Tensor:
    """Give every layer's signals with what the criterion asked for; return the losses of the texts [B]."""
    group = layers_at_once(facts, *ids_BT.shape, curvature=criterion.curvature)
    if not criterion.curvature:
        backwards = criterion.gradients or criterion.weights
        return stream_signals(decoder, ids_BT, score, gradients=backwards, rows=criterion.weights, group=group)
    if not (criterion.weights or whole_fits(facts, *ids_BT.shape)):
        from shadowc.sparsity.curved import curved_signals

        return curved_signals(decoder, ids_BT, score, group=group)
    from shadowc.sparsity.whole import whole_signals

    signals, losses_BT = whole_signals(decoder, ids_BT, curvature=True, rows=criterion.weights)
    for layer, of_layer in enumerate(signals):
        score(layer, of_layer)
    return losses_BT.sum(1)


def _dropped(heads: list[Tensor], neurons: list[Tensor], row_M: Tensor, losses_B: Tensor) -> dict[int, str]:
    """Return row -> the first unit whose score is not finite, by layers."""
    found: dict[int, str] = {}
    for layer, pair in enumerate(zip(heads, neurons, strict=True)):
        for unit, values_MU in zip(("head", "neuron"), pair, strict=True):
            if bool(torch.isfinite(values_MU).all()):
                continue
            for m, number in torch.nonzero(~torch.isfinite(values_MU)).tolist():
                found.setdefault(int(row_M[m]), f"importance of {unit} {number} in layer {layer} is not finite")
    for (row,) in torch.nonzero(~torch.isfinite(losses_B)).tolist():
        found.setdefault(row, "the loss is not finite")
    return found


def _zeros(scores: dict[int, Tensor], kept_M: Tensor) -> int:
    return sum(int((values[kept_M] == 0).sum()) for values in scores.values())


def texts_at_once(facts: ModelFacts, length: int, *, gradients: bool, curvature: bool = False) -> int:
    """Return how many texts of so many tokens run at once within `BATCH_BYTES`, as one group of layers; at least 1."""
    layers = (_SECOND_ORDER if curvature else 1) * facts.layers if gradients else 1
    return max(BATCH_BYTES // (4 * length * (layers * _layer_floats(facts, length) + _other_floats(facts))), 1)


def layers_at_once(facts: ModelFacts, texts: int, length: int, *, curvature: bool = False) -> int:
    """Return how many layers make a group, so that one fits into `BATCH_BYTES`; at least 1."""
    fold = _SECOND_ORDER if curvature else 1
    left = BATCH_BYTES // (4 * texts * length * fold) - _other_floats(facts)
    return min(max(left // _layer_floats(facts, length), 1), facts.layers)


def whole_fits(facts: ModelFacts, texts: int, length: int) -> bool:
    """Whether the graph of both backward passes through all layers fits into `WHOLE_BYTES`."""
    floats = _SECOND_ORDER * facts.layers * _layer_floats(facts, length) + _other_floats(facts)
    return 4 * texts * length * floats <= WHOLE_BYTES


def _layer_floats(facts: ModelFacts, length: int) -> int:
    """Numbers per token in the graph of one layer, with the gradients that criteria see."""
    return 10 * facts.hidden + 4 * facts.ffn + 2 * facts.heads * length


def _other_floats(facts: ModelFacts) -> int:
    """Numbers per token beside the groups: logits with their gradients, what every layer reads."""
    return 3 * facts.vocab + facts.layers * facts.hidden


def stream_signals(
    decoder: Decoder, ids_BT: Tensor, give: Give, *, gradients: bool, rows: bool = False, group: int = 0
) -> Tensor:
    """Run the model and give every layer's signals once, in no fixed order; return the sum of each text's losses [B].

    Args:
        decoder: the model; its weights need no gradients.
        ids_BT: the texts, each from its first token on.
        give: called with the layer and its signals, which are freed afterwards.
        gradients: whether the signals have gradients, of the sum of the token losses.
        rows: with gradients, whether they have the linear maps whose rows are the neurons too.
        group: with gradients, layers whose graph is in memory at once; 0: all.
    """
    embedded = decoder.embed(ids_BT).detach()
    if gradients:
        return _Backwards(decoder, ids_BT, give, rows, group or len(decoder.blocks)).run(embedded)
    held = [Held(decoder, block) for block in decoder.blocks]
    with torch.no_grad(), watched(*(pair for layer, one in enumerate(held) for pair in one.given(layer, give))):
        return token_losses(decoder.model(inputs_embeds=embedded, use_cache=False).logits, ids_BT).sum(1)


def token_losses(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Return the loss of every token but the first, [B,T-1]."""
    losses = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids_BT), -1)


def summed_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Return the sum of the losses of all tokens but the first."""
    return token_losses(logits_BTV, ids_BT).sum()


class _Backwards:
    """One forward and one backward pass, by groups of layers."""

    def __init__(self, decoder: Decoder, ids_BT: Tensor, give: Give, rows: bool, group: int) -> None:
        self._decoder = decoder
        self._ids_BT = ids_BT
        self._give = give
        self._rows = rows
        layers = len(decoder.blocks)
        self._groups = [range(max(end - group, 0), end) for end in range(layers, 0, -group)]
        """From the last to the first."""
        self._starts: dict[int, Tensor] = {}
        """What each group's first layer read."""
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        """What each layer was called with beside that."""

    def run(self, embedded_BTE: Tensor) -> Tensor:
        """Return the sum of the token losses of each text, [B]."""
        last, *earlier = self._groups
        held = self._held(last)
        handles = [
            block.layer.register_forward_pre_hook(self._entered(layer), with_kwargs=True)
            for layer, block in enumerate(self._decoder.blocks)
        ]
        try:
            with torch.no_grad(), watched(*(pair for one in held.values() for pair in one.watches())):
                logits_BTV = self._decoder.model(inputs_embeds=embedded_BTE, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        with torch.enable_grad():
            losses_B = token_losses(logits_BTV, self._ids_BT).sum(1)
            loss = losses_B.sum()
        del logits_BTV
        slope = self._differentiate(last, held, loss, None)
        for group in earlier:
            held = self._held(group)
            slope = self._differentiate(group, held, self._again(group, held), slope)
        return losses_B.detach()

    def _entered(self, layer: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
        """Return a hook that notes a layer's arguments, and begins the graph where the last group begins."""
        starts = {group[0] for group in self._groups}

        def hook(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            self._arguments.append((inputs[1:], named))
            if layer not in starts:
                return None
            start = inputs[0].detach()
            if layer == self._groups[0][0]:
                torch.set_grad_enabled(True)  # until the end of the forward pass
                start.requires_grad_()
            self._starts[layer] = start
            return (start, *inputs[1:]), named

        return hook

    def _held(self, group: range) -> dict[int, Held]:
        return {layer: Held(self._decoder, self._decoder.blocks[layer], self._rows) for layer in group}

    def _again(self, group: range, held: dict[int, Held]) -> Tensor:
        """Run a group once more from its stored input, now with its graph."""
        with torch.enable_grad(), watched(*(pair for one in held.values() for pair in one.watches())):
            passed = self._starts[group[0]].requires_grad_()
            for layer in group:
                more, named = self._arguments[layer]
                result = self._decoder.blocks[layer].layer(passed, *more, **named)
                passed = result[0] if isinstance(result, tuple) else result
        return passed

    def _differentiate(self, group: range, held: dict[int, Held], end: Tensor, slope: Tensor | None) -> Tensor:
        """Give the signals of a group, and return the gradient at its input."""
        wanted = [self._starts.pop(group[0])]
        for one in held.values():
            wanted += one.tensors
        first, *found = torch.autograd.grad(end, wanted, None if slope is None else (slope,))
        each = len(found) // len(group)
        for number, layer in enumerate(group):
            gradients = found[each * number : each * (number + 1)]
            self._give(layer, held.pop(layer).signals(self._ids_BT.shape, gradients))
        return first
