# SPDX-License-Identifier: Apache-2.0
"""A checkpoint and its predictor, evaluated by the masked torch model: every protocol, one causal pass where it can be.

The mask of a token depends on the tokens up to it alone, so all tokens of a window go through the model together, each
under its own mask. Rows of a batch are padded behind their end, which no token before it sees. A prompt that several
continuations share is read once; if it is dense, its K/V are kept for a while, since settings share it too.

Letters: B rows, S tokens, Z the last of them from the first masked token of any row on, L predicted layers, H heads,
N units of neurons, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from shadowc.eval.ledger import Ledger
from shadowc.eval.likelihood import log_likelihood
from shadowc.eval.model import METHODS, EvaluatedModel, random_scores
from shadowc.eval.references import REFERENCES, Oracle, prompt_scores
from shadowc.eval.request import BY_THRESHOLD, LEARNED, PROTOCOLS, Outcome, Request, Setting
from shadowc.eval.rows import Counted, active, counted, padded, repeated
from shadowc.sparsity.families import decoder_of
from shadowc.sparsity.kept import NOTHING, Kept
from shadowc.sparsity.reference import MaskedModel, MaskedState
from shadowc.sparsity.thresholds import refuse_least
from shadowc.spec.density import Density
from shadowc.spec.errors import UnsupportedError
from shadowc.spec.options import SELECTS, Select
from shadowc.spec.program import SparsityPlan

if TYPE_CHECKING:
    from shadowc.checkpoint.resolve import ModelCheckpoint
    from shadowc.eval.model import Masks
    from shadowc.sparsity.predictor import Predictor
    from shadowc.sparsity.reference import MaskedResult, Pair
    from shadowc.spec.options import Scope, Style

BATCH_BYTES = 1 << 27
"""Rough bound on the logits, and on the scores and masks, of one batch; four times as much was slower."""
KEPT_PROMPT_BYTES = 1 << 30
"""Of K/V of prompts that are kept."""


@dataclass(slots=True)
class _Prompt:
    """A prompt that was read."""

    state: MaskedState
    """Of one row; `prompt_end` is there if a predictor can score it."""
    logits: Any
    """[1,V] float32 of its last token."""
    counted: Counted = (0, 0.0, 0.0)


class TorchModel(EvaluatedModel):
    """A torch model under masks.

    Args:
        model: transformers' model in eval mode; shared, and left as it was.
        checkpoint: where it comes from.
        predictor: whose masks, and those of its controls; None: dense, random masks and those of a prompt.
        scope: of the ranking where a setting names none; None: the widest that the predictor allows.
        seed: of random masks.
        kept: what all masks leave.
    """

    protocols = tuple(PROTOCOLS)

    def __init__(
        self,
        model: Any,
        checkpoint: ModelCheckpoint,
        predictor: Predictor | None = None,
        *,
        scope: str | None = None,
        seed: int = 0,
        kept: Kept = NOTHING,
    ) -> None:
        facts = checkpoint.facts
        learned = "" if predictor is None else _hash(predictor)
        self.name, self.identity = facts.name, f"{checkpoint.identity}{learned}{kept.text()}"
        self.context, self.start = facts.positions, facts.bos
        self._model, self._checkpoint, self._predictor, self._seed = model, checkpoint, predictor, seed
        self._scope, self._kept = scope, kept
        self._masked: dict[tuple[str, bool, Select], MaskedModel] = {}
        self._layers, self._vocab = facts.layers - 1, facts.vocab
        self._units = (facts.heads, facts.ffn) if predictor is None else predictor.units
        self._controls = {} if predictor is None else predictor.controls
        has = {"random", *self._controls, *(() if predictor is None else ("predictor",))}
        self.methods = tuple(name for name in (*METHODS, *sorted(has - {*METHODS})) if name in has)
        self.references = ("prompt",) if predictor is None else REFERENCES
        if predictor is not None and predictor.thresholds:
            self.references += BY_THRESHOLD
        self.ledger = ledger_of(model, 0 if predictor is None else 4 * predictor.parameters)
        self.recall = {} if predictor is None else predictor.report.get("found", {})
        self._prompts: OrderedDict[tuple[int, ...], _Prompt] = OrderedDict()
        self._kept_tokens = 0
        self._oracle: Oracle | None = None
        self.passes = 0
        """Tokens that went through the model, padding included."""

    @cached_property
    def tokenizer(self) -> Any:
        """Callable as transformers' tokenizers are.

        Raises:
            InputError: the checkpoint has none.
        """
        from shadowc.checkpoint.models import tokenizer_of

        return tokenizer_of(self._checkpoint)

    def refuse_calibration_text(self, content: bytes, documents: Sequence[str]) -> None:
        """Refuse a text that the predictor was calibrated on.

        Raises:
            InputError: it is that text, or shares paragraphs with it.
        """
        from shadowc.sparsity.fingerprint import fingerprint, refuse_if_calibrated

        if self._predictor is not None:
            refuse_if_calibrated(fingerprint(content, documents), self._predictor.meta)

    def check(self, *settings: Setting) -> None:
        """See EvaluatedModel.check; also refuse protocols and scopes that the predictor's style does not have.

        Raises:
            InputError, UnsupportedError: a setting is not one of this model.
        """
        super().check(*settings)
        if any(setting.method in BY_THRESHOLD for setting in settings):
            refuse_least(max(self._kept.heads, self._kept.neurons))
        predictor = self._predictor
        if predictor is None:
            return
        for setting in settings:
            if setting.method in LEARNED and setting.protocol != "decode" and predictor.style != "shadow":
                raise self._knows_one_layer(setting, predictor.style)
            if setting.method in LEARNED:
                predictor.scope(cast("Scope | None", setting.scope or self._scope or None), _select(setting))

    def _knows_one_layer(self, setting: Setting, style: Style) -> UnsupportedError:
        """Return the refusal of one mask for many tokens where none knows the masks of all layers ahead."""
        others = ["prompt"] if setting.protocol == "prompt" else []
        others += [method for method in self.methods if method not in LEARNED]
        return UnsupportedError(
            f"a predictor of style {style} makes its masks layer by layer, for every token; under protocol "
            f"{setting.protocol!r} of method {setting.method} one token would have to know those of all layers",
            hint=f"--protocol decode, or --methods {','.join(others)}",
        )

    def score(self, requests: Sequence[Request], setting: Setting) -> list[Outcome]:
        """Answer the requests, in their order.

        Raises:
            InputError: the setting is not one of this model.
        """
        self.check(setting)
        found: dict[int, Outcome] = {}
        together: dict[tuple[int, ...], list[int]] = defaultdict(list)
        alone = []
        for index, request in enumerate(requests):
            if self._continues(request, setting):
                together[request.ids[: request.prompt]].append(index)
            else:
                alone.append(index)
        with torch.inference_mode():
            for prompt, indices in together.items():
                outcomes = self._continued(prompt, [requests[i] for i in indices], setting)
                found.update(zip(indices, outcomes, strict=True))
            alone.sort(key=lambda i: -len(requests[i].ids))
            for indices in self._batches(alone, requests, setting):
                outcomes = self._whole([requests[i] for i in indices], setting)
                found.update(zip(indices, outcomes, strict=True))
        return [found[index] for index in range(len(requests))]

    def masks(self, request: Request, setting: Setting) -> tuple[Masks, Masks]:
        """See EvaluatedModel.masks."""
        self.check(setting)
        with torch.inference_mode():
            result = self._masked_run(padded([request.inputs]), setting, [request], 0, None)
        heads, neurons = result.mask_heads, result.mask_neurons
        if setting.method == "oracle" and result.scores_heads is not None and result.scores_neurons is not None:
            heads, neurons = heads & (result.scores_heads > 0), neurons & (result.scores_neurons > 0)
        return heads[0].numpy(), neurons[0].numpy()

    def _continues(self, request: Request, setting: Setting) -> bool:
        """Whether a request is a prompt and a continuation of it, scored as a whole, that leaves the prompt as it is.

        A dense prompt stays, and one whose tokens make their own masks or have those of a control that knows no text.
        """
        if request.prompt is None or request.scored != len(request.ids) - request.prompt:
            return False
        if setting.dense or setting.dense_tokens(request) == request.prompt:
            return True
        return setting.protocol == "decode" and (setting.method in LEARNED or setting.method in self._controls)

    def _continued(self, prompt: tuple[int, ...], requests: Sequence[Request], setting: Setting) -> list[Outcome]:
        """Answer requests that share a prompt: its last logits give the first tokens, one batch all later ones."""
        dense = setting.dense or setting.dense_tokens(requests[0]) == len(prompt)
        read = self._prompt(prompt) if dense else self._masked_prompt(prompt, requests[0], setting)
        lengths = [request.scored - 1 for request in requests]
        if not max(lengths):
            answers = [log_likelihood(read.logits, request.targets) for request in requests]
            return [Outcome(nats, greedy, *read.counted) for nats, greedy in answers]
        ids_BS = padded([request.inputs[len(prompt) :] for request in requests])
        state = repeated(read.state, len(requests))
        logits, heads_BS, neurons_BS = self._run(ids_BS, setting, requests, len(prompt), state)
        outcomes = []
        for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            logits_SV = np.concatenate([read.logits, logits[row, :length].numpy()])
            nats, greedy = log_likelihood(logits_SV, request.targets)
            shares = heads_BS[row, :length], neurons_BS[row, :length]
            outcomes.append(Outcome(nats, greedy, *(() if setting.dense else counted(*shares, read.counted))))
        return outcomes

    def _masked_prompt(self, ids: tuple[int, ...], request: Request, setting: Setting) -> _Prompt:
        """Read a request's prompt under a setting's masks; it serves that setting only, so it is not kept."""
        state, first = MaskedState(), setting.dense_tokens(request)
        logits, heads_BS, neurons_BS = self._run(torch.tensor([ids]), setting, [request], 0, state)
        return _Prompt(state, logits[:, -1].numpy(), counted(heads_BS[0, first:], neurons_BS[0, first:]))

    def _prompt(self, ids: tuple[int, ...]) -> _Prompt:
        """Read a prompt without masks, or find it read."""
        if ids in self._prompts:
            self._prompts.move_to_end(ids)
            return self._prompts[ids]
        state, ids_BS = MaskedState(), torch.tensor([ids])
        predicted = self._predictor is not None and self._predictor.style == "shadow"
        if predicted:  # its last token may have to make the mask
            result = self._masked_model().logits(
                ids_BS, density=Density(), masked_from=len(ids), granularity="sequence", state=state
            )
            logits = result.logits
        else:
            logits = self._model(input_ids=ids_BS, past_key_values=state.cache, use_cache=True, logits_to_keep=1).logits
        self.passes += len(ids)
        self._prompts[ids] = _Prompt(state, logits[:, -1].numpy().copy())
        self._kept_tokens += len(ids)
        while self._kept_tokens * _cache_bytes(self._model) > KEPT_PROMPT_BYTES and len(self._prompts) > 1:
            gone, _ = self._prompts.popitem(last=False)
            self._kept_tokens -= len(gone)
        return self._prompts[ids]

    def _batches(self, indices: Sequence[int], requests: Sequence[Request], setting: Setting) -> list[list[int]]:
        """Cut indices, longest request first, into batches within BATCH_BYTES."""
        units = 0 if setting.dense else 5 * self._layers * sum(self._units)  # scores and masks
        per_token = max(4 * self._vocab, units)
        batches: list[list[int]] = []
        for index in indices:
            length = len(requests[batches[-1][0]].ids) if batches else 0
            if not batches or (len(batches[-1]) + 1) * length * per_token > BATCH_BYTES:
                batches.append([])
            batches[-1].append(index)
        return batches

    def _whole(self, requests: Sequence[Request], setting: Setting) -> list[Outcome]:
        """Answer requests in one pass over all their tokens; under protocol paper one more for the masks."""
        ids_BS = padded([request.inputs for request in requests])
        logits, heads_BS, neurons_BS = self._run(ids_BS, setting, requests, 0, None)
        outcomes = []
        for row, request in enumerate(requests):
            end = len(request.ids) - 1
            nats, greedy = log_likelihood(logits[row, end - request.scored : end].numpy(), request.targets)
            first = setting.dense_tokens(request)
            shares = heads_BS[row, first:end], neurons_BS[row, first:end]
            outcomes.append(Outcome(nats, greedy, *(() if setting.dense else counted(*shares))))
        return outcomes

    def _run(
        self, ids_BS: Tensor, setting: Setting, requests: Sequence[Request], past: int, state: MaskedState | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [B,S,V] and the shares of active heads and neurons [B,S]; dense tokens have all."""
        self.passes += ids_BS.numel()
        share_BS = torch.ones(ids_BS.shape)
        if setting.dense:
            kept = {} if state is None else {"past_key_values": state.cache}
            logits = self._model(input_ids=ids_BS, use_cache=state is not None, **kept).logits
            return logits, share_BS, share_BS
        result = self._masked_run(ids_BS, setting, requests, past, state)
        return result.logits, *active(result, share_BS)

    def _masked_run(
        self, ids_BS: Tensor, setting: Setting, requests: Sequence[Request], past: int, state: MaskedState | None
    ) -> MaskedResult:
        first_B = torch.tensor([setting.dense_tokens(request) for request in requests])
        scores = self._scores(ids_BS, setting, requests, first_B - past)
        held = setting.protocol == "prompt" and scores is None
        return self._masked_model(setting).logits(
            ids_BS,
            density=setting.density,
            masked_from=first_B,
            scores=scores,
            granularity="sequence" if held else "token",
            state=state,
        )

    def _scores(self, ids_BS: Tensor, setting: Setting, requests: Sequence[Request], first_B: Tensor) -> Pair | None:
        """Return what takes the place of the predictor's own scores of each token; None: nothing does."""
        if setting.method == "random" or setting.method in REFERENCES:
            return self._per_request(ids_BS.shape[1], setting, requests, first_B)
        if setting.method not in LEARNED:
            return self._controls[setting.method]
        return self._last_tokens(ids_BS, requests, setting) if setting.protocol == "paper" else None

    def _per_request(self, tokens: int, setting: Setting, requests: Sequence[Request], first_B: Tensor) -> Pair:
        """Return scores [B,Z,L,U] of both kinds that are made request by request, for each row's masked tokens."""
        begin = int(first_B.min())
        units = [(self._layers, count) for count in self._units]
        rows = [np.zeros((len(requests), tokens - begin, *one), np.float32) for one in units]
        for row, request in enumerate(requests):
            first = int(first_B[row]) - begin
            for kind, scores in enumerate(self._made(request, setting, tokens - begin - first)):
                end = None if len(scores) == 1 else first + len(scores)  # one holds for all tokens
                rows[kind][row, first:end] = scores
        return rows[0], rows[1]

    def _made(self, request: Request, setting: Setting, tokens: int) -> tuple[Any, Any]:
        """Return the scores [Z or 1,L,U] of one request."""
        dense, predictor = setting.dense_tokens(request), self._predictor
        if predictor is not None and setting.method == "oracle":
            self._oracle = self._oracle or Oracle(self._model, self._checkpoint.facts, predictor)
            return self._oracle.scores(request, dense)
        if setting.method == "prompt":
            return prompt_scores(self._model, predictor, request.ids[:dense])
        heads, neurons = ((self._layers, count) for count in self._units)
        drawn = random_scores(self._seed, request, heads, neurons)(tokens if setting.protocol == "decode" else 1)
        return drawn[0][0], drawn[1][0]

    def _last_tokens(self, ids_BS: Tensor, requests: Sequence[Request], setting: Setting) -> Pair:
        """Return the scores [B,1,L,U] that the last token of each row gives: the mask of all its tokens."""
        last_B = torch.tensor([len(request.ids) - 2 for request in requests])
        first = int(last_B.min())
        result = self._masked_model(setting).logits(ids_BS, density=Density(), masked_from=first)
        self.passes += ids_BS.numel()
        rows = torch.arange(len(requests))
        pair = result.scores_heads, result.scores_neurons
        heads, neurons = (scores[rows, last_B - first][:, None] for scores in pair if scores is not None)
        return heads, neurons

    def _masked_model(self, setting: Setting | None = None) -> MaskedModel:
        """The masked model of a setting; all share the weights.

        A control knows the scores of all layers before a token begins, so every scope is open to it, whatever the style
        of the predictor; where no scope was named it is ranked as the predictor is.
        """
        named = self._scope if setting is None else setting.scope or self._scope
        control = setting is not None and setting.method not in LEARNED and bool(named)
        select = SELECTS[0] if setting is None else _select(setting)
        key = named or "", control, select
        if key not in self._masked:
            predictor, scope = self._predictor, cast("Scope | None", named or None)
            block = 1 if predictor is None else predictor.block
            exempt, heads, neurons = self._kept.predicted(), self._kept.heads, self._kept.blocks(block)
            if predictor is None or (control and scope):
                plan = SparsityPlan(0, 0, block, scope or "global", exempt, heads, neurons)
            else:
                plan = predictor.plan(scope, exempt, select=select, min_active_heads=heads, min_active_neurons=neurons)
            self._masked[key] = MaskedModel(self._model, plan, predictor)
        return self._masked[key]


