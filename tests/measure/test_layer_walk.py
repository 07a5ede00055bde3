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
from shadowc.measure.layer_walk import LayerWalk
from shadowc.measure.parity import LAYER_TOLERANCE
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
        return self.source.tensor(name) * (5 if sharp else 1)


@pytest.fixture
def walked(tiny_checkpoint: Path) -> tuple[LayerWalk, torch.Tensor, dict[str, torch.Tensor]]:
    """A layer, its input, and what a graph showed whose attention saw keys and values before their rounding."""
    checkpoint = resolve(str(tiny_checkpoint), offline=True)
    walk = LayerWalk(checkpoint.facts, SharpQueries(checkpoint.weights), LAYER)
    x_BSE = torch.randn(1, TOKENS, checkpoint.facts.hidden, generator=torch.Generator().manual_seed(3))
    attention = walk._module.self_attn
    with torch.no_grad():
        normed = walk._module.self_attn_layer_norm(x_BSE)
        stored = {"keys": attention.k_proj(normed).half(), "values": attention.v_proj(normed).half()}
    return walk, x_BSE, {**stored, "context": walk.context(x_BSE)}


def differences(
    walked: tuple[LayerWalk, torch.Tensor, dict[str, torch.Tensor]], call_starts: list[int] | None
) -> dict[str, float]:
    walk, x_BSE, seen = walked
    heads = torch.ones(1, TOKENS, walk._module.self_attn.num_heads, dtype=torch.bool)
    neurons = torch.ones(1, TOKENS, walk._module.fc1.out_features, dtype=torch.bool)
    starts_S = None if call_starts is None else torch.tensor(call_starts)
    return walk.differences(x_BSE, heads, neurons, seen, call_starts_S=starts_S)


def context_in_calls(
    walked: tuple[LayerWalk, torch.Tensor, dict[str, torch.Tensor]], call_starts: list[int]
) -> torch.Tensor:
    """Where tokens see the keys and values of their call as they were; token by token, head by head."""
    walk, x_BSE, seen = walked
    attention = walk._module.self_attn
    with torch.no_grad():
        normed = walk._module.self_attn_layer_norm(x_BSE)
        query, keys, values = (part(normed)[0] for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        old_keys, old_values = (seen[step][0].float() for step in ("keys", "values"))
        found = torch.empty_like(query)
        for t, start in enumerate(call_starts):
            key = torch.cat([old_keys[:start], keys[start : t + 1]])
            value = torch.cat([old_values[:start], values[start : t + 1]])
            for head in torch.arange(query.shape[1]).chunk(attention.num_heads):
                shares = (key[:, head] @ query[t, head] * len(head) ** -0.5).softmax(0)
                found[t, head] = shares @ value[:, head]
    return found[None]


ONE_CALL = [0] * TOKENS
TWO_CALLS = [0] * 5 + [5] * (TOKENS - 5)
PROMPT_THEN_TOKENS = [0] * 5 + list(range(5, TOKENS))


def test_attention_to_unrounded_keys_is_sound_where_they_were_new_and_only_there(
    walked: tuple[LayerWalk, torch.Tensor, dict[str, torch.Tensor]],
) -> None:
    assert differences(walked, None)["context"] > LAYER_TOLERANCE
    assert differences(walked, ONE_CALL)["context"] < 1e-6


@pytest.mark.parametrize("calls", [ONE_CALL, TWO_CALLS, PROMPT_THEN_TOKENS], ids=["one", "two", "tokens"])
def test_tokens_see_the_keys_of_their_call_as_they_were(
    walked: tuple[LayerWalk, torch.Tensor, dict[str, torch.Tensor]], calls: list[int]
) -> None:
    walk, x_BSE, seen = walked
    changed = (walk, x_BSE, {**seen, "context": context_in_calls(walked, calls)})
    assert differences(changed, calls)["context"] < 1e-5
    for others in (ONE_CALL, TWO_CALLS, PROMPT_THEN_TOKENS):
        assert others is calls or differences(changed, others)["context"] > LAYER_TOLERANCE


def test_context_of_neither_keys_is_off_even_where_new_tokens_may_be_exact(
    walked: tuple[LayerWalk, torch.Tensor, dict[str, torch.Tensor]],
) -> None:
    context = walked[2]["context"]
    context.view(-1)[context.abs().argmax()] *= 1.02
    assert differences(walked, ONE_CALL)["context"] > LAYER_TOLERANCE
