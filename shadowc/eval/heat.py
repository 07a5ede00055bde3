# SPDX-License-Identifier: Apache-2.0
"""How often the predictor and the truth choose each unit: maps of layers and units, with their difference.

Both choose by protocol `decode` at the same density and scope: the predictor as deployed, the truth as method `oracle`,
without units of no importance: where most neurons do not fire it has fewer than the density asks for.

Letters: Z masked tokens of a request, L predicted layers, N units of a kind, C cells (neighbouring units share one).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shadowc.measure.mask_map import cells
from shadowc.spec.density import UNIT_KINDS, Density

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.eval.corpus import Corpus, Described
    from shadowc.eval.model import EvaluatedModel
    from shadowc.eval.request import Request, Setting

    Floats = npt.NDArray[np.float64]

TOKENS = 2048
"""Masked tokens that are counted, at least, where the corpus has as many."""
CELLS = 64
"""Across, at most."""
METHODS = ("predictor", "oracle")


@dataclass(frozen=True, slots=True)
class HeatMap:
    """One kind of unit at one density."""

    density: Density
    scope: str
    """As in the setting: empty where it is the predictor's own."""
    kind: str
    tokens: int
    predicted: Floats
    """Share of the tokens in which the units of a cell were chosen by the predictor, [L,C]."""
    true: Floats
    """The same by the truth."""

    @property
    def difference(self) -> Floats:
        """How much more often the predictor chose them."""
        return self.predicted - self.true


def asked(settings: Sequence[Setting]) -> list[tuple[Setting, Setting]]:
    """Settings of the predictor, each with that of the truth, where there are both."""
    predicted, true = METHODS
    own = [one for one in settings if one.method == predicted and not one.unmasked]
    return [(one, replace(one, method=true)) for one in own if replace(one, method=true) in settings]


def heat_maps(model: EvaluatedModel, corpus: Corpus, pairs: Sequence[tuple[Setting, Setting]]) -> tuple[HeatMap, ...]:
    """Count the choices of both on the first requests of a corpus; heads of every pair, then its neurons.

    There are none where no token is masked.

    Raises:
        InputError, UnsupportedError: the model has no masks of a setting.
    """
    requests = list(_requests(corpus, pairs))
    if not requests:
        return ()
    sums: dict[tuple[int, int, int], Floats] = {}
    tokens = [0] * len(pairs)
    for request in requests:  # settings take turns: the truth of a request is kept
        for number, pair in enumerate(pairs):
            for side, setting in enumerate(pair):
                masks = model.masks(request, setting)
                for kind, mask_ZLN in enumerate(masks):
                    key = number, side, kind
                    sums[key] = sums.get(key, 0.0) + mask_ZLN.sum(axis=0, dtype=np.float64)
            tokens[number] += len(masks[0])
    return tuple(
        HeatMap(
            pair[0].density,
            pair[0].scope,
            name,
            tokens[number],
            *(cells(sums[number, side, kind] / tokens[number], CELLS) for side in range(2)),
        )
        for number, pair in enumerate(pairs)
        for kind, name in enumerate(UNIT_KINDS)
    )


def _requests(corpus: Corpus, pairs: Sequence[tuple[Setting, Setting]]) -> Iterator[Request]:
    """Give the first requests that have masked tokens, until there are TOKENS of them."""
    found = 0
    for request in (one for item in corpus.items for one in item.requests):
        masked = min(len(request.ids) - 1 - setting.dense_tokens(request) for setting, _ in pairs)
        if masked > 0:
            yield request
            found += masked
        if found >= TOKENS:
            return


def key_of(corpus: Described, pairs: Sequence[tuple[Setting, Setting]]) -> str:
    """Equal where the maps of one model are."""
    text = f"{corpus.key} {TOKENS} {CELLS} {' '.join(setting.key for pair in pairs for setting in pair)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(path: Path, key: str, corpus: Corpus, maps: Sequence[HeatMap]) -> None:
    """Write the data behind the picture."""
    content = {
        "key": key,
        "corpus": corpus.name,
        "sha256": corpus.sha256,
        "maps": [
            {
                "head_density": one.density.heads,
                "neuron_density": one.density.neurons,
                "scope": one.scope,
                "kind": one.kind,
                "tokens": one.tokens,
                "predicted": one.predicted.tolist(),
                "true": one.true.tolist(),
                "difference": one.difference.tolist(),
            }
            for one in maps
        ],
    }
    path.write_text(json.dumps(content) + "\n", "utf-8")


def read(path: Path, key: str) -> tuple[HeatMap, ...] | None:
    """Read what `write` left; None if it is not there, damaged, or of something else."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["key"] != key:
            return None
        return tuple(
            HeatMap(
                Density(one["head_density"], one["neuron_density"]),
                one["scope"],
                one["kind"],
                one["tokens"],
                np.array(one["predicted"]),
                np.array(one["true"]),
            )
            for one in content["maps"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
