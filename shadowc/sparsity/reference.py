# SPDX-License-Identifier: Apache-2.0
"""The masked torch model: transformers' own, of any family, with inactive heads and neurons set to zero by hooks.

In: token ids, a density and where masking begins. Out: logits, and the scores, thresholds and masks behind them.
It is the truth for the quality of a sparse model and the yardstick of every engine; it saves no work.

Heads are zeroed in the attention context before the output projection, neurons in what the last projection of the FFN
reads (after ReLU; of a gated neuron the product), in the predicted layers (model layers 1 to n-1). Keys and values of
inactive heads are kept, as the engine keeps them; where query heads share them they are nobody's own. A predictor of
style dejavu reads what the attention of a layer reads under the masks of the layers before it, as the engine does;
one of style shadow+ scores neurons by what the layer's FFN reads, under the layer's own masks of heads too.

Letters: B batch, S new tokens, Z the last Z of them (those masked in at least one row), P tokens so far, the new
ones included, E hidden, F neurons, N units of a layer, L predicted layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from shadowc.sparsity import means
from shadowc.sparsity.families import Site, decoder_of, empty_model, restore_buffers, watched
from shadowc.sparsity.selection import Selection, unit_mask
from shadowc.sparsity.torch_scores import TorchScores
from shadowc.spec.density import UNIT_KINDS, Density
from shadowc.spec.errors import InputError, InternalError
from shadowc.spec.program import SparsityPlan

if TYPE_CHECKING:
    from shadowc.checkpoint.resolve import ModelCheckpoint

Granularity = Literal["token", "sequence"]
Array: TypeAlias = Tensor | npt.NDArray[Any]
Pair: TypeAlias = tuple[Array, Array]
"""For the heads, for the neurons."""


class NamedTensors(Protocol):
    """What the model needs of a predictor."""

    def tensors(self) -> Mapping[str, npt.NDArray[Any]]:
        """`{heads,neurons}.fc{1,2}.{weight,bias}`, and `order.{model layer}` [F] if units are permuted blocks.

        Of styles dejavu and shadow+ `{heads,neurons}.{model layer}.fc{1,2}.{weight,bias}`.
        """


@dataclass(slots=True)
class MaskedState:
    """What a text that is fed in pieces carries from call to call; every call changes it."""

    cache: DynamicCache = field(default_factory=DynamicCache)
    prompt_end: Tensor | None = None
    """[B,E]: layer-0 context of each row's last token before masking, once seen."""

    @property
    def length(self) -> int:
        """Tokens so far, pads included."""
        return int(self.cache.get_seq_length())


@dataclass(frozen=True, slots=True)
class MaskedResult:
    """Logits of all new tokens, and what decided the masks of the last Z of them.

    Where masking begins at different tokens, a row has all units active before its own first one.
    Scores and thresholds are None if masks were forced.
    """

    logits: Tensor
    """[B,S,V]"""
    _heads: _Kind
    _neurons: _Kind

    @property
    def mask_heads(self) -> Tensor:
        """Which heads were active, [B,Z,L,N] bool."""
        return torch.stack(self._heads.masks, dim=2)

    @property
    def mask_neurons(self) -> Tensor:
        """Which units of neurons were active, [B,Z,L,N] bool."""
        return torch.stack(self._neurons.masks, dim=2)

    @property
    def scores_heads(self) -> Tensor | None:
        """What the heads were scored, [B,Z,L,N]."""
        return _stacked(self._heads.scores)

    @property
    def scores_neurons(self) -> Tensor | None:
        """What the units of neurons were scored, [B,Z,L,N]."""
        return _stacked(self._neurons.scores)

    @property
    def threshold_heads(self) -> Tensor | None:
        """Below what a head was inactive, [B,Z,L]."""
        return _stacked(self._heads.thresholds)

    @property
    def threshold_neurons(self) -> Tensor | None:
        """Below what a unit of neurons was inactive, [B,Z,L]."""
        return _stacked(self._neurons.thresholds)


