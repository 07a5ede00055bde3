# SPDX-License-Identifier: Apache-2.0
"""OPT as a `Decoder`: q, k, v and out_proj belong to heads; a neuron is a row of fc1 and a column of fc2.

opt-350m's form included: norms behind the blocks, and token embeddings that are projected to the hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shadowc.sparsity.families.decoder import Block, Decoder, Site, unit_weights


def opt_decoder(model: Any) -> Decoder:
    """Return where things are in transformers' OPTForCausalLM."""
    config, decoder = model.config, model.model.decoder
    heads, neurons = config.num_attention_heads, config.ffn_dim

    def finish(last_BSE: Tensor) -> Tensor:
        for part in (decoder.final_layer_norm, decoder.project_out):
            last_BSE = last_BSE if part is None else part(last_BSE)
        logits: Tensor = model.lm_head(last_BSE)
        return logits

    return Decoder(
        model=model,
        heads=heads,
        head_size=config.hidden_size // heads,
        neurons=neurons,
        blocks=tuple(_block(layer, number, heads, neurons) for number, layer in enumerate(decoder.layers)),
        embed=decoder.embed_tokens,
        finish=finish,
        placed=lambda mask_BP, tokens: {},  # transformers' OPT counts positions by the attention mask
    )


def _block(layer: Any, number: int, heads: int, neurons: int) -> Block:
    attention, scope = layer.self_attn, f"model.decoder.layers.{number}"
    rows = [
        part
        for name in ("q_proj", "k_proj", "v_proj")
        for part in unit_weights(getattr(attention, name), f"{scope}.self_attn.{name}", heads, 0)
    ]
    return Block(
        layer=layer,
        reads=Site(attention.q_proj),
        context=Site(attention.out_proj),
        ffn_reads=Site(layer.fc1),
        preactivation=Site(layer.fc1, output=True),
        hidden=Site(layer.fc2),
        heads=(*rows, *unit_weights(attention.out_proj, f"{scope}.self_attn.out_proj", heads, 1)),
        neurons=(
            *unit_weights(layer.fc1, f"{scope}.fc1", neurons, 0),
            *unit_weights(layer.fc2, f"{scope}.fc2", neurons, 1),
        ),
    )
