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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shadowc.sparsity.families import Block, Decoder, Site, watched
from shadowc.sparsity.record import token_losses
from shadowc.sparsity.signals import LayerSignals, NeuronRows, WeightsByUnit

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
    kept = [_Kept(decoder, block, rows) for block in decoder.blocks]
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


class _Kept:
    """The tensors of one block that gradients are taken at: a, u, h, and what the neurons' rows return."""

    def __init__(self, decoder: Decoder, block: Block, rows: bool) -> None:
        self._decoder = decoder
        self._sites = {"a": block.context, "u": block.preactivation, "h": block.hidden}
        self._rows: list[tuple[str, Tensor]] = []
        if rows:
            for part in block.neurons:
                scope, _, kind = part.name.rpartition(".")
                if kind == "weight" and part.axis == 0:
                    module = decoder.model.get_submodule(scope)
                    self._sites |= {f"{scope} out": Site(module, output=True), f"{scope} in": Site(module)}
                    self._rows.append((scope, part.parameter))
        self._tensors: dict[str, Tensor] = {}

    def watches(self) -> list[tuple[Site, Callable[[Tensor], None]]]:
        """Return what keeps the tensors during a run."""

        def keep(name: str) -> Callable[[Tensor], None]:
            return lambda tensor: self._tensors.__setitem__(name, tensor)

        return [(site, keep(name)) for name, site in self._sites.items()]

    @property
    def tensors(self) -> list[Tensor]:
        """a, u, h, then the outputs of the rows."""
        return [self._tensors[name] for name in ("a", "u", "h", *(f"{scope} out" for scope, _ in self._rows))]

    def signals(self, shape: torch.Size, slopes: list[Tensor], second: tuple[Tensor, ...]) -> LayerSignals:
        """Return the signals in the shapes that criteria see; `shape` is [B,T]."""
        split = (*shape, self._decoder.heads, self._decoder.head_size)
        flat = (*shape, self._decoder.neurons)
        a, u, h = (self._tensors[name].detach() for name in ("a", "u", "h"))
        g, q, p = (slope.detach() for slope in slopes[:3])
        shaped: dict[str, Any] = {}
        if second:
            shaped = {
                "context_curvature_BTHD": second[0].detach().reshape(split),
                "preactivation_curvature_BTF": second[1].detach().reshape(flat),
            }
        if self._rows:
            shaped["rows"] = tuple(
                NeuronRows(
                    self._tensors[f"{scope} in"].detach().reshape(*shape, -1),
                    weight.detach(),
                    slope.detach().reshape(flat),
                )
                for (scope, weight), slope in zip(self._rows, slopes[3:], strict=True)
            )
        activations = (a.reshape(split), u.reshape(flat), h.reshape(flat))
        return LayerSignals(*activations, g.reshape(split), q.reshape(flat), p.reshape(flat), **shaped)


def _of_each(found: tuple[Tensor, ...], kept: list[_Kept]) -> list[list[Tensor]]:
    """Divide gradients among the blocks."""
    rest = list(found)
    return [[rest.pop(0) for _ in one.tensors] for one in kept]
