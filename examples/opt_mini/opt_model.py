# SPDX-License-Identifier: Apache-2.0
"""The OPT decoder as plain functions over stacked parameters, fast enough to train on a CPU.

In: token ids [B, T]. Out: the mean loss, or logits [B, T, V]. Parameters of all layers lie in one tensor per
kind (`fc1` is [N, F, E]), so an optimiser step is a handful of batched operations; `to_hf` cuts them into the
tensors that transformers' `OPTForCausalLM` reads. A test compares the two models.

Shape letters: B batch, T tokens, N layers, E hidden, H heads, D head size, F neurons, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

POSITION_OFFSET = 2  # OPT's table of learned positions has two unused rows in front
INIT_STD = 0.02
QUERY_BLOCK = 128  # of attention
BOS_ID, PAD_ID, EOS_ID, UNK_ID = 0, 1, 2, 3  # OPT starts a text with </s>, id 2, and never with <s>

LAYER_NAMES = (
    "qkv", "qkv_bias", "out", "out_bias", "fc1", "fc1_bias", "fc2", "fc2_bias",
    "norm1", "norm1_bias", "norm2", "norm2_bias",
)  # fmt: skip

Params = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of an OPT model."""

    layers: int = 8
    hidden: int = 256
    heads: int = 8
    neurons: int = 1024
    vocab: int = 8192
    positions: int = 512


def init_params(shape: Shape, seed: int) -> Params:
    """Return fp32 starting values; the two projections that write to the residual stream start smaller."""
    gen = torch.Generator().manual_seed(seed)
    n, e, f = shape.layers, shape.hidden, shape.neurons
    narrow = INIT_STD / math.sqrt(2 * n)

    def normal(*size: int, std: float = INIT_STD) -> Tensor:
        return torch.randn(*size, generator=gen) * std

    return {
        "embed": normal(shape.vocab, e),
        "position": normal(shape.positions + POSITION_OFFSET, e),
        "qkv": normal(n, 3, e, e),
        "qkv_bias": torch.zeros(n, 3, e),
        "out": normal(n, e, e, std=narrow),
        "out_bias": torch.zeros(n, e),
        "fc1": normal(n, f, e),
        "fc1_bias": torch.zeros(n, f),
        "fc2": normal(n, e, f, std=narrow),
        "fc2_bias": torch.zeros(n, e),
        "norm1": torch.ones(n, e),
        "norm1_bias": torch.zeros(n, e),
        "norm2": torch.ones(n, e),
        "norm2_bias": torch.zeros(n, e),
        "final_norm": torch.ones(e),
        "final_norm_bias": torch.zeros(e),
    }


def hidden_states(params: Mapping[str, Tensor], ids_BT: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Run the decoder; return the states after the final norm, [B, T, E] in `dtype`."""
    p = {name: tensor.to(dtype) for name, tensor in params.items()}
    b, t = ids_BT.shape
    e = p["embed"].shape[1]
    x = F.embedding(ids_BT, p["embed"]) + p["position"][POSITION_OFFSET : POSITION_OFFSET + t]
    per_layer = [p[name].unbind(0) for name in LAYER_NAMES]
    for qkv, qkv_b, out, out_b, fc1, fc1_b, fc2, fc2_b, n1, n1_b, n2, n2_b in zip(*per_layer, strict=True):
        y = F.layer_norm(x, (e,), n1, n1_b)
        y = F.linear(y, qkv.reshape(3 * e, e), qkv_b.reshape(3 * e))
        q, k, v = y.view(b, t, 3, heads, e // heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = causal_attention(q, k, v)
        x = x + F.linear(y.transpose(1, 2).reshape(b, t, e), out, out_b)
        y = F.relu(F.linear(F.layer_norm(x, (e,), n2, n2_b), fc1, fc1_b))
        x = x + F.linear(y, fc2, fc2_b)
    return F.layer_norm(x, (e,), p["final_norm"], p["final_norm_bias"])


def causal_attention(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
    """Return softmax(q k / sqrt(D)) v over the positions up to each query's own.

    Written out in blocks of queries, each against the keys before its end: torch's fused CPU kernel took 40 % of
    a training step at D = 32, this takes 20 %.
    """
    b, h, t, d = q_BHTD.shape
    q = (q_BHTD * d**-0.5).reshape(b * h, t, d)
    k, v = k_BHTD.reshape(b * h, t, d), v_BHTD.reshape(b * h, t, d)
    later = torch.ones(QUERY_BLOCK, QUERY_BLOCK, dtype=torch.bool).triu(1)
    outputs = []
    for start in range(0, t, QUERY_BLOCK):
        end = min(t, start + QUERY_BLOCK)
        scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2)).float()
        hidden = F.pad(later[: end - start, : end - start], (start, 0))
        weights = torch.softmax(scores.masked_fill(hidden, -1e9), dim=-1)
        outputs.append(torch.bmm(weights.to(v.dtype), v[:, :end]))
    return torch.cat(outputs, dim=1).view(b, h, t, d)


def mean_loss(params: Mapping[str, Tensor], window: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Return the mean cross-entropy (nats) of predicting `window[:, 1:]` from `window[:, :-1]`."""
    states = hidden_states(params, window[:, :-1], heads, dtype)
    logits = F.linear(states, params["embed"].to(dtype))
    return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


def to_hf(params: Mapping[str, Tensor], dtype: torch.dtype) -> Params:
    """Return the tensors under the names of OPT checkpoints; the tied `lm_head` is left out."""
    p = {name: tensor.detach().to(dtype) for name, tensor in params.items()}
    return {
        f"model.decoder.{name}": _part(p, place).contiguous().clone() for name, place in sorted(_hf_names(p).items())
    }


def from_hf(tensors: Mapping[str, Tensor], shape: Shape) -> Params:
    """Return fp32 parameters from tensors under the names of OPT checkpoints: the inverse of `to_hf`."""
    params = init_params(shape, 0)
    for name, place in _hf_names(params).items():
        _part(params, place).copy_(tensors[f"model.decoder.{name}"])
    return params


def _part(params: Mapping[str, Tensor], place: tuple[str, tuple[int, ...]]) -> Tensor:
    name, index = place
    return params[name][index] if index else params[name]


def _hf_names(params: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Where each tensor of a checkpoint lies in the stacked parameters."""
    places: dict[str, tuple[str, tuple[int, ...]]] = {
        "embed_tokens.weight": ("embed", ()),
        "embed_positions.weight": ("position", ()),
        "final_layer_norm.weight": ("final_norm", ()),
        "final_layer_norm.bias": ("final_norm_bias", ()),
    }
    for layer in range(params["qkv"].shape[0]):
        parts: dict[str, tuple[str, tuple[int, ...]]]
        parts = {f"self_attn.{kind}_proj": ("qkv", (layer, i)) for i, kind in enumerate("qkv")}
        parts |= {"self_attn.out_proj": ("out", (layer,)), "fc1": ("fc1", (layer,)), "fc2": ("fc2", (layer,))}
        parts |= {"self_attn_layer_norm": ("norm1", (layer,)), "final_layer_norm": ("norm2", (layer,))}
        for name, (ours, index) in parts.items():
            places[f"layers.{layer}.{name}.weight"] = (ours, index)
            places[f"layers.{layer}.{name}.bias"] = (f"{ours}_bias", index)
    return places


def hf_config(shape: Shape) -> dict[str, object]:
    """Return the content of `config.json`."""
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "word_embed_proj_dim": shape.hidden,
        "num_attention_heads": shape.heads,
        "ffn_dim": shape.neurons,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "init_std": INIT_STD,
        "prefix": "</s>",
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
    }
