# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch: requests side by side, the state that several share, and how many units their tokens computed.

Letters: B rows, S tokens, Z the last of them from the first masked token of any row on, L predicted layers, N units.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shadowc.sparsity.reference import MaskedState

if TYPE_CHECKING:
    from torch import Tensor

    from shadowc.sparsity.reference import MaskedResult

Counted = tuple[int, float, float]
"""Masked tokens, and the sums over them of the shares of active heads and neurons."""


def padded(rows: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    """Return rows of ids as one tensor [B,S], filled up behind their ends."""
    ids_BS = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids_BS[index, : len(row)] = torch.from_numpy(row)
    return ids_BS


def repeated(state: MaskedState, count: int) -> MaskedState:
    """Return a copy of a state of one row with as many rows as there are continuations; the kept one stays."""
    cache = copy.deepcopy(state.cache)
    cache.batch_repeat_interleave(count)
    end = None if state.prompt_end is None else state.prompt_end.expand(count, -1).clone()
    return MaskedState(cache, end)


def active(result: MaskedResult, ones_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares of active heads and neurons of every token, [B,S]."""
    shares = []
    for mask_BZLN in (result.mask_heads, result.mask_neurons):
        share_BS = ones_BS.clone()
        share_BS[:, ones_BS.shape[1] - mask_BZLN.shape[1] :] = _share_of_each(mask_BZLN)
        shares.append(share_BS)
    return shares[0], shares[1]


def _share_of_each(mask_BZLN: Tensor) -> Tensor:
    """Return the share of a token's units that are active, [B,Z]; numpy counts bools five times as fast as torch."""
    units = math.prod(mask_BZLN.shape[2:])
    return torch.from_numpy(np.count_nonzero(mask_BZLN.flatten(2).numpy(), axis=2)).float() / units


def counted(heads_S: Tensor, neurons_S: Tensor, before: Counted = (0, 0.0, 0.0)) -> Counted:
    """Add the masked tokens of a row to those counted before."""
    tokens, heads, neurons = before
    return tokens + len(heads_S), heads + float(heads_S.double().sum()), neurons + float(neurons_S.double().sum())
