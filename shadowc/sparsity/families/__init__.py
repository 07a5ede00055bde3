# SPDX-License-Identifier: Apache-2.0
"""Families of models: each is one file that says where attention contexts, neurons and their weights are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from shadowc.checkpoint.llama import MODEL_TYPE, LlamaFacts
from shadowc.checkpoint.llama import config_dict as llama_config
from shadowc.checkpoint.opt import config_dict as opt_config
from shadowc.sparsity.families.decoder import Act, Block, Decoder, Site, UnitWeights, watched
from shadowc.sparsity.families.llama import llama_decoder
from shadowc.sparsity.families.opt import opt_decoder
from shadowc.spec.errors import UnsupportedError

if TYPE_CHECKING:
    from shadowc.checkpoint.facts import ModelFacts

__all__ = ["Act", "Block", "Decoder", "Site", "UnitWeights", "decoder_of", "empty_model", "restore_buffers", "watched"]

FAMILIES: Mapping[str, Callable[[Any], Decoder]] = MappingProxyType({"opt": opt_decoder, "llama": llama_decoder})
"""transformers' model_type -> what makes a `Decoder` of such a model."""


def decoder_of(model: Any) -> Decoder:
    """Return the places and weights of the units of a model.

    Args:
        model: transformers' model for causal language modelling.

    Raises:
        UnsupportedError: a model of another family.
    """
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    if kind not in FAMILIES:
        raise UnsupportedError(
            f"models of type {kind!r} are not handled; handled are {', '.join(sorted(FAMILIES))}",
            hint="docs/architecture.md says what a family has to tell",
        )
    return FAMILIES[kind](model)


def empty_model(facts: ModelFacts) -> Any:
    """Return transformers' model of this shape with eager attention, its weights as torch makes them."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    if isinstance(facts, LlamaFacts):
        return LlamaForCausalLM(LlamaConfig(**llama_config(facts), attn_implementation="eager"))
    return OPTForCausalLM(OPTConfig(**opt_config(facts), attn_implementation="eager"))


def restore_buffers(model: Any) -> None:
    """Compute what is neither stored nor a parameter: the frequencies of rotary positions."""
    if model.config.model_type == MODEL_TYPE:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
