# SPDX-License-Identifier: Apache-2.0
"""Criteria that rank the units once for a whole text: what they compare is kept until the text is read.

Memory is bounded: at most `SEQUENCES` sequences, spread evenly over the text, and of their recorded positions as many
as fit into `KEPT_BYTES`, as many of every sequence as of any other, but for one.

Letters: N sequences, B of one batch, M recorded positions of a batch, R kept positions, L layers, H heads, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shadowc.sparsity.families import Decoder, decoder_of
from shadowc.sparsity.record import stream_signals
from shadowc.sparsity.signals import LayerSignals, TextSample
from shadowc.sparsity.whole import weights_by_unit
from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.sparsity.criteria import Criterion

SEQUENCES = 64
KEPT_BYTES = 1 << 30
LEAST_POSITIONS = 4
"""Of a sequence, however large the model."""

Ranking = tuple["npt.NDArray[np.float32] | None", "npt.NDArray[np.float32] | None"]
"""Heads [L,H] and neurons [L,F]; None: the formula does not exist for this kind."""


class TextRows:
    """Gathers what layers did at some positions, batch after batch."""

    def __init__(self, decoder: Decoder, seed: int, *, gradients: bool = True, activations: bool = True) -> None:
        self._decoder = decoder
        self._seed = seed
        self._gradients = gradients
        self._activations = activations
        self._sequences: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._kept: list[dict[str, list[Tensor]]] = [{"a": [], "u": [], "g": []} for _ in decoder.blocks]

    def begin(self, sequence_M: Tensor, label_M: Tensor) -> None:
        """Tell of which sequences the next positions are, and the tokens after them."""
        self._sequences.append(sequence_M)
        self._labels.append(label_M)

    def add(self, layer: int, signals: LayerSignals, row_M: Tensor, position_M: Tensor) -> None:
        """Keep one layer's signals at positions of a batch."""
        kept = self._kept[layer]
        if self._activations:
            kept["a"].append(signals.context_BTHD[row_M, position_M])
            kept["u"].append(signals.preactivation_BTF[row_M, position_M])
        if self._gradients:
            kept["g"].append(signals.gradients()[0][row_M, position_M])

    def samples(self, *, weights: bool = True) -> Iterator[TextSample]:
        """Give what was gathered, layer by layer."""
        for layer, (kept, block) in enumerate(zip(self._kept, self._decoder.blocks, strict=True)):
            a, u, g = (torch.cat(kept[name]) if kept[name] else None for name in ("a", "u", "g"))
            yield TextSample(
                layer=layer,
                heads=self._decoder.heads,
                neurons=self._decoder.neurons,
                seed=self._seed,
                sequence_R=_joined(self._sequences),
                label_R=_joined(self._labels),
                context_RHD=a,
                preactivation_RF=u,
                context_gradient_RHD=g,
                weights=weights_by_unit(block) if weights else None,
            )


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def rank_text(
    model: Any,
    criterion: Criterion,
    ids_NT: npt.NDArray[np.int64],
    positions: Sequence[npt.NDArray[np.int64]],
    batch: int,
    seed: int,
    advance: Callable[[int, int, str], None] = lambda done, total, unit: None,
) -> Ranking:
    """Rank the units of all layers by a criterion that is per text.

    Args:
        model: transformers' model.
        criterion: its `per` is "text".
        ids_NT: the text.
        positions: of every sequence, those recorded.
        batch: sequences that run at once.
        seed: of draws that a criterion makes.
        advance: told how many sequences were read.

    Raises:
        InputError: a score is not finite, or the text says too little.
    """
    decoder = decoder_of(model)
    rows = TextRows(decoder, seed, gradients=criterion.gradients, activations=criterion.activations)
    chosen_N = chosen_sequences(len(ids_NT) if criterion.activations else 0)
    each = positions_each(decoder, len(chosen_N))
    for at in range(0, len(chosen_N), batch):
        part = chosen_N[at : at + batch]
        kept = [positions[n][:: max(-(-len(positions[n]) // each), 1)] for n in part]
        row_M = torch.from_numpy(np.repeat(np.arange(len(part)), [len(some) for some in kept]))
        position_M = torch.from_numpy(np.concatenate(kept))
        ids_BT = torch.from_numpy(ids_NT[part])
        rows.begin(row_M + at, ids_BT[row_M, position_M + 1])
        _read(decoder, rows, ids_BT, row_M, position_M, criterion.gradients)
        advance(at + len(part), len(chosen_N), "sequences")
    pairs = [text_scores(criterion, sample) for sample in rows.samples(weights=criterion.weights)]
    heads, neurons = zip(*pairs, strict=True)
    return _stacked(heads), _stacked(neurons)


def _read(decoder: Decoder, rows: TextRows, ids_BT: Tensor, row_M: Tensor, position_M: Tensor, gradients: bool) -> None:
    def give(layer: int, signals: LayerSignals) -> None:
        rows.add(layer, signals, row_M, position_M)

    stream_signals(decoder, ids_BT, give, gradients=gradients)


def chosen_sequences(count: int) -> npt.NDArray[np.int64]:
    """Return at most `SEQUENCES` of `count` sequences, spread evenly."""
    wanted = min(count, SEQUENCES)
    return np.arange(wanted) * count // max(wanted, 1)


def positions_each(decoder: Decoder, sequences: int) -> int:
    """Return how many positions of each sequence are kept within `KEPT_BYTES`."""
    each = 4 * len(decoder.blocks) * (2 * decoder.heads * decoder.head_size + decoder.neurons)
    return max(KEPT_BYTES // (each * max(sequences, 1)), LEAST_POSITIONS)


def text_scores(criterion: Criterion, sample: TextSample) -> tuple[Tensor | None, Tensor | None]:
    """Score one layer.

    Raises:
        InputError: a score is not finite, or the text says too little.
    """
    heads, neurons = criterion.score(sample)
    for kind, values in (("head", heads), ("neuron", neurons)):
        if values is not None and not bool(torch.isfinite(values).all()):
            unit = int(torch.nonzero(~torch.isfinite(values))[0])
            raise InputError(
                f"criterion {criterion.name}: the score of {kind} {unit} in layer {sample.layer} is not finite",
                hint="check the checkpoint for NaN and Inf, or collect more --positions",
            )
    return heads, neurons


def _stacked(of_layers: Sequence[Tensor | None]) -> npt.NDArray[np.float32] | None:
    found = [values.float().numpy() for values in of_layers if values is not None]
    return np.stack(found) if len(found) == len(of_layers) else None
