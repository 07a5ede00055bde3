# SPDX-License-Identifier: Apache-2.0

"""Where things are in a torch model: what differs between families, as data.

In: transformers' model of one family. Out: `Decoder`: its blocks with the places at which units are seen and masked,
the weights that belong to a unit, and how it is fed. The rest of `sparsity` knows models through this alone. A new
family is one file beside this one that makes a `Decoder`, and one entry in `__init__.py`.

Letters: B batch, S tokens, P tokens so far, E hidden, H heads, D head size, F neurons, U units of a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Act = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, slots=True)
class Site:
    """A tensor inside a model: what a module reads, or what it returns."""

    module: nn.Module
    output: bool = False

    def watch(self, act: Act) -> RemovableHandle:
        """Call `act` with the tensor in every run until the handle is removed.

        What `act` returns takes the tensor's place; None leaves it. Some models flatten [B,S] before their FFN, so the
        tensor is [B,S,..] or [B*S,..].
        """
        if self.output:
            return self.module.register_forward_hook(lambda _, __, output: act(output))

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            changed = act(inputs[0])
            return None if changed is None else (changed, *inputs[1:])

        return self.module.register_forward_pre_hook(before)


@contextmanager
def watched(*pairs: tuple[Site, Act]) -> Iterator[None]:
    """Watch several sites while the block runs."""
    handles: list[RemovableHandle] = []
    try:
        for site, act in pairs:
            handles.append(site.watch(act))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class UnitWeights:
    """A parameter of which every unit of a layer has a part of its own: rows (axis 0) or columns (axis 1)."""

    name: str
    """Below the model, as `named_parameters` spells it."""
    parameter: nn.Parameter
    axis: int
    units: int

    def by_unit(self, like: Tensor | None = None) -> Tensor:
        """Return [U, values of one unit] of the parameter, or of a tensor of its shape, such as its gradient."""
        whole = self.parameter if like is None else like
        return whole.movedim(self.axis, 0).reshape(self.units, -1)


@dataclass(frozen=True, slots=True)
class Block:
    """One layer: where its units are, and their weights."""

    layer: nn.Module
    reads: Site
    """[B,S,E]: what attention reads, behind its norm."""
    context: Site
    """[B,S,H*D]: what the heads give to the output projection; the heads are masked here."""
    ffn_reads: Site
    """[B,S,E] or [B*S,E]: what the FFN reads, behind its norm."""
    preactivation: Site
    """u of `LayerSignals`; where a neuron has no single value before its activation, the same site as `hidden`."""
    hidden: Site
    """[B,S,F] or [B*S,F]: what the last projection of the FFN reads; the neurons are masked here."""
    heads: tuple[UnitWeights, ...]
    """All weights that belong to one head alone."""
    neurons: tuple[UnitWeights, ...]
    """All weights that belong to one neuron alone."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model as the sparsity stages see it."""

    model: Any
    """transformers' own, which has no types."""
    heads: int
    head_size: int
    neurons: int
    blocks: tuple[Block, ...]
    embed: Callable[[Tensor], Tensor]
    """Token ids [B,S] -> token embeddings, what the model takes as `inputs_embeds`."""
    finish: Callable[[Tensor], Tensor]
    """What the last block returns [B,S,E] -> logits [B,S,V]."""
    placed: Callable[[Tensor, int], Mapping[str, Tensor]]
    """Attention mask [B,P] (1: a token, 0: a pad on the left) and S -> further arguments that keep pads from counting
    as positions."""


def unit_weights(module: nn.Module, scope: str, units: int, axis: int) -> tuple[UnitWeights, ...]:
    """Return the weight of a linear layer and, where its rows belong to units and it has one, its bias."""
    found = [UnitWeights(f"{scope}.weight", module.weight, axis, units)]  # type: ignore[arg-type]
    if axis == 0 and module.bias is not None:
        found.append(UnitWeights(f"{scope}.bias", module.bias, 0, units))  # type: ignore[arg-type]
    return tuple(found)
