# SPDX-License-Identifier: Apache-2.0
"""Dummy weights whose fc1 biases are lowered, layer by layer, until a given share of the ReLU outputs is zero.

Each layer gets one number: the quantile of its pre-activations over sampled tokens, measured in torch with the
layers in front of it lowered already. One layer is in memory at a time.

Letters: B sequences, S tokens, E hidden, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from shadowc.checkpoint.opt import EMBEDDING, POSITIONS, OptFacts, config_dict, layer_names

if TYPE_CHECKING:
    from shadowc.spec.program import TensorSource

SEQUENCES, TOKENS = 4, 64
"""Random tokens over which the pre-activations are measured."""
_LOWEST_TOKEN = 4
"""Ids below are OPT's special tokens."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """A TensorSource whose fc1 biases are lower by one number per layer."""

    source: TensorSource
    by_name: Mapping[str, float]
    """Name of an fc1 bias -> what is subtracted from all of its entries."""

    def names(self) -> tuple[str, ...]:
        """As the source's."""
        return self.source.names()

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """One tensor, lowered if it is an fc1 bias."""
        tensor = self.source.tensor(name)
        return tensor - np.float32(self.by_name[name]) if name in self.by_name else tensor


@torch.inference_mode()
def lower(facts: OptFacts, source: TensorSource, zeros: float, seed: int = 0) -> Lowered:
    """Find how far each layer's fc1 biases have to go down for a share `zeros` of its ReLU outputs to be zero.

    Args:
        facts: the model's sizes.
        source: float32 tensors by canonical name.
        zeros: the share, over all neurons of a layer and the sampled tokens; above 0 and below 1.
        seed: of the sampled tokens.
    """
    if not 0.0 < zeros < 1.0:
        raise ValueError(f"zeros is {zeros}, expected a share above 0 and below 1")
    by_name: dict[str, float] = {}
    x_BSE = _embedded(facts, source, seed)
    for layer in range(facts.layers):
        module = _layer(facts, source, layer)

        def lowered(_: torch.nn.Module, __: object, u: torch.Tensor, name: str = layer_names(layer).fc1.bias) -> object:
            by_name[name] = _quantile(u, zeros)
            return u - by_name[name]

        module.get_submodule("fc1").register_forward_hook(lowered)
        tokens = x_BSE.shape[1]
        causal_11SS = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]
        x_BSE = module(x_BSE, attention_mask=causal_11SS)
    return Lowered(source, by_name)


def _quantile(values: torch.Tensor, share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    flat = values.flatten()
    return float(flat.kthvalue(max(1, min(round(share * flat.numel()), flat.numel()))).values)


def _embedded(facts: OptFacts, source: TensorSource, seed: int) -> torch.Tensor:
    tokens = min(TOKENS, facts.positions)
    ids_BS = np.random.default_rng(seed).integers(_LOWEST_TOKEN, facts.vocab, (SEQUENCES, tokens))
    embedded_BSE = source.tensor(EMBEDDING)[ids_BS]
    positions_SE = source.tensor(POSITIONS)[facts.position_offset : facts.position_offset + tokens]
    return torch.from_numpy(embedded_BSE + positions_SE)


def _layer(facts: OptFacts, source: TensorSource, layer: int) -> torch.nn.Module:
    from transformers import OPTConfig
    from transformers.models.opt.modeling_opt import OPTDecoderLayer

    config = OPTConfig(**{**config_dict(facts), "attn_implementation": "eager"})
    with torch.device("meta"):
        module: torch.nn.Module = OPTDecoderLayer(config, layer_idx=layer).eval()
    prefix = f"model.decoder.layers.{layer}."
    state = {name: torch.from_numpy(source.tensor(prefix + name)) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    return module
