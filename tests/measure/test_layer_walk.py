# SPDX-License-Identifier: Apache-2.0
"""A layer that is walked step by step: what attention may have seen of keys and values that a cache rounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from shadowc.checkpoint.opt import layer_names
from shadowc.checkpoint.resolve import resolve
from shadowc.measure.bisect import REFERENCE_CONTEXT_TOLERANCE
from shadowc.measure.layer_walk import LayerWalk
from shadowc.spec.program import TensorSource

LAYER, TOKENS = 1, 12


@dataclass
class SharpQueries:
    """A checkpoint whose queries are so large that the rounding of keys shows in the context."""

    source: TensorSource

    def names(self) -> tuple[str, ...]:
        return self.source.names()

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        sharp = name in (layer_names(LAYER).q.weight, layer_names(LAYER).k.weight)
        return self.source.tensor(name) * (8 if sharp else 1)


@pytest.fixture
def walked(tiny_checkpoint: Path) -> tuple[LayerWalk, torch.Tensor, dict[str, torch.Tensor]]:
    """A layer, its input, and what a graph showed whose attention saw keys and values before their rounding."""
    checkpoint = resolve(str(tiny_checkpoint), offline=True)
    walk = LayerWalk(checkpoint.facts, SharpQueries(checkpoint.weights), LAYER)
    x_BSE = torch.randn(1, TOKENS, checkpoint.facts.hidden, generator=torch.Generator().manual_seed(0))
    attention = walk._module.self_attn
    with torch.no_grad():
        normed = walk._module.self_attn_layer_norm(x_BSE)
        stored = {"keys": attention.k_proj(normed).half(), "values": attention.v_proj(normed).half()}
    return walk, x_BSE, {**stored, "context": walk.context(x_BSE)}


def differences(
    walked: tuple[LayerWalk, torch.Tensor, dict[str, torch.Tensor]], *, exact_new_tokens: bool
) -> dict[str, float]:
    walk, x_BSE, seen = walked
    heads = torch.ones(1, TOKENS, walk._module.self_attn.num_heads, dtype=torch.bool)
    neurons = torch.ones(1, TOKENS, walk._module.fc1.out_features, dtype=torch.bool)
    return walk.differences(x_BSE, heads, neurons, seen, exact_new_tokens=exact_new_tokens)


def test_attention_to_unrounded_keys_is_sound_where_new_tokens_may_be_exact_and_only_there(
    walked: tuple[LayerWalk, torch.Tensor, dict[str, torch.Tensor]],
) -> None:
    assert differences(walked, exact_new_tokens=False)["context"] > REFERENCE_CONTEXT_TOLERANCE
    assert differences(walked, exact_new_tokens=True)["context"] < 1e-6


def test_context_of_neither_keys_is_off_even_where_new_tokens_may_be_exact(
    walked: tuple[LayerWalk, torch.Tensor, dict[str, torch.Tensor]],
) -> None:
    context = walked[2]["context"]
    context.view(-1)[context.abs().argmax()] *= 1.02
    assert differences(walked, exact_new_tokens=True)["context"] > REFERENCE_CONTEXT_TOLERANCE
