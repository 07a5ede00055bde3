# SPDX-License-Identifier: Apache-2.0
"""The mean context of every head of the predicted layers: what a skipped head leaves in its place.

In OPT that is free: the attention weights of a head sum to 1, so biases can take it (pass `fill_heads`).

Letters: L predicted layers, N sequences, T tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    Floats = npt.NDArray[np.float32]

PREFIX = "mean.heads."
"""Of the tensor's name, before the number of the model layer."""


def named(means: Mapping[int, Floats]) -> dict[str, Floats]:
    """Return the tensors by their names on disk, for model layer -> means [H,D]."""
    return {f"{PREFIX}{layer}": mean_HD for layer, mean_HD in means.items()}


def read(tensors: Mapping[str, npt.NDArray[Any]], layers: int) -> Floats | None:
    """Return the means of all layers [L,H,D]; None: there are none, as in predictors from before there were means.

    Raises:
        KeyError: only some layers have means.
        ValueError: their shapes differ.
    """
    names = [f"{PREFIX}{layer}" for layer in range(1, layers + 1)]
    return np.stack([tensors[name] for name in names]) if any(name in tensors for name in names) else None


def problems(means_LHD: Floats | None, heads: int) -> list[str]:
    """Return what is wrong with the means of a predictor of so many heads."""
    if means_LHD is None:
        return []
    if means_LHD.ndim != 3 or means_LHD.shape[1] != heads:
        return [f"the means of heads have shape {list(means_LHD.shape)}, expected [layers, {heads}, head size]"]
    return [] if np.isfinite(means_LHD).all() else ["a mean of a head is not finite"]


def head_means(
    model: Any,
    ids_NT: npt.NDArray[np.int64],
    positions: list[npt.NDArray[np.int64]],
    advance: Callable[[int, int, str], None] | None = None,
) -> dict[int, npt.NDArray[np.float32]]:
    """Return model layer -> mean context of its heads [H,D] at the given positions of every text.

    A text in which a context is not finite is left out of the means of all layers.

    Args:
        model: transformers' model.
        ids_NT: the texts.
        positions: of every text, those that count.
        advance: told how many texts are read.
    """
    import torch

    from shadowc.sparsity.families import decoder_of, watched

    decoder = decoder_of(model)
    layers = range(1, len(decoder.blocks))
    sums = {layer: torch.zeros(decoder.heads * decoder.head_size, dtype=torch.float64) for layer in layers}
    count = 0
    for number, (ids_T, position_M) in enumerate(zip(ids_NT, positions, strict=True), start=1):
        of_text: dict[int, Tensor] = {}
        with (
            torch.no_grad(),
            watched(*((decoder.blocks[layer].context, _add(of_text, layer, position_M)) for layer in layers)),
        ):
            decoder.model(input_ids=torch.from_numpy(ids_T)[None], use_cache=False, logits_to_keep=1)
        if all(bool(torch.isfinite(sum_K).all()) for sum_K in of_text.values()):
            for layer, sum_K in of_text.items():
                sums[layer] += sum_K
            count += len(position_M)
        if advance is not None:
            advance(number, len(ids_NT), "means")
    size = decoder.heads, decoder.head_size
    return {layer: (sum_K / max(count, 1)).float().numpy().reshape(size) for layer, sum_K in sums.items()}


def _add(sums: dict[int, Tensor], layer: int, position_M: npt.NDArray[np.int64]) -> Callable[[Tensor], None]:
    import torch

    def act(context_BTK: Tensor) -> None:
        sums[layer] = context_BTK[0, torch.from_numpy(position_M)].double().sum(0)

    return act
