# SPDX-License-Identifier: Apache-2.0
"""An engine as a model of transformers: everything that `GenerationMixin` offers, over the engine's graph.

The prompt is read densely, every token after it under masks, as `CausalEngine.generate` does.

Letters: B rows, S new tokens, P tokens so far, the new ones included, K logits that are kept, V vocabulary.
"""

from __future__ import annotations

from dataclasses import fields
from os import PathLike
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationMixin, OPTConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from shadowc.runtime import prompts
from shadowc.runtime.decoder import Decoder
from shadowc.runtime.stats import Meter
from shadowc.spec.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from shadowc.runtime.causal import CausalEngine
    from shadowc.runtime.prompts import Batch
    from shadowc.runtime.stats import RunStats
    from shadowc.spec.density import Density
    from shadowc.spec.manifest import ModelPart

_NAMES = ("cache", "past_key_values")
"""What transformers calls a cache, today and in earlier versions."""
CACHE = next(name for name in _NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})
_ALONE = ("inputs_embeds", "output_attentions", "output_hidden_states", "labels")
"""Arguments of transformers' models that an engine has no graph for."""


class EngineCache:
    """What one generation carries from call to call: the decoder with its keys and values, and what it cost.

    Args:
        engine: makes the decoder.
        batch: the prompts.
        density: of the tokens after the prompt.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, engine: CausalEngine, batch: Batch, density: Density) -> None:
        self._engine = engine
        self._starts_B = batch.starts
        self._density = density
        self._decoder = engine._decoder(batch, engine.model.positions)
        self.meter = Meter(engine.manifest)
        self.tokens = 0
        """Slots that are filled, padding included."""

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer, whether its state does not grow: of none."""
        return [False] * self._engine.model.layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included."""
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b go on from where row beam_idx[b] is.

        Raises:
            UnsupportedError: the engine's target cannot.
        """
        if not isinstance(self._decoder, Decoder):
            raise UnsupportedError(
                f"beams are for engines of target cpu; this one is for {self._engine.manifest.target}",
                hint="leave num_beams out",
            )
        self._decoder.reorder(beam_idx.cpu().numpy())

    def prompt(self, ids_BS: prompts.Ids, *, every: bool) -> Tensor:
        """Read tokens densely; logits [B,S,V] of all of them (`every`) or [B,1,V] of the last."""
        self._require_room(ids_BS)
        if self.tokens and not isinstance(self._decoder, Decoder):
            raise UnsupportedError(
                "a second prompt behind a first one is for engines of target cpu; "
                f"this one is for {self._engine.manifest.target}",
                hint="give the whole text as one prompt",
            )
        began = perf_counter()
        logits = self._decoder.prompt_logits(ids_BS) if every else self._decoder.prefill(ids_BS)[:, None]
        self.meter.prefill_seconds += perf_counter() - began
        self._decoder.set_density(self._density.heads, self._density.neurons)
        self.tokens += ids_BS.shape[1]
        return torch.from_numpy(np.array(logits, np.float32))

    def step(self, ids_B: prompts.Ids) -> Tensor:
        """Compute one masked token per row; logits [B,1,V]."""
        self._require_room(ids_B[:, None])
        began = perf_counter()
        outputs = self._decoder.step(ids_B)
        self.meter.add(outputs, np.ones((len(ids_B), 1), np.bool_), predictions=int(self._decoder.predicts))
        self.meter.seconds += perf_counter() - began
        self.tokens += 1
        return torch.from_numpy(np.array(outputs["logits"], np.float32))  # the next step overwrites them

    def _require_room(self, ids_BS: prompts.Ids) -> None:
        rows, tokens = ids_BS.shape
        if rows != len(self._starts_B):
            raise InputError(
                f"the cache is of {len(self._starts_B)} rows, found {rows}", hint="start without a cache for other rows"
            )
        model = self._engine.model
        if self.tokens + tokens > model.positions:
            raise InputError(
                f"the text has {self.tokens + tokens} tokens, the context of {model.name} holds {model.positions}",
                hint=f"shorten it to {model.positions} tokens",
            )


class OPTForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers is untyped here
    """A drop-in for transformers' class of the same name, which computes with an engine.

        model = shadowc.OPTForCausalLM.from_pretrained("mini")
        pipeline("text-generation", model=model, tokenizer=model.engine.tokenizer)

    `generate` takes what transformers' takes (sampling, beams, streamers, stopping criteria, logits processors, padding
    on the left) and `density`. It ends where the context ends. No gradients; always on the CPU's side of a pipeline.

    Args:
        engine: from `shadowc.load`.
        density: of tokens after the prompt; None: the engine's own.
    """

    config_class = OPTConfig

    def __init__(self, engine: CausalEngine, density: float | Density | None = None) -> None:
        super().__init__(_config(engine.model))
        self.engine = engine
        self.density = engine._density(density)
        self._cache: EngineCache | None = None

    @classmethod
    def from_pretrained(
        cls, folder: str | PathLike[str], *, density: float | Density | None = None, **arguments: Any
    ) -> OPTForCausalLM:
        """Load an engine folder; `arguments` and errors are those of `shadowc.load`."""
        from shadowc.runtime.load import load

        return cls(load(folder, **arguments), density)

    def save_pretrained(self, *_: object, **__: object) -> None:
        """Refuse: an engine holds no checkpoint.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("an engine cannot be saved as a checkpoint", hint="copy its folder, it is complete")

    @property
    def device(self) -> torch.device:
        """Where ids are read and logits are put."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the logits."""
        return torch.float32

    @property
    def last_stats(self) -> RunStats:
        """What the last generation or call did; rows that had ended count until all had.

        Raises:
            InputError: nothing has run yet.
        """
        if self._cache is None:
            raise InputError("nothing has run yet", hint="call generate first")
        return self._cache.meter.stats()

    def generate(self, inputs: Tensor | None = None, *arguments: Any, **named: Any) -> Any:
        """As transformers' `generate`, with `density` among the named arguments.

        Raises:
            InputError: the prompt leaves no room in the context, or the padding is not on the left.
            UnsupportedError: it would have to run without a cache, with one of another kind, or with an assistant.
        """
        settings = {**named, **dict(zip(_ARGUMENTS, arguments, strict=False))}
        _refuse(settings, (settings.get("generation_config"), self.generation_config))
        ids_BS = named.get("input_ids") if inputs is None else inputs
        slots = 1 if ids_BS is None else int(ids_BS.shape[-1])
        positions, name = self.engine.model.positions, self.engine.model.name
        if slots >= positions:
            raise InputError(
                f"the prompt has {slots} tokens and 1 more must fit, the context of {name} holds {positions}",
                hint=f"shorten the prompt to {positions - 1} tokens",
            )
        position = _ARGUMENTS.index("stopping_criteria")
        if len(arguments) > position:
            arguments = (*arguments[:position], self._ending(arguments[position]), *arguments[position + 1 :])
        else:
            named["stopping_criteria"] = self._ending(named.get("stopping_criteria"))
        return super().generate(inputs, *arguments, **named)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Cut the tokens that the cache does not hold yet.

        Raises:
            InputError: there are none.
        """
        cache = _cache_of(kwargs)
        held = 0 if cache is None else cache.tokens
        if input_ids.shape[1] <= held:
            raise InputError(
                f"the cache holds {held} tokens, the ids have {input_ids.shape[1]}; expected more than the cache",
                hint="pass the whole text with the cache of its beginning",
            )
        dropped = ("labels", "next_sequence_length", "is_first_iteration", *_NAMES)
        return {
            **{name: value for name, value in kwargs.items() if name not in dropped},
            "input_ids": input_ids[:, held:],
            "attention_mask": attention_mask,
            CACHE: cache,
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: EngineCache | None = None,
        past_key_values: EngineCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        density: float | Density | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of new tokens: without a cache, or several at once, read densely; one at a time under masks.

        Args:
            input_ids: [B,S], what the cache does not hold.
            attention_mask: [B,P], zeros, then ones in each row; None: no padding. Read when the cache is new.
            cache: of the call before; None: a new one.
            past_key_values: the same under its former name.
            use_cache: False: the cache is not handed out.
            logits_to_keep: 1: of the last token only; 0: of all.
            density: of a new cache; None: the model's own.
            return_dict: False is not offered.
            kwargs: what is set of these is refused.

        Returns:
            `logits` [B,K,V] float32, and the cache.

        Raises:
            InputError: ids, mask or length do not fit.
            UnsupportedError: an argument that an engine has no graph for.
        """
        wrong = [name for name in _ALONE if kwargs.get(name) is not None and kwargs[name] is not False]
        if wrong or input_ids is None or return_dict is False:
            given = ", ".join(wrong) or ("return_dict=False" if return_dict is False else "no input_ids")
            raise UnsupportedError(
                f"an engine takes token ids and gives logits in a dictionary; found {given}",
                hint="call it with input_ids",
            )
        held = _cache_of({"cache": cache, "past_key_values": past_key_values})
        ids_BS = np.ascontiguousarray(input_ids.cpu().numpy(), np.int64)
        if held is None:
            mask_BP = np.ones_like(ids_BS) if attention_mask is None else attention_mask.cpu().numpy()
            chosen = self.density if density is None else self.engine._density(density)
            held = EngineCache(self.engine, prompts.from_ids(ids_BS, mask_BP, self.engine.model), chosen)
        self._cache = held
        if held.tokens and ids_BS.shape[1] == 1:
            logits = held.step(ids_BS[:, 0])
        else:
            logits = held.prompt(ids_BS, every=logits_to_keep != 1)
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return CausalLMOutputWithPast(logits=logits, **{CACHE: None if use_cache is False else held})

    @staticmethod
    def _reorder_cache(cache: EngineCache, beam_idx: Tensor) -> EngineCache:
        cache.reorder_cache(beam_idx)
        return cache

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _ending(self, given: StoppingCriteriaList | None) -> StoppingCriteriaList:
        return StoppingCriteriaList([*(given or ()), _ContextEnd(self.engine.model.positions)])


