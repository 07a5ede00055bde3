# SPDX-License-Identifier: Apache-2.0
"""Scores that no deployed predictor has: references for what one could reach, and what takes no training.

`oracle`: the criterion's true scores of every token, from the dense model and the text that follows: a bound for
predictors of this criterion, unless its scores have a sign: then they know the token to come, and a warning says so.
`prompt`: how strongly the units fire in the prompt, as GRIFFIN selects neurons (each token's activations scaled to
length 1, then the root of the sum of squares over the tokens); heads by the same rule.

Letters: Z masked tokens, S tokens, L predicted layers, H heads, D head size, F neurons, N units of neurons.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shadowc.sparsity.cluster import block_sums
from shadowc.sparsity.criteria import find_criterion
from shadowc.sparsity.families import decoder_of, watched
from shadowc.spec.errors import InputError, LookAheadWarning

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from shadowc.checkpoint.facts import ModelFacts
    from shadowc.eval.request import Request
    from shadowc.sparsity.predictor import Predictor

    Floats = npt.NDArray[np.float32]

REFERENCES = ("oracle", "prompt")
"""Measured where they are named only: oracle takes a backward pass of every text, prompt has one protocol."""
KEPT_ORACLE_BYTES = 1 << 30
"""Of true scores that are kept; a piece of work needs them once for each setting, and they cost a backward pass."""

TIE = np.float32(1e-30)
"""Distance of two units without importance: smaller than any importance."""


class Oracle:
    """True scores of requests, those last asked for kept: settings take turns on the requests of a piece of work.

    Warns (LookAheadWarning) where the criterion's scores have a sign.

    Args:
        model: transformers' model.
        facts: its sizes.
        predictor: whose criterion and units they are.
    """

    def __init__(self, model: Any, facts: ModelFacts, predictor: Predictor) -> None:
        self._model, self._facts, self._predictor = model, facts, predictor
        self._kept: OrderedDict[tuple[tuple[int, ...], int], tuple[Floats, Floats]] = OrderedDict()
        self._bytes = 0
        name = _criterion_of(predictor)
        if find_criterion(name).signed:
            warnings.warn(
                f"oracle of {name}: the sign of its scores knows the token to come, so its figures are no bound for "
                "any predictor; those of shadowc collect --criterion plainact have none",
                LookAheadWarning,
                stacklevel=2,
            )

    def scores(self, request: Request, first: int) -> tuple[Floats, Floats]:
        """Return `oracle_scores` of a request.

        Raises:
            InputError: see there.
        """
        key = request.ids, first
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        found = oracle_scores(self._model, self._facts, self._predictor, request, first)
        self._kept[key] = found
        self._bytes += _bytes(found)
        while self._bytes > KEPT_ORACLE_BYTES and len(self._kept) > 1:
            self._bytes -= _bytes(self._kept.popitem(last=False)[1])
        return found


def _bytes(pair: tuple[Floats, Floats]) -> int:
    return pair[0].nbytes + pair[1].nbytes


def _criterion_of(predictor: Predictor) -> str:
    return str(predictor.meta.get("criterion", "plainact"))


def oracle_scores(
    model: Any, facts: ModelFacts, predictor: Predictor, request: Request, first: int
) -> tuple[Floats, Floats]:
    """Return the true scores [Z,L,H] and [Z,L,N] of a request's input tokens from `first` on.

    Raises:
        InputError: the predictor's criterion has no score of a token, or a score is not finite.
    """
    from shadowc.sparsity.record import record_batch

    name = _criterion_of(predictor)
    criterion = find_criterion(name)
    if criterion.per != "token":
        raise InputError(
            f"criterion {name} has no score of a single token, so there is no oracle of it",
            hint="--methods predictor,static,normalised",
        )
    with torch.inference_mode(False):
        rows = record_batch(
            model,
            facts,
            criterion,
            np.asarray([request.ids], np.int64),
            [np.arange(first, len(request.ids) - 1)],
            predictor.means,
        )
    if rows.dropped:
        raise InputError(f"the oracle's scores are not finite: {next(iter(rows.dropped.values()))}")
    pairs = zip(rows.neurons_LMF[1:], predictor.orders_LF, strict=True)
    blocks = [block_sums(scores_ZF, order_F, predictor.block) for scores_ZF, order_F in pairs]
    return _ties_apart(rows.heads_MLH[:, 1:]), _ties_apart(np.stack(blocks, axis=1))


def _ties_apart(scores_ZLU: Floats) -> Floats:
    """Rank the zeros of a token one behind the other: most neurons do not fire, and ties at a threshold all stay."""
    layers, units = scores_ZLU.shape[1:]  # of no token too: a window may be dense as a whole
    behind_LU = -TIE * np.arange(1, layers * units + 1, dtype=np.float32).reshape(layers, units)
    return np.where(scores_ZLU == 0, behind_LU, scores_ZLU)


def prompt_scores(model: Any, predictor: Predictor | None, ids: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Return how strongly units fire in a prompt: heads [1,L,H] and units of neurons [1,L,N].

    Units are those of the predictor, nothing else is asked of it; without one they are single neurons.
    """
    decoder = decoder_of(model)
    later = decoder.blocks[1:]
    heads: list[Floats] = []
    neurons: list[Floats] = []

    def of_heads(context: Tensor) -> None:
        context_SHD = context.reshape(len(ids), decoder.heads, -1)
        heads.append(_strength(context_SHD.norm(dim=-1)))

    def of_neurons(hidden: Tensor) -> None:
        strength_F = _strength(hidden.reshape(len(ids), -1))
        if predictor is None:
            neurons.append(strength_F)
            return
        order_F = predictor.orders_LF[len(neurons)]
        neurons.append(np.sqrt(block_sums(strength_F[None] ** 2, order_F, predictor.block))[0])

    sites = [(block.context, of_heads) for block in later] + [(block.hidden, of_neurons) for block in later]
    with watched(*sites):
        model(input_ids=torch.tensor([ids]), use_cache=False)
    return _ties_apart(np.stack(heads)[None]), _ties_apart(np.stack(neurons)[None])


def _strength(values_SU: Tensor) -> Floats:
    """Scale every token's values to length 1 and return each unit's length over the tokens, [U]."""
    scaled_SU = values_SU / values_SU.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    strength_U: Floats = scaled_SU.norm(dim=0).numpy()
    return strength_U
