# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of tokens from logits, in float64.

Letters: S tokens, R some of them, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ROWS_AT_ONCE = 64
"""Rows of logits that are widened to float64 together: a window of a large vocabulary is big enough once."""


def log_likelihood(logits_SV: npt.NDArray[np.float32], ids_S: npt.NDArray[np.int64]) -> tuple[float, bool]:
    """Return the sum of log p(token) in nats, and whether every token is the most likely one."""
    nats, greedy = 0.0, True
    for at in range(0, len(ids_S), ROWS_AT_ONCE):
        ids_R = ids_S[at : at + ROWS_AT_ONCE]
        wide_RV = logits_SV[at : at + ROWS_AT_ONCE].astype(np.float64)
        greedy = greedy and bool((wide_RV.argmax(axis=1) == ids_R).all())
        chosen_R = wide_RV[np.arange(len(wide_RV)), ids_R]
        top_R1 = wide_RV.max(axis=1, keepdims=True)
        chosen_R -= top_R1[:, 0]
        wide_RV -= top_R1
        np.exp(wide_RV, out=wide_RV)
        nats += float((chosen_R - np.log(wide_RV.sum(axis=1))).sum())
    return nats, greedy