@dataclass(slots=True)
class _Kind:
    """Masks of one kind of unit, and what they were made of, for one call: a tensor for each predicted layer so far."""

    density: Tensor
    """[B], or [1] for all rows."""
    min_active: int
    masks: list[Tensor] = field(default_factory=list)
    """[B,Z,N] each."""
    scores: list[Tensor] = field(default_factory=list)
    """[B,Z,N] each; none where masks were forced."""
    thresholds: list[Tensor] = field(default_factory=list)
    """[B,Z] each; none where masks were forced."""

    def mask(self, index: int) -> Tensor:
        """Return the mask [B,Z,N] of a predicted layer, which the order of the hooks promises."""
        if index >= len(self.masks):
            raise InternalError("a mask was needed before the scores of its layer were known")
        return self.masks[index]


@dataclass(slots=True)
class _Call:
    """The arguments of one call in one form."""

    tokens: int
    past: int
    first: Tensor
    """[B]: first masked slot of each row."""
    dense: Tensor
    """[B,Z]: tokens of the tail that come before their row's first masked slot."""
    granularity: Granularity
    state: MaskedState
    heads: _Kind
    neurons: _Kind

    @property
    def kinds(self) -> tuple[_Kind, _Kind]:
        return self.heads, self.neurons

    @property
    def tail(self) -> slice:
        """The last Z of the new tokens."""
        return slice(self.tokens - self.dense.shape[1], self.tokens)


