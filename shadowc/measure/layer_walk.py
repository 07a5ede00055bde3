# SPDX-License-Identifier: Apache-2.0
"""One decoder layer step by step: every tensor that the engine shows, beside torch's from the engine's one before it.

Each step starts from the engine's own tensors, so a wrong one shows once, where it is made.

Letters: B batch, S tokens, E hidden, H heads, D head size, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shadowc.checkpoint.opt import layer_names
from shadowc.measure.layer_reference import LayerReference, beyond_rounding
from shadowc.measure.masks import relative, worse
from shadowc.spec.errors import InternalError
from shadowc.spec.ops import SPARSE_ATTENTION, SPARSE_FFN

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor of a layer and what makes it."""

    tensor: str
    """As the walk calls it, a key of LayerTensors.names."""
    made_by: str
    parameters: tuple[str, ...]
    """Names of the parameters that go into it."""


STEPS = ("attention.x", "keys", "values", "context", "attention.y", "middle", "ffn.x", "ffn.y", "output")
"""In the order in which a layer makes them."""


def steps_of(layer: int, tensors: Container[str] = STEPS, *, norm_first: bool = True) -> tuple[Step, ...]:
    """The steps of one model layer.

    Args:
        layer: its number.
        tensors: those that the graph has; what makes the others belongs to the next one that it has.
        norm_first: norms come before the blocks, not behind them.
    """
    names = layer_names(layer)

    def of(*parts: Any) -> tuple[str, ...]:
        return tuple(name for part in parts for name in (part.weight, part.bias))

    made = (
        ("layer norm", of(names.attention_norm)) if norm_first else ("the layer's input", ()),
        ("k_proj", of(names.k)),
        ("v_proj", of(names.v)),
        ("q_proj and attention to the cache", of(names.q)),
        ("out_proj", of(names.out)),
        ("residual", ()),
        ("layer norm", of(names.ffn_norm if norm_first else names.attention_norm)),
        ("fc1, ReLU and fc2", of(names.fc1, names.fc2)),
        ("residual", ()) if norm_first else ("residual and layer norm", of(names.ffn_norm)),
    )
    steps: list[Step] = []
    by: list[str] = []
    parameters: tuple[str, ...] = ()
    for name, (what, own) in zip(STEPS, made, strict=True):
        by, parameters = [*by, what], parameters + own
        if name in tensors:
            steps.append(Step(name, " and ".join(by), parameters))
            by, parameters = [], ()
    return tuple(steps)


def tensor_names(model: onnx.ModelProto, layer: int) -> dict[str, str]:
    """What the engine's graph calls the tensors of a layer: step -> name; keys and values are read from the cache.

    An operator that takes its norm and residual itself shows neither the one nor its result without the other.

    Raises:
        InternalError: the graph has no such layer.
    """
    nodes = {node.name: node for node in model.graph.node}
    attention, ffn = nodes.get(f"layers.{layer}.attention"), nodes.get(f"layers.{layer}.ffn")
    if attention is None or ffn is None:
        raise InternalError(f"the engine's graph has no operators of layer {layer}")
    names = {
        "keys": f"cached.{layer}.key",
        "values": f"cached.{layer}.value",
        "context": attention.output[3],
        "output": f"residual.{layer + 1}",
    }
    if len(attention.input) == len(SPARSE_ATTENTION.inputs):
        names |= {"attention.x": attention.input[0], "attention.y": attention.output[0]}
    if len(ffn.input) == len(SPARSE_FFN.inputs):
        names |= {"ffn.x": ffn.input[0], "ffn.y": ffn.output[0]}
    else:
        names["middle"] = ffn.input[0]
    return names


@dataclass(slots=True)
class _Walk:
    """What one pass through a layer finds."""

    seen: Mapping[str, Tensor]
    written: Tensor | None
    """Which keys and values the cache holds [B,S,E]; None: all."""
    context: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    """[B,S,E] from "keys" and "values" [B,S,E] of the cache; None: attention sees those alone, as the layer does."""
    cached: dict[str, Tensor] = field(default_factory=dict)
    found: dict[str, float] = field(default_factory=dict)

    def take(self, step: str, exact: Tensor) -> Tensor:
        """Compare torch's tensor with the engine's, and go on with the engine's if its graph has it."""
        if step not in self.seen:
            return exact
        theirs = self.seen[step].reshape(exact.shape)
        if step in ("keys", "values"):
            if self.written is not None:
                theirs = torch.where(self.written.reshape(exact.shape), theirs, exact.to(theirs.dtype))
            self.found[step] = worse(self.found.get(step, 0.0), beyond_rounding(theirs, exact))
            self.cached[step] = theirs.to(exact.dtype)
        else:
            if step == "context" and self.context is not None:
                exact = self.context(self.cached).reshape(exact.shape)
            worst = relative((theirs - exact).abs().max().item(), exact.abs().max().item())
            self.found[step] = worse(self.found.get(step, 0.0), worst)
        return theirs.to(exact.dtype)


