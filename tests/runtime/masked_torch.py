# SPDX-License-Identifier: Apache-2.0
"""The masked torch model under transformers' own generation, without a cache: the judge of the engine's adapter.

Every call computes the whole text anew, so that nothing has to be reordered or carried along.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationMixin, OPTForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from shadowc.sparsity.reference import MaskedModel
from shadowc.spec.density import Density
from shadowc.spec.program import SparsityPlan
from tests.emit import engines, handmade


class HandmadePredictor:
    """The predictor of the engines in `tests.emit.engines`."""

    def tensors(self) -> dict[str, np.ndarray]:
        named = handmade.predictor_tensors(engines.tiny_facts(), engines.BLOCK)
        return {name.removeprefix("predictor."): value for name, value in named.items()}


class MaskedTorch(PreTrainedModel, GenerationMixin):
    """`prompt` slots are dense, all later tokens masked."""

    def __init__(
        self, model: OPTForCausalLM, density: Density, granularity: Literal["token", "sequence"] = "token"
    ) -> None:
        super().__init__(model.config)
        self.masked = MaskedModel(model, SparsityPlan(0, 0, engines.BLOCK, "global", ()), HandmadePredictor())
        self.density, self.granularity, self.prompt = density, granularity, 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def generate(self, inputs: Tensor, **named: Any) -> Any:
        self.prompt = inputs.shape[1]
        return super().generate(inputs, use_cache=False, **named)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutputWithPast:
        found = self.masked.logits(
            input_ids, attention_mask, density=self.density, masked_from=self.prompt, granularity=self.granularity
        )
        return CausalLMOutputWithPast(logits=found.logits)