class MaskedModel:
    """A model whose heads and neurons can be masked per token.

    Args:
        model: transformers' OPTForCausalLM or LlamaForCausalLM in eval mode; it is shared, and left as it was after
            each call.
        plan: block size, scope, exempt layers and least numbers of active units.
        predictor: scores every unit and fixes the order of the neurons. Without it scores or masks must be given,
            and units are blocks of neurons in the order of the checkpoint.
    """

    def __init__(self, model: Any, plan: SparsityPlan, predictor: NamedTensors | None = None) -> None:
        self.model = model
        self.plan = plan
        self.decoder = decoder_of(model)
        layers = len(self.decoder.blocks)
        tensors = {} if predictor is None else predictor.tensors()
        self._tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
        self._scores = TorchScores(self._tensors, layers - 1, plan.style)
        self._selection = Selection(plan)
        self._unit_of_neuron = [self._units(layer) for layer in range(1, layers)]
        """[F] of each predicted layer; None: every neuron is a unit, in the checkpoint's order."""

    def logits(
        self,
        ids_BS: Array,
        attention_mask_BP: Array | None = None,
        *,
        density: Density | Sequence[Density],
        masked_from: int | Tensor | None = None,
        masks: Pair | None = None,
        scores: Pair | None = None,
        granularity: Granularity = "token",
        state: MaskedState | None = None,
    ) -> MaskedResult:
        """Run the new tokens and return their logits under masks.

        Args:
            ids_BS: the new tokens.
            attention_mask_BP: 1 for tokens, 0 for pads on the left; covers what `state` holds too. None: no pads.
            density: for all rows, or one for each.
            masked_from: the first masked slot (pads and what `state` holds are counted) for all rows or for each
                [B]; earlier tokens are dense. None: the length of the forced `masks` decides.
            masks: forced, (heads [B,Z,L,N], neurons [B,Z,L,N]), bool.
            scores: in place of the predictor's, (heads, neurons), each [L,N] or [B,Z,L,N] where B and Z may be 1; they
                are ranked, whatever the plan says of thresholds, which were calibrated for the predictor's.
            granularity: "token": the token's own context decides; "sequence": that of the last token before
                `masked_from` decides for all that follow.
            state: starts (`MaskedState()`) or continues a text that is fed in pieces.

        Raises:
            InputError: the arguments do not fit together.
        """
        ids_BS = torch.as_tensor(ids_BS)
        if masked_from is None:
            if masks is None:
                raise InputError("masked_from says where masking begins; only forced masks can do without it")
            masked_from = ids_BS.shape[1] - masks[0].shape[1] + (0 if state is None else state.length)
        call = self._call(ids_BS, density, masked_from, granularity, state)
        with torch.no_grad():
            if masks is not None:
                _force(call, masks)
            elif scores is not None:
                for number, given in enumerate(scores):
                    self._select(call, number, torch.as_tensor(given), ranked=True)
            elif not self._tensors:
                raise InputError("a model without a predictor needs scores or masks")
            places = {} if attention_mask_BP is None else self._placed(torch.as_tensor(attention_mask_BP), call.tokens)
            with watched(*self._sites(call)):
                output = self.model(
                    input_ids=ids_BS,
                    past_key_values=None if state is None else state.cache,
                    use_cache=state is not None,
                    **places,
                )
        return MaskedResult(output.logits, *call.kinds)

    def _call(
        self,
        ids_BS: Tensor,
        density: Density | Sequence[Density],
        masked_from: int | Tensor,
        granularity: Granularity,
        state: MaskedState | None,
    ) -> _Call:
        batch, tokens = ids_BS.shape
        past = 0 if state is None else state.length
        first_B = torch.as_tensor(masked_from, dtype=torch.int64).expand(batch)
        end = past + tokens
        slot_Z = torch.arange(min(max(past, int(first_B.min())), end), end)
        rows = [density] if isinstance(density, Density) else list(density)
        if len(rows) not in (1, batch):
            raise InputError(f"a density for all rows or for each of the {batch}; found {len(rows)}")
        if granularity not in ("token", "sequence"):
            raise InputError(f"the granularity of masks is token or sequence; found {granularity!r}")
        if granularity == "sequence" and self.plan.style != "shadow":
            raise InputError(f"style {self.plan.style} makes a mask for every token; there is none for a sequence")
        if granularity == "sequence" and int(first_B.min()) < 1:
            raise InputError("masks of a whole sequence come from the last token of its prompt; found no prompt")
        return _Call(
            tokens=tokens,
            past=past,
            first=first_B,
            dense=slot_Z < first_B[:, None],
            granularity=granularity,
            state=MaskedState() if state is None else state,
            heads=_Kind(torch.tensor([row.heads for row in rows]), self.plan.min_active_heads),
            neurons=_Kind(torch.tensor([row.neurons for row in rows]), self.plan.min_active_neurons),
        )

    def _placed(self, attention_mask_BP: Tensor, tokens: int) -> dict[str, Tensor]:
        """Return the model's arguments that tell tokens from pads."""
        return {"attention_mask": attention_mask_BP, **self.decoder.placed(attention_mask_BP, tokens)}

    def _sites(self, call: _Call) -> Iterator[tuple[Site, Callable[[Tensor], None]]]:
        """Give the places and what happens there: predict unless the masks are known, mask the layers from 1 on."""
        first, *later = self.decoder.blocks
        if not call.heads.masks and self.plan.style != "shadow":
            for layer, block in enumerate(later, start=1):
                behind = block.ffn_reads if self.plan.style == "shadow+" else block.reads
                yield block.reads, self._predict_layer(call, layer, "heads")
                yield behind, self._predict_layer(call, layer, "neurons")
        elif not call.heads.masks:
            yield first.context, lambda context: self._predict(call, context)
        for index, block in enumerate(later):
            yield block.context, _mask_heads(call, index, self._tensors.get(f"{means.PREFIX}{index + 1}"))
            yield block.hidden, _mask_neurons(call, index, self._unit_of_neuron[index])

    def _predict(self, call: _Call, context_BSE: Tensor) -> None:
        """Score the units from the layer-0 context, before out_proj, and select."""
        source = context_BSE[:, call.tail]
        if call.granularity == "sequence":
            source = _prompt_end(call, context_BSE)[:, None]
        for number, scores in enumerate(self._scores.of_all_layers(source)):
            self._select(call, number, scores)

    def _predict_layer(self, call: _Call, layer: int, name: str) -> Callable[[Tensor], None]:
        """Return what scores and selects the units of a kind of a model layer from what it reads."""

        def act(read: Tensor) -> None:
            read_BSE = read.view(-1, call.tokens, read.shape[-1])  # transformers flattens what fc1 reads
            scores = self._scores.of_layer(name, layer, read_BSE[:, call.tail])
            self._select(call, UNIT_KINDS.index(name), scores, layer)

        return act

    def _select(self, call: _Call, number: int, scores: Tensor, layer: int = 0, *, ranked: bool = False) -> None:
        """Turn scores of one kind, those of a model layer or (0) of all predicted ones, into thresholds and masks.

        Rows and tokens that share their scores are ranked once. `ranked`: see `Selection`.
        """
        batch, tail = call.dense.shape
        kind = call.kinds[number]
        scores = scores[None, None] if scores.ndim == 2 else scores
        scores = scores.expand(max(len(scores), len(kind.density)), -1, -1, -1)
        threshold = self._selection.threshold(
            number, scores, kind.density, min_active=kind.min_active, layer=layer, ranked=ranked
        )
        mask = _or_dense(call, unit_mask(scores, threshold).expand(batch, tail, -1, -1))
        kind.masks += mask.unbind(dim=2)
        kind.scores += scores.expand(batch, tail, -1, -1).unbind(dim=2)
        threshold = torch.where(call.dense[:, :, None], -math.inf, threshold.expand(batch, tail, -1))
        kind.thresholds += threshold.unbind(dim=2)

    def _units(self, layer: int) -> Tensor | None:
        """Return the unit of each neuron of the checkpoint, [F]; None where that is its own number."""
        neurons = self.decoder.neurons
        order_F = self._tensors.get(f"order.{layer}", torch.arange(neurons))
        unit_F = torch.empty(neurons, dtype=torch.int64)
        unit_F[order_F.to(torch.int64)] = torch.arange(neurons) // self.plan.block
        return None if torch.equal(unit_F, torch.arange(neurons)) else unit_F