class LayerWalk(LayerReference):
    """As LayerReference, for single steps."""

    def differences(
        self,
        x_BSE: Tensor,
        head_mask_BSH: Tensor,
        neuron_mask_BSF: Tensor,
        seen: Mapping[str, Tensor],
        *,
        every_head_written: bool = True,
        call_starts_S: Tensor | None = None,
    ) -> dict[str, float]:
        """Step -> largest difference of the engine's tensor from torch's, of torch's largest value.

        Args:
            x_BSE: the engine's input of the layer.
            head_mask_BSH: its masks, in checkpoint order.
            neuron_mask_BSF: the same.
            seen: step -> the engine's tensor, [B,S,E], keys and values [B,S,H,D] as stored; only what its graph has.
            every_head_written: False: of inactive heads the cache holds nothing that is meant, and nothing is compared.
            call_starts_S: where the call of each token begins: attention saw keys and values from there on before they
                were rounded for the cache. None: all as the cache holds them.
        """
        heads_BSE = head_mask_BSH.repeat_interleave(x_BSE.shape[2] // head_mask_BSH.shape[2], dim=2)
        attention = self._module.self_attn
        walk = _Walk(seen, None if every_head_written else heads_BSE)
        if call_starts_S is not None and {"keys", "values"} <= seen.keys():
            projected, starts_S = self._projected(x_BSE), call_starts_S
            walk.context = lambda cached: torch.where(heads_BSE, _context(projected, cached, starts_S), 0.0)

        def masked_neurons(hidden: Tensor) -> Tensor:
            return torch.where(neuron_mask_BSF.reshape(hidden.shape), hidden, 0.0)

        before: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [
            *((part, lambda x: walk.take("attention.x", x)) for part in (attention.q_proj, attention.k_proj)),
            (attention.v_proj, lambda x: walk.take("attention.x", x)),
            (attention.out_proj, lambda c: walk.take("context", torch.where(heads_BSE.reshape(c.shape), c, 0.0))),
            (self._module.final_layer_norm, lambda x: walk.take("middle", x)),
            (self._module.fc1, lambda x: walk.take("ffn.x", x)),
            (self._module.fc2, masked_neurons),
        ]
        after: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [
            (attention.k_proj, lambda y: walk.take("keys", y)),
            (attention.v_proj, lambda y: walk.take("values", y)),
            (attention.out_proj, lambda y: walk.take("attention.y", y)),
            (self._module.fc2, lambda y: walk.take("ffn.y", y)),
        ]
        with ExitStack() as stack:
            for part, act in before:
                stack.callback(part.register_forward_pre_hook(_on_input(act)).remove)
            for part, act in after:
                stack.callback(part.register_forward_hook(_on_output(act)).remove)
            walk.take("output", self._forward(x_BSE, {}, {}))
        return {step: walk.found[step] for step in STEPS if step in walk.found}

    def _projected(self, x_BSE: Tensor) -> tuple[Tensor, ...]:
        """Queries (scaled), keys and values [B,H,S,D] as torch makes them."""
        attention, inputs = self._module.self_attn, []
        self._forward(x_BSE, {attention.q_proj: lambda _, args: inputs.append(args[0])}, {})
        with torch.no_grad():
            query, key, value = (
                part(inputs[0]).reshape(*x_BSE.shape[:2], attention.num_heads, -1).transpose(1, 2)
                for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
        return query * query.shape[-1] ** -0.5, key, value


def _context(projected_BHSD: tuple[Tensor, ...], cached_BSE: Mapping[str, Tensor], call_starts_S: Tensor) -> Tensor:
    """Context [B,S,E] of tokens that see keys and values of their call as torch makes them, earlier ones as cached."""
    query_BHSD, key_BHSD, value_BHSD = projected_BHSD
    batch, heads, tokens, _ = query_BHSD.shape
    old_key_BHSD, old_value_BHSD = (
        cached_BSE[step].reshape(batch, tokens, heads, -1).transpose(1, 2) for step in ("keys", "values")
    )
    new_SS = torch.arange(tokens)[None, :] >= call_starts_S[:, None]
    logits_BHSS = torch.where(new_SS, query_BHSD @ key_BHSD.mT, query_BHSD @ old_key_BHSD.mT)
    later_SS = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    shares_BHSS = logits_BHSS.masked_fill(later_SS, float("-inf")).softmax(-1)
    context_BHSD = (shares_BHSS * new_SS) @ value_BHSD + (shares_BHSS * ~new_SS) @ old_value_BHSD
    return context_BHSD.transpose(1, 2).reshape(batch, tokens, -1)


def _on_input(act: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
    return lambda _, inputs: (act(inputs[0]),)


def _on_output(act: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda _, __, output: act(output)