class _ContextEnd(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Every row ends where the context is full."""

    def __init__(self, positions: int) -> None:
        self._positions = positions

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self._positions, device=input_ids.device)


_ARGUMENTS = (
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
)
"""How transformers' `generate` orders what comes after the ids."""
_ASSISTANTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""Each makes transformers propose several tokens at once and take back those that the model would not have chosen."""


def _refuse(named: dict[str, Any], configs: tuple[Any, ...]) -> None:
    """Settings of a generation that would silently give other tokens; what one configuration leaves open the next says.

    Raises:
        UnsupportedError: there is one.
    """

    def setting(name: str) -> Any:
        found = (named.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in found if value is not None), None)

    if setting("use_cache") is False:
        raise UnsupportedError(
            "use_cache=False: an engine generates with its cache; without it all tokens would be read as a prompt",
            hint="leave use_cache out",
        )
    assistants = [name for name in _ASSISTANTS if setting(name) not in (None, False)]
    if assistants:
        raise UnsupportedError(
            f"{' and '.join(assistants)}: what an assistant proposes could not be taken back from an engine's cache",
            hint=f"leave {' and '.join(assistants)} out",
        )
    wrong = [name for name in ("cache_implementation", "prefill_chunk_size") if setting(name) is not None]
    if wrong:
        raise UnsupportedError(
            f"{' and '.join(wrong)}: an engine has its own cache and reads prompts in pieces by itself",
            hint=f"leave {' and '.join(wrong)} out",
        )


def _cache_of(kwargs: dict[str, Any]) -> EngineCache | None:
    """The engine's cache under either name; an empty one of another kind is none.

    Raises:
        InputError: a filled one of another kind.
    """
    for value in (kwargs.get(name) for name in _NAMES):
        if isinstance(value, EngineCache):
            return value
        if value is not None and value.get_seq_length():
            raise InputError(
                f"a cache of an engine was expected, found a filled {type(value).__name__}",
                hint="pass the cache that this model returned",
            )
    return None


def _config(model: ModelPart) -> OPTConfig:
    config = OPTConfig(
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        ffn_dim=model.ffn,
        num_attention_heads=model.heads,
        max_position_embeddings=model.positions,
        word_embed_proj_dim=model.projected or model.hidden,
        do_layer_norm_before=model.norm_first,
        bos_token_id=model.bos,
        eos_token_id=model.eos,
        pad_token_id=model.pad,
        attn_implementation="eager",
    )
    config.name_or_path = model.name
    return config
