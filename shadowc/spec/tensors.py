# SPDX-License-Identifier: Apache-2.0
"""Names of an engine graph's tensors by which several stages know them."""

from __future__ import annotations

import re
from collections.abc import Iterable

LOGITS_FROM = "logits_from"
"""Input [1] of target cpu: the first new token whose logits are computed; below 0 it counts from the end."""
_OF_ONE_LAYER = re.compile(r"scores\.(heads|neurons)\.(\d+)")


def scores_of_one_layer(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Tensor -> kind and model layer, of the scores that one layer alone obeys; empty where all layers share theirs."""
    found = ((name, _OF_ONE_LAYER.fullmatch(name)) for name in names)
    return {name: (match[1], int(match[2])) for name, match in found if match is not None}
