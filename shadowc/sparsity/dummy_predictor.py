# SPDX-License-Identifier: Apache-2.0
"""A predictor of random numbers: what an engine costs does not depend on what its predictor has learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shadowc.sparsity import shares
from shadowc.sparsity.networks import LayerNetworks, Network, blocks_of, default_width, widths
from shadowc.sparsity.predictor import Networks, Predictor

if TYPE_CHECKING:
    from shadowc.checkpoint.facts import ModelFacts
    from shadowc.spec.options import Fill, Style

SMALL = 0.02
"""Standard deviation of a random mean."""


def dummy_predictor(facts: ModelFacts, block: int, width: int, seed: int, style: Style, fill: Fill) -> Predictor:
    """See `Predictor.dummy`."""
    width = width or default_width(facts, block, style)
    generator = np.random.default_rng([seed, 2])
    layers = facts.layers - 1
    orders = [generator.permutation(facts.ffn) if block > 1 else np.arange(facts.ffn) for _ in range(layers)]

    def networks(units: int, wide: int) -> Networks:
        if style == "shadow":
            return Network.random(generator, facts.hidden, wide, layers * units)
        sizes, linear = (facts.hidden, wide, units), style == "shadow+"
        return LayerNetworks(tuple(Network.random(generator, *sizes, linear=linear) for _ in range(layers)))

    wide = widths(facts, block, width, style)
    even = shares.even_shares(layers)
    heads, neurons = networks(facts.heads, wide[0]), networks(blocks_of(facts.ffn, block), wide[1])
    size = (layers, facts.heads, facts.head_size)
    means_LHD = generator.normal(0, SMALL, size).astype(np.float32) if fill == "mean" else None
    return Predictor(
        heads=heads,
        neurons=neurons,
        layers=layers,
        block=block,
        orders_LF=np.stack(orders).astype(np.int32),
        meta={"origin": "dummy", "seed": seed, "model": {"name": facts.name, "identity": ""}},
        shares=(even, even) if style == "shadow+" else None,
        means_LHD=means_LHD,
    )