def _select(setting: Setting) -> Select:
    """How a method chooses units; all but those by thresholds rank."""
    return next((one for one in SELECTS if one == setting.method), SELECTS[0])


def ledger_of(model: Any, predictor_bytes: float) -> Ledger:
    """Count the bytes of a torch model's matrices in float32, with those of a predictor.

    K/V belong to heads of their own only where there are as many of them as query heads.
    """
    blocks = decoder_of(model).blocks
    own = neurons = shared = 0
    for name, parameter in blocks[0].layer.named_parameters():
        if parameter.ndim != 2:
            continue
        size = 4 * parameter.numel()
        if ".q_proj" in name or ".o_proj" in name or ".out_proj" in name:
            own += size
        elif ".k_proj" in name or ".v_proj" in name:
            shared += size
        else:
            neurons += size
    attention = own + shared
    grouped = getattr(model.config, "num_key_value_heads", None) not in (None, model.config.num_attention_heads)
    return Ledger(len(blocks), attention, own, own if grouped else attention, neurons, predictor_bytes)


def _hash(predictor: Predictor) -> str:
    """Return what tells predictors of one checkpoint apart, the rankings that they carry included."""
    state = hashlib.sha256()
    controls = {
        f"{name}.{index}": value for name, pair in predictor.controls.items() for index, value in enumerate(pair)
    }
    for name, value in sorted({**predictor.tensors(), **controls}.items()):
        state.update(f"{name} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    return f" predictor {state.hexdigest()[:16]}"


def _cache_bytes(model: Any) -> int:
    """Bytes of K/V of one token, at most."""
    return 8 * int(model.config.num_hidden_layers) * int(model.config.hidden_size)
