# SPDX-License-Identifier: Apache-2.0
"""Signals that need the graph of the whole model at once: second order, and gradients beside the neurons' rows.

`stream_signals` (record.py) goes through a model in groups of layers and gives first gradients; this is the slow and
plain way for everything else, and it gives everything. Memory holds the graph of all layers, with second order that of
the backward pass too.

The Hessian is that of the loss as a function of numbers added to the contexts and to u of all layers; its product with
the gradient is the gradient of <gradient kept fixed, gradient>.

Letters: B sequences, T tokens, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shadowc.sparsity.families import Block, Decoder, watched
from shadowc.sparsity.held import Held
from shadowc.sparsity.record import token_losses
from shadowc.sparsity.signals import LayerSignals, WeightsByUnit

if TYPE_CHECKING:
    from shadowc.sparsity.families import UnitWeights


def whole_signals(
    decoder: Decoder, ids_BT: Tensor, *, curvature: bool = False, rows: bool = False
) -> tuple[list[LayerSignals], Tensor]:
    """Run the model forwards and backwards; return the signals of all layers and the token losses.

    Args:
        decoder: the model; its weights need no gradients.
        ids_BT: the texts, each from its first token on.
        curvature: also the products of Hessian and gradient.
        rows: also the linear maps whose rows are the neurons.

    Returns:
        The signals, and losses [B,T-1] float32: entry t is of token t + 1.
    """
    kept = [Held(decoder, block, rows) for block in decoder.blocks]
    with torch.enable_grad(), watched(*(pair for one in kept for pair in one.watches())):
        embedded = decoder.embed(ids_BT).detach().requires_grad_()
        losses_BT = token_losses(decoder.model(inputs_embeds=embedded, use_cache=False).logits, ids_BT)
        sites = [tensor for one in kept for tensor in one.tensors]
        found = torch.autograd.grad(losses_BT.sum(), sites, create_graph=curvature)
        slopes = _of_each(found, kept)
        second: list[tuple[Tensor, ...]] = [()] * len(kept)
        if curvature:
            # a and u of every layer, each once, whatever else is kept.
            places = [tensor for one in kept for tensor in one.tensors[:2]]
            gradient = [slope for of_layer in slopes for slope in of_layer[:2]]
            along = torch.stack([(slope.detach() * slope).sum() for slope in gradient]).sum()
            product = torch.autograd.grad(along, places)
            second = [(product[2 * layer], product[2 * layer + 1]) for layer in range(len(kept))]
    shape = ids_BT.shape
    signals = [one.signals(shape, first, more) for one, first, more in zip(kept, slopes, second, strict=True)]
    return signals, losses_BT.detach()


def weights_by_unit(block: Block) -> WeightsByUnit:
    """Return the weights of one layer by unit, copied."""

    def of_kind(parts: tuple[UnitWeights, ...]) -> Tensor:
        return torch.cat([part.by_unit() for part in parts if part.name.endswith(".weight")], dim=1).detach()

    return WeightsByUnit(of_kind(block.heads), of_kind(block.neurons))


def _of_each(found: tuple[Tensor, ...], kept: list[Held]) -> list[list[Tensor]]:
    """Divide gradients among the blocks."""
    rest = list(found)
    return [[rest.pop(0) for _ in one.tensors] for one in kept]
