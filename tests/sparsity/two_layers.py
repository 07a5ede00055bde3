# SPDX-License-Identifier: Apache-2.0
"""Small random models of both families in float64, and their loss with something changed inside, the slow way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from shadowc.sparsity.families import Decoder, decoder_of, watched

Place = tuple[Literal["context", "preactivation", "hidden"], int]
"""A site of a layer."""
HEADS, HEAD_SIZE, NEURONS, LAYERS = 2, 8, 24, 2


def model_of(family: str) -> Any:
    """A model whose weights are large enough for everything to matter."""
    torch.manual_seed(11)
    if family == "opt":
        opt = OPTConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=LAYERS, ffn_dim=NEURONS, num_attention_heads=HEADS,
            max_position_embeddings=32, word_embed_proj_dim=16, attn_implementation="sdpa",
        )  # fmt: skip
        model: Any = OPTForCausalLM(opt)
    else:
        llama = LlamaConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=LAYERS, intermediate_size=NEURONS,
            num_attention_heads=HEADS, num_key_value_heads=1, max_position_embeddings=32, attn_implementation="sdpa",
        )  # fmt: skip
        model = LlamaForCausalLM(llama)
        for norm in [module for module in model.modules() if hasattr(module, "variance_epsilon")]:
            norm.forward = partial(_norm, norm)  # transformers' own goes through float32
    model = model.eval().double().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.normal_(std=0.4)
        else:
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def _norm(module: Any, values: Tensor) -> Tensor:
    square = values.square().mean(-1, keepdim=True)
    scaled: Tensor = module.weight * values * torch.rsqrt(square + module.variance_epsilon)
    return scaled


def texts(rows: int = 3, length: int = 10) -> Tensor:
    """Random ids [B,T]."""
    return torch.randint(4, 40, (rows, length), generator=torch.Generator().manual_seed(3))


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """The attention whose second derivative torch knows, in float64."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def loss_with(model: Any, ids_BT: Tensor, changes: Mapping[Place, Callable[[Tensor], Tensor]]) -> Tensor:
    """The summed loss when what passes at some places is changed; each sees [B,T,...]."""
    decoder: Decoder = decoder_of(model)

    def act(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda values: change(values.reshape(*ids_BT.shape, -1)).reshape(values.shape)

    pairs = [(getattr(decoder.blocks[layer], name), act(change)) for (name, layer), change in changes.items()]
    with watched(*pairs):
        logits = model(input_ids=ids_BT, use_cache=False).logits
    chosen = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids_BT[:, 1:, None])
    return -chosen.sum()
