# SPDX-License-Identifier: Apache-2.0
"""What is kept of one block while a model runs, and the signals that are made of it.

Letters: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shadowc.sparsity.families import Act, Block, Decoder, Site
from shadowc.sparsity.signals import LayerSignals, NeuronRows

Give = Callable[[int, LayerSignals], None]
"""Takes the signals of a layer."""


class Held:
    """The tensors of one block that criteria see, as the model makes them: a, u, h, and what the neurons' rows return.

    Args:
        decoder: the model.
        block: of it.
        rows: whether the linear maps whose rows are the neurons are seen too.
    """

    def __init__(self, decoder: Decoder, block: Block, rows: bool = False) -> None:
        self._decoder = decoder
        self._sites = {"a": block.context, "u": block.preactivation, "h": block.hidden}
        self._last = block.hidden
        self._rows: list[tuple[str, Tensor]] = []
        for part in block.neurons if rows else ():
            scope, _, kind = part.name.rpartition(".")
            if kind == "weight" and part.axis == 0:
                module = decoder.model.get_submodule(scope)
                self._sites |= {f"{scope} out": Site(module, output=True), f"{scope} in": Site(module)}
                self._rows.append((scope, part.parameter))
        self._tensors: dict[str, Tensor] = {}

    def watches(self) -> list[tuple[Site, Act]]:
        """Return what keeps the tensors during a run."""

        def keep(name: str) -> Act:
            return lambda tensor: self._tensors.__setitem__(name, tensor)

        return [(site, keep(name)) for name, site in self._sites.items()]

    def given(self, layer: int, give: Give) -> list[tuple[Site, Act]]:
        """Return what gives the layer's signals as soon as the last of them is known, without gradients."""

        def act(_: Tensor) -> None:
            give(layer, self.signals(self._tensors["a"].shape[:2]))
            self._tensors.clear()

        return [*self.watches(), (self._last, act)]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """a, u, h, then the outputs of the rows; u and h may be one tensor."""
        return tuple(self._tensors[name] for name in ("a", "u", "h", *(f"{scope} out" for scope, _ in self._rows)))

    def signals(
        self, shape: torch.Size, gradients: Sequence[Tensor] = (), curvatures: Sequence[Tensor] = ()
    ) -> LayerSignals:
        """Return the signals in the shapes that criteria see.

        Args:
            shape: [B,T].
            gradients: at `tensors`.
            curvatures: at a and u.
        """
        made = signals_of(self._decoder, shape, self.tensors[:3], gradients[:3], curvatures)
        return replace(made, rows=self._neuron_rows(shape, gradients[3:])) if self._rows else made

    def _neuron_rows(self, shape: torch.Size, gradients: Sequence[Tensor]) -> tuple[NeuronRows, ...]:
        return tuple(
            NeuronRows(
                self._tensors[f"{scope} in"].detach().reshape(*shape, -1),
                weight.detach(),
                gradient.detach().reshape(*shape, -1),
            )
            for (scope, weight), gradient in zip(self._rows, gradients, strict=True)
        )


def signals_of(
    decoder: Decoder,
    shape: torch.Size,
    activations: Sequence[Tensor],
    gradients: Sequence[Tensor] = (),
    curvatures: Sequence[Tensor] = (),
) -> LayerSignals:
    """Return a layer's signals from its a, u and h, gradients there and curvatures at a and u; `shape` is [B,T]."""
    split = (*shape, decoder.heads, decoder.head_size)
    flat = (*shape, decoder.neurons)
    shapes = (split, flat, flat)
    found = _shaped(activations, shapes)
    found += _shaped(gradients, shapes) if gradients else [None, None, None]
    found += _shaped(curvatures, shapes[:2]) if curvatures else [None, None]
    return LayerSignals(*found)  # type: ignore[arg-type]


def _shaped(tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor | None]:
    """Return the tensors in these shapes, without their graphs."""
    return [tensor.detach().reshape(shape) for tensor, shape in zip(tensors, shapes, strict=True)]
