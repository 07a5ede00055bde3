# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of tokens from logits, in float64, and what is said where they are no numbers.

Letters: S tokens, R some of them, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    from shadowc.eval.request import Outcome, Setting

ROWS_AT_ONCE = 16
"""Rows of logits that are widened to float64 together: so many of a large vocabulary stay in a cache."""


def log_likelihood(logits_SV: npt.NDArray[np.float32], ids_S: npt.NDArray[np.int64]) -> tuple[float, bool]:
    """Return the sum of log p(token) in nats, and whether every token is the most likely one.

    The sum of finite logits is finite; of others it is NaN or infinite, which `refuse_not_finite` finds.
    """
    import torch  # its exponentials use all threads

    nats, greedy = 0.0, True
    for at in range(0, len(ids_S), ROWS_AT_ONCE):
        ids_R = torch.from_numpy(ids_S[at : at + ROWS_AT_ONCE])
        wide_RV = torch.from_numpy(logits_SV[at : at + ROWS_AT_ONCE]).double()
        greedy = greedy and bool((wide_RV.argmax(dim=1) == ids_R).all())
        chosen_R = wide_RV.gather(1, ids_R[:, None])[:, 0]
        nats += float((chosen_R - wide_RV.logsumexp(dim=1)).sum())
    return nats, greedy


def not_finite(outcomes: Sequence[Outcome]) -> list[int]:
    """Return the numbers of the answers that are no numbers."""
    return [number for number, outcome in enumerate(outcomes) if not math.isfinite(outcome.log_probability)]


def refuse_not_finite(name: str, setting: Setting, outcomes: Sequence[Outcome], place: Callable[[int], str]) -> None:
    """Refuse answers that are no numbers: the likeliest of NaNs is the first choice, which would pass for an answer.

    Args:
        name: of the model.
        setting: whose answers they are.
        outcomes: of requests.
        place: says where the request of a number is.

    Raises:
        InputError: the logits of a request were not finite; the first one is named.
    """
    wrong = not_finite(outcomes)
    if not wrong:
        return
    if setting.dense:
        masks, hint = "without masks; its weights may be damaged", "check the checkpoint"
    else:
        density = f"{setting.density.heads:g}/{setting.density.neurons:g}"
        masks = f"under masks of method {setting.method} at density {density}, protocol {setting.protocol}"
        hint = "leave this density out of --densities, or the method out of --methods"
    raise InputError(f"the logits of {name} are not finite in {place(wrong[0])}, {masks}", hint=hint)
