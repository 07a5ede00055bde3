# SPDX-License-Identifier: Apache-2.0
"""Names of an engine graph's tensors by which several stages know them."""

from __future__ import annotations

import re
from collections.abc import Iterable

LOGITS_FROM = "logits_from"
"""Input [1] of target cpu: the first new token whose logits are computed; below 0 it counts from the end."""
MASK = "attention_mask"
"""Input [B,P]: 0 for padding."""
PAST, START = "past", "start"
"""Slots of the cache that are filled, and the first of them that is no padding, [B]."""
TOKEN = "slot.clipped"
"""Which token of its sequence each new token is, from 0 on; -1 for padding, [B,S]."""
TAIL = "tail"
"""How many of the new tokens, the last ones, are masked, [1]."""
COUNTED = ("active.heads", "active.neurons", "read")
"""Outputs that statistics are made of."""
RUNS, BANNED, END, NEXT = "runs", "banned", "end", "next_ids"
"""Of a graph that may compute several tokens in one call: for how many there is room and how many there are, [2]; an id
that is not chosen, and the one behind which there are none, [1], -1 for no id; the ids that came out, [B * room,1]."""
_OF_ONE_LAYER = re.compile(r"scores\.(heads|neurons)\.(\d+)")
_ROW = re.compile(r"((?:shares|limits)\.(?:heads|neurons))\.of_layers")


def scores_of_one_layer(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Tensor -> kind and model layer, of the scores that one layer alone obeys; empty where all layers share theirs."""
    found = ((name, _OF_ONE_LAYER.fullmatch(name)) for name in names)
    return {name: (match[1], int(match[2])) for name, match in found if match is not None}


def rows_of_tables(names: Iterable[str]) -> dict[str, str]:
    """Tensor -> table [GRID + 1,L] of which it is the rows [B,L] that a density of its kind asks for."""
    found = ((name, _ROW.fullmatch(name)) for name in names)
    return {name: match[1] for name, match in found if match is not None}
