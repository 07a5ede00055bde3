# SPDX-License-Identifier: Apache-2.0
"""Signals with products of Hessian and gradient, by groups of layers, so that memory holds one group's graph.

The Hessian is that of the loss as a function of numbers added to the contexts and to u of all layers, as in whole.py.
Its product with the gradient v is how the gradient changes when those numbers grow along v. So: a first pass finds v;
the model runs once more in numbers that carry their change (forward mode); then the groups are walked backwards, and
the gradient of each is taken in such numbers too.

Letters: B sequences, T tokens, E hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from shadowc.sparsity.families import Act, Decoder, Site, watched
from shadowc.sparsity.held import Give, signals_of
from shadowc.sparsity.record import stream_signals, token_losses
from shadowc.sparsity.signals import LayerSignals

Changing = tuple[Tensor, Tensor]
"""Numbers, and how they change; of one shape."""

_SILU = ("SiLU", "SiLUActivation")
"""torch's own module, and that of newer transformers."""


def curved_signals(decoder: Decoder, ids_BT: Tensor, give: Give, *, group: int = 0) -> Tensor:
    """As `stream_signals` with gradients, and every layer's signals have the products; returns the losses [B]."""
    slopes: dict[int, Changing] = {}

    def keep(layer: int, signals: LayerSignals) -> None:
        slopes[layer] = signals.gradients()

    losses_B = stream_signals(decoder, ids_BT, keep, gradients=True, group=group)
    layers = len(decoder.blocks)
    group = group or layers
    groups = [range(max(end - group, 0), end) for end in range(layers, 0, -group)]
    with _spelt_out(decoder):
        run = _run_with_change(decoder, ids_BT, slopes, {one[0] for one in groups})
        slope: Changing | None = None
        for one in groups:
            slope = _Group(decoder, ids_BT, one, run).walk_back(slope, slopes, give)
    return losses_B


@dataclass(slots=True)
class _Run:
    """What the layers were called with in numbers that carry their change."""

    starts: dict[int, Changing] = field(default_factory=dict)
    """What each group's first layer read."""
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """What each layer was called with beside that."""


def _run_with_change(decoder: Decoder, ids_BT: Tensor, slopes: Mapping[int, Changing], first: set[int]) -> _Run:
    """Run the model without a graph while contexts and u grow along their slopes; keep what layers `first` read."""
    run = _Run()

    def entered(layer: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            run.arguments.append((inputs[1:], named))
            if layer in first:
                number, change = forward_ad.unpack_dual(inputs[0])  # type: ignore[no-untyped-call]
                run.starts[layer] = number, torch.zeros_like(number) if change is None else change

        return hook

    def growing(slope: Tensor) -> Act:
        def act(tensor: Tensor) -> Tensor:
            along = slope.reshape(tensor.shape)
            nothing: Tensor = forward_ad.make_dual(torch.zeros_like(along), along)  # type: ignore[no-untyped-call]
            return tensor + nothing

        return act

    pairs: list[tuple[Site, Act]] = []
    for layer, block in enumerate(decoder.blocks):
        pairs += zip((block.context, block.preactivation), map(growing, slopes[layer]), strict=True)
    handles = [
        block.layer.register_forward_pre_hook(entered(layer), with_kwargs=True)
        for layer, block in enumerate(decoder.blocks)
    ]
    try:
        with torch.no_grad(), forward_ad.dual_level(), watched(*pairs):
            decoder.model(inputs_embeds=decoder.embed(ids_BT), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return run


class _Group:
    """Some layers in a row, behind the last of them also the loss.

    Args:
        decoder: the model.
        ids_BT: the texts.
        layers: of the group.
        run: what they were called with.
    """

    def __init__(self, decoder: Decoder, ids_BT: Tensor, layers: range, run: _Run) -> None:
        self._decoder = decoder
        self._ids_BT = ids_BT
        self._layers = layers
        self._run = run

    def walk_back(self, slope: Changing | None, slopes: Mapping[int, Changing], give: Give) -> Changing:
        """Give the signals of the group's layers, and return the gradient at its input and how it changes.

        Args:
            slope: the gradient at its end; None where that is the loss.
            slopes: layer -> g and q, along which contexts and u grow.
            give: called with a layer and its signals.
        """
        start = self._run.starts.pop(self._layers[0])
        added = [self._added(slopes[layer]) for layer in self._layers]
        changing = [start, *(pair for of_layer in added for pair in of_layer)]
        end = (torch.ones(()), torch.zeros(())) if slope is None else slope

        vjp: Any = torch.func.vjp  # torch's types know no `has_aux`
        jvp: Any = torch.func.jvp

        def gradient(end: Tensor, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
            _, backwards, seen = vjp(self._forwards, *inputs, has_aux=True)
            return backwards(end), seen

        numbers, changes = zip(end, *changing, strict=True)
        found, more, seen = jvp(gradient, numbers, changes, has_aux=True)
        for at, layer in enumerate(self._layers):
            places = slice(1 + 3 * at, 4 + 3 * at)
            activations = seen[3 * at : 3 * at + 3]
            give(layer, signals_of(self._decoder, self._ids_BT.shape, activations, found[places], more[places][:2]))
        return found[0], more[0]

    def _added(self, slopes: Changing) -> list[Changing]:
        """Return what is added to context, u and h of a layer: nothing, which grows along the first two slopes."""
        g, q = (slope.flatten(2) for slope in slopes)
        return [(torch.zeros_like(g), g), (torch.zeros_like(q), q), (torch.zeros_like(q), torch.zeros_like(q))]

    def _forwards(self, read: Tensor, *added: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the group's end, and contexts, u and h of its layers on the way."""
        seen: list[Tensor] = []

        def adding(number: int) -> Act:
            def act(tensor: Tensor) -> Tensor:
                seen.append(tensor)
                return tensor + added[number].reshape(tensor.shape)

            return act

        blocks = [self._decoder.blocks[layer] for layer in self._layers]
        sites = [site for block in blocks for site in (block.context, block.preactivation, block.hidden)]
        with watched(*((site, adding(number)) for number, site in enumerate(sites))):
            for layer, block in zip(self._layers, blocks, strict=True):
                further, named = self._run.arguments[layer]
                result = block.layer(read, *further, **named)
                read = result[0] if isinstance(result, tuple) else result
        if self._layers[-1] + 1 < len(self._decoder.blocks):
            return read, seen
        return token_losses(self._decoder.finish(read), self._ids_BT).sum(), seen


@contextmanager
def _spelt_out(decoder: Decoder) -> Iterator[None]:
    """Let SiLU be x * sigmoid(x) while the block runs: torch carries no change through its backward pass."""
    found = [module for module in decoder.model.modules() if type(module).__name__ in _SILU]
    handles = [one.register_forward_hook(lambda _, read, __: read[0] * read[0].sigmoid()) for one in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
