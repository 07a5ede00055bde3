# SPDX-License-Identifier: Apache-2.0
"""The truth that criteria guess at: how much the loss changes when a unit is really masked.

A unit is masked at one token, as an engine would for that token alone, and the losses of that token and of all later
ones are compared with the dense model's; or it is masked at all tokens of a text. Units are of the predicted layers
(1 to L-1), the only ones that are ever masked. Positive: the model got worse.

Letters: T tokens, U units, E hidden, K units of one layer that run together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shadowc.sparsity.families import Decoder, watched
from shadowc.sparsity.record import token_losses
from shadowc.spec.density import UNIT_KINDS

ROWS_AT_ONCE = 32
"""Masked copies of a text that run together."""


@dataclass(frozen=True, slots=True)
class Units:
    """Sampled units of one kind, [U] each: model layer, and index in it."""

    kind: str
    layer_U: npt.NDArray[np.int64]  # noqa: N815 - the name carries its shape
    index_U: npt.NDArray[np.int64]  # noqa: N815

    def __len__(self) -> int:
        return len(self.layer_U)

    def of(self, values: Sequence[Tensor]) -> Tensor:
        """Take these units out of values by layer, each [..., units of the layer]; return [..., U]."""
        pairs = zip(self.layer_U.tolist(), self.index_U.tolist(), strict=True)
        return torch.stack([values[layer][..., index] for layer, index in pairs], dim=-1)


def sampled_units(decoder: Decoder, kind: str, count: int, seed: int) -> Units:
    """Return `count` units (all, if there are fewer), as many of every predicted layer as of any other, but for one."""
    generator = np.random.default_rng([seed, UNIT_KINDS.index(kind)])
    each = decoder.heads if kind == "heads" else decoder.neurons
    layers = len(decoder.blocks) - 1
    count = min(count, layers * each)
    shares = [count * (n + 1) // layers - count * n // layers for n in range(layers)]
    chosen = [np.sort(generator.permutation(each)[:share]) for share in shares]
    return Units(kind, np.repeat(np.arange(1, layers + 1), shares), np.concatenate(chosen).astype(np.int64))


class DenseRun:
    """One text through the dense model, from which masked runs begin at the layer of their unit.

    Args:
        decoder: the model.
        ids_T: the text.
    """

    def __init__(self, decoder: Decoder, ids_T: Tensor) -> None:
        self._decoder = decoder
        self.ids_T = ids_T
        self._reads: list[Tensor] = []
        """What each layer was called with: [1,T,E], and the rest of its arguments."""
        self._rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._fired: list[Tensor] = []
        """[T,F]: what the last projection of the FFN read."""

        def entered(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._reads.append(inputs[0])
            self._rest.append((inputs[1:], named))

        def keep(hidden: Tensor) -> None:
            self._fired.append(hidden.reshape(-1, hidden.shape[-1]))

        handles = [block.layer.register_forward_pre_hook(entered, with_kwargs=True) for block in decoder.blocks]
        try:
            with torch.no_grad(), watched(*((block.hidden, keep) for block in decoder.blocks)):
                logits = decoder.model(inputs_embeds=decoder.embed(ids_T[None]), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        self.losses_T = token_losses(logits, ids_T[None])[0].double()
        """[T-1]: entry t is of token t + 1, which position t predicts."""

    def changes(self, units: Units, position: int | None) -> tuple[Tensor, int]:
        """Return the change of the summed loss by masking each unit, float64 [U], and how many units were run.

        A neuron that says nothing (h = 0) where it would be masked changes nothing; it is not run.

        Args:
            units: one run for each.
            position: the token at which a unit is masked; None: at all.
        """
        changes_U = torch.zeros(len(units), dtype=torch.float64)
        runs = 0
        for chosen in self._batches(units, position):
            index_K = torch.from_numpy(units.index_U[chosen])
            layer = int(units.layer_U[chosen[0]])
            changes_U[torch.from_numpy(chosen)] = self._masked(units.kind, layer, index_K, position)
            runs += len(chosen)
        return changes_U, runs

    def _batches(self, units: Units, position: int | None) -> Iterator[npt.NDArray[np.intp]]:
        """Give units of one layer that have something to say, as indices."""
        where = slice(None) if position is None else slice(position, position + 1)
        for layer in range(1, len(self._decoder.blocks)):
            chosen = np.flatnonzero(units.layer_U == layer)
            if units.kind == "neurons":
                says_F = (self._fired[layer][where] != 0).any(0).numpy()
                chosen = chosen[says_F[units.index_U[chosen]]]
            for at in range(0, len(chosen), ROWS_AT_ONCE):
                yield chosen[at : at + ROWS_AT_ONCE]

    def _masked(self, kind: str, layer: int, index_K: Tensor, position: int | None) -> Tensor:
        """Run copies of the text from a layer on, one unit masked in each; return the changes [K]."""
        decoder, count = self._decoder, len(index_K)
        block = decoder.blocks[layer]
        site = block.context if kind == "heads" else block.hidden
        act = _mask(index_K, len(self.ids_T), decoder.head_size if kind == "heads" else 1, position)
        first = 0 if position is None else position
        with torch.no_grad():
            passed = self._reads[layer].expand(count, -1, -1)
            with watched((site, act)):
                passed = self._run(layer, passed)
            for later in range(layer + 1, len(decoder.blocks)):
                passed = self._run(later, passed)
            logits = decoder.finish(passed[:, first:])
        losses = token_losses(logits, self.ids_T[first:].expand(count, -1)).double()
        return (losses - self.losses_T[first:]).sum(1)

    def _run(self, layer: int, passed: Tensor) -> Tensor:
        more, named = self._rest[layer]
        result = self._decoder.blocks[layer].layer(passed, *more, **named)
        found: Tensor = result[0] if isinstance(result, tuple) else result
        return found


def _mask(index_K: Tensor, tokens: int, width: int, position: int | None) -> Callable[[Tensor], Tensor]:
    """Return what zeroes unit `index_K[k]`, of `width` numbers, in row k, at one token or at all."""

    def act(values: Tensor) -> Tensor:
        split = values.reshape(len(index_K), tokens, -1, width).clone()
        row_K = torch.arange(len(index_K))
        if position is None:
            split[row_K, :, index_K] = 0.0
        else:
            split[row_K, position, index_K] = 0.0
        return split.reshape(values.shape)

    return act