def _force(call: _Call, masks: Pair) -> None:
    """Take the masks as they are given."""
    for kind, mask in zip(call.kinds, masks, strict=True):
        if mask.shape[:2] != call.dense.shape:
            raise InputError(f"forced masks of shape {list(mask.shape)} for rows x tokens {list(call.dense.shape)}")
        kind.masks += _or_dense(call, torch.as_tensor(mask, dtype=torch.bool)).unbind(dim=2)


def _or_dense(call: _Call, mask_BZLN: Tensor) -> Tensor:
    """Return the mask with all units active at tokens that come before their row's first masked one."""
    return mask_BZLN | call.dense[:, :, None, None] if bool(call.dense.any()) else mask_BZLN


def _prompt_end(call: _Call, context_BSE: Tensor) -> Tensor:
    """Return the context of each row's last token before masking [B,E]; kept where it is among the new tokens."""
    if call.state.prompt_end is None:
        if int(call.first.min()) <= call.past:
            raise InputError('the prompt was not fed with granularity "sequence"; its last token is lost')
        call.state.prompt_end = torch.full_like(context_BSE[:, 0], math.nan)
    token_B = call.first - 1 - call.past
    (rows,) = torch.nonzero((token_B >= 0) & (token_B < call.tokens), as_tuple=True)
    call.state.prompt_end[rows] = context_BSE[rows, token_B[rows]]
    return call.state.prompt_end


def _mask_heads(call: _Call, index: int, mean_HD: Tensor | None) -> Callable[[Tensor], None]:
    """Return what replaces the inactive heads of predicted layer `index` in its context [B,S,H*D], in place.

    They become their mean, or zero where no mean is known.
    """

    def act(context_BSE: Tensor) -> None:
        inactive_BZH1 = ~call.heads.mask(index)[..., None]
        context_BSHD = context_BSE.view(*context_BSE.shape[:2], inactive_BZH1.shape[2], -1)
        tail_BZHD = context_BSHD[:, call.tail]
        if mean_HD is None:
            tail_BZHD.masked_fill_(inactive_BZH1, 0.0)
        else:
            tail_BZHD.copy_(torch.where(inactive_BZH1, mean_HD, tail_BZHD))

    return act


def _mask_neurons(call: _Call, index: int, unit_F: Tensor | None) -> Callable[[Tensor], None]:
    """Return what zeroes the inactive neurons of predicted layer `index` in [B*S,F] or [B,S,F], in place."""

    def act(fired: Tensor) -> None:
        active_BZN = call.neurons.mask(index)
        inactive_BZF = ~(active_BZN if unit_F is None else active_BZN[:, :, unit_F])
        fired.view(-1, call.tokens, fired.shape[-1])[:, call.tail].masked_fill_(inactive_BZF, 0.0)

    return act


def _stacked(layers: list[Tensor]) -> Tensor | None:
    """Return what was recorded of all layers along axis 2, if anything was."""
    return torch.stack(layers, dim=2) if layers else None


def load_torch_model(checkpoint: ModelCheckpoint) -> Any:
    """Return the checkpoint as transformers' model, which has no types: float32, eval mode, eager attention.

    It is built on the meta device and filled tensor by tensor, so that no weight is in memory twice.
    """
    with torch.device("meta"):
        model = empty_model(checkpoint.facts)
    for name, _ in list(model.named_parameters()):
        array = np.require(checkpoint.weights.tensor(name), np.float32, ["C", "W"])
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(torch.from_numpy(array), requires_grad=False))
    model.tie_weights()
    restore_buffers(model)
    return model.eval()
