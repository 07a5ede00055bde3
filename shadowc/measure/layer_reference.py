# SPDX-License-Identifier: Apache-2.0
"""One decoder layer in torch, with the engine's own masks forced: the truth for parity layer by layer.

Letters: B batch, S tokens, E hidden, H heads, D head size, F neurons.
"""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from shadowc.checkpoint.opt import OptFacts, config_dict
from shadowc.measure.masks import relative, worse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from shadowc.spec.program import TensorSource


class LayerReference:
    """Transformers' OPTDecoderLayer with the weights of one layer, causal, without a cache.

    Args:
        facts: the model's sizes.
        source: float32 tensors by canonical parameter name.
        layer: model layer, 0 to layers - 1.
    """

    def __init__(self, facts: OptFacts, source: TensorSource, layer: int) -> None:
        from transformers import OPTConfig
        from transformers.models.opt.modeling_opt import OPTDecoderLayer

        config = OPTConfig(**{**config_dict(facts), "attn_implementation": "eager"})
        with torch.device("meta"):
            self._module = OPTDecoderLayer(config, layer_idx=layer).eval()
        prefix = f"model.decoder.layers.{layer}."
        state = {name: torch.from_numpy(source.tensor(prefix + name)) for name in self._module.state_dict()}
        self._module.load_state_dict(state, assign=True)
        self.stored_difference = 0.0
        """The most that stored keys and values were off beyond the rounding of their type, of the largest of them."""

    def run(
        self,
        x_BSE: Tensor,
        head_mask_BSH: Tensor,
        neuron_mask_BSF: Tensor,
        stored: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        """Output [B,S,E] for residual input x, with inactive units set to zero.

        Masks are bool in checkpoint order; all true means dense. `stored` ("key", "value" [B,S,H,D]) is what a cache
        holds: attention attends to it in place of its own, and `stored_difference` says how far it is off.
        """

        def drop_neurons(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (torch.where(neuron_mask_BSF.reshape(args[0].shape), args[0], 0.0),)

        return self._forward(
            x_BSE,
            {self._module.self_attn.out_proj: partial(_without_heads, head_mask_BSH), self._module.fc2: drop_neurons},
            stored,
        )

    def context(self, x_BSE: Tensor, stored: Mapping[str, Tensor] = MappingProxyType({})) -> Tensor:
        """Attention context [B,S,E] before out_proj, all heads computed: the predictor's input if this is layer 0."""
        seen: list[Tensor] = []
        self._forward(x_BSE, {self._module.self_attn.out_proj: lambda _, args: seen.append(args[0])}, stored)
        return seen[0].reshape(x_BSE.shape)

    def ffn_input(
        self, x_BSE: Tensor, head_mask_BSH: Tensor, stored: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Tensor:
        """What fc1 reads [B,S,E] when inactive heads are zero: the input of a neuron predictor of style shadow+."""
        seen: list[Tensor] = []
        self._forward(
            x_BSE,
            {
                self._module.self_attn.out_proj: partial(_without_heads, head_mask_BSH),
                self._module.fc1: lambda _, args: seen.append(args[0]),
            },
            stored,
        )
        return seen[0].reshape(x_BSE.shape)

    def _forward(
        self, x_BSE: Tensor, before: Mapping[torch.nn.Module, Callable[..., Any]], stored: Mapping[str, Tensor]
    ) -> Tensor:
        """Runs the layer, with a function called before each of the given parts."""
        tokens = x_BSE.shape[1]
        causal_11SS = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]
        hooks = [part.register_forward_pre_hook(act) for part, act in before.items()]
        hooks += [
            getattr(self._module.self_attn, f"{kind[0]}_proj").register_forward_hook(partial(self._attend_to, array))
            for kind, array in stored.items()
        ]
        try:
            with torch.no_grad():
                found = self._module(x_BSE, attention_mask=causal_11SS)
        finally:
            for hook in hooks:
                hook.remove()
        result: Tensor = found[0] if isinstance(found, tuple) else found  # transformers 5.0 gives a tuple
        return result

    def _attend_to(
        self, stored_BSHD: Tensor, _: torch.nn.Module, __: tuple[Tensor, ...], projected_BSE: Tensor
    ) -> Tensor:
        """Puts what a cache holds in the place of keys or values, and notes how far it is from their rounding."""
        stored_BSE = stored_BSHD.reshape(projected_BSE.shape)
        self.stored_difference = worse(self.stored_difference, beyond_rounding(stored_BSE, projected_BSE))
        return stored_BSE.to(projected_BSE.dtype)


def _without_heads(head_mask_BSH: Tensor, _: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    """The context with inactive heads set to zero."""
    context_BSHD = args[0].reshape(*head_mask_BSH.shape, -1)
    return (torch.where(head_mask_BSH[..., None], context_BSHD, 0.0).reshape(args[0].shape),)


def beyond_rounding(stored: Tensor, exact: Tensor) -> float:
    """The most that stored values are off beyond the rounding of their type, of the largest exact one; equal shapes."""
    grid = torch.finfo(stored.dtype)
    rounding = exact.abs() * (grid.eps / 2) + grid.smallest_normal * grid.eps / 2
    beyond = ((stored - exact).abs() - rounding).clamp(min=0).max().item()
    return relative(beyond, exact.abs().max().item())
