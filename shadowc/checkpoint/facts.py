# SPDX-License-Identifier: Apache-2.0
"""The facts of a model of any family: what the predictor, the criteria and the masked torch model need to know.

Every family has these: name, family, layers, predicted_layers, hidden, heads, head_size, ffn, vocab, positions, bos,
eos, pad, and what its units weigh: head_values, neuron_values, kept_values, token_parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from shadowc.checkpoint import llama, opt
from shadowc.checkpoint.llama import LlamaFacts
from shadowc.checkpoint.opt import OptFacts

ModelFacts: TypeAlias = OptFacts | LlamaFacts


def facts_of(stored: Mapping[str, Any]) -> ModelFacts:
    """Return the facts that `dataclasses.asdict` wrote.

    Raises:
        TypeError: fields are missing, or there are unknown ones, or a size is no number.
    """
    facts = LlamaFacts(**stored) if "kv_heads" in stored else OptFacts(**stored)
    wrong = [
        field.name for field in fields(facts) if field.type == "int" and type(stored.get(field.name, 0)) is not int
    ]
    if wrong:
        raise TypeError(f"no whole numbers: {', '.join(wrong)}")
    return facts


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """The parameters of one model, by the names that transformers gives them."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of every parameter, sorted by name; a tied head is left out."""
    embedding: str
    head: str
    tied: bool
    """True: the head is the same tensor as the embedding."""
    is_buffer: Callable[[str], bool]
    """Whether a tensor of this name is no parameter and may be ignored."""


def layout_of(facts: ModelFacts) -> WeightLayout:
    """Return names and shapes of all parameters of a model."""
    if isinstance(facts, LlamaFacts):
        shapes = llama.parameter_shapes(facts)
        return WeightLayout(shapes, llama.EMBEDDING, llama.HEAD, facts.tied, llama.is_known_buffer)
    return WeightLayout(opt.parameter_shapes(facts), opt.EMBEDDING, opt.HEAD, True, opt.is_known_buffer)
