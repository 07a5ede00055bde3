# SPDX-License-Identifier: Apache-2.0
"""Llama-type models as a `Decoder`.

A head is a query head: its rows of q_proj and its columns of o_proj. Keys and values are shared by a group of query
heads and belong to none of them. A neuron is its rows of gate_proj and up_proj and its column of down_proj; its value
is silu(gate) * up, which down_proj reads, and which stands for u too (`LayerSignals`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from shadowc.sparsity.families.decoder import Block, Decoder, Site, unit_weights


def llama_decoder(model: Any) -> Decoder:
    """Return where things are in transformers' LlamaForCausalLM."""
    config = model.config
    heads, neurons = config.num_attention_heads, config.intermediate_size

    def finish(last_BSE: Tensor) -> Tensor:
        logits: Tensor = model.lm_head(model.model.norm(last_BSE))
        return logits

    return Decoder(
        model=model,
        heads=heads,
        head_size=config.head_dim,
        neurons=neurons,
        blocks=tuple(_block(layer, number, heads, neurons) for number, layer in enumerate(model.model.layers)),
        embed=model.model.embed_tokens,
        finish=finish,
        placed=_positions,
    )


def _positions(mask_BP: Tensor, tokens: int) -> Mapping[str, Tensor]:
    """Count tokens, not pads; a pad's own position does not matter."""
    position_BP = (mask_BP.long().cumsum(-1) - 1).clamp_min(0)
    return {"position_ids": position_BP[:, position_BP.shape[1] - tokens :]}


def _block(layer: Any, number: int, heads: int, neurons: int) -> Block:
    attention, mlp, scope = layer.self_attn, layer.mlp, f"model.layers.{number}"
    hidden = Site(mlp.down_proj)
    return Block(
        layer=layer,
        reads=Site(attention.q_proj),
        context=Site(attention.o_proj),
        ffn_reads=Site(mlp.gate_proj),
        preactivation=hidden,
        hidden=hidden,
        heads=(
            *unit_weights(attention.q_proj, f"{scope}.self_attn.q_proj", heads, 0),
            *unit_weights(attention.o_proj, f"{scope}.self_attn.o_proj", heads, 1),
        ),
        neurons=(
            *unit_weights(mlp.gate_proj, f"{scope}.mlp.gate_proj", neurons, 0),
            *unit_weights(mlp.up_proj, f"{scope}.mlp.up_proj", neurons, 0),
            *unit_weights(mlp.down_proj, f"{scope}.mlp.down_proj", neurons, 1),
        ),
    )
