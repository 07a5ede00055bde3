# SPDX-License-Identifier: Apache-2.0
"""All facts of Llama-type decoders: sizes, parameter names and shapes, and which variants are handled.

In: a config.json as a dict. Out: `LlamaFacts`. The torch side (collect, train, the masked model) handles this family;
the compiler does not.

Letters: E hidden, H heads, K heads of keys and values, D head size, F neurons, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from shadowc.spec.errors import InputError, UnsupportedError

MODEL_TYPE = "llama"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
DEFAULT_ROPE_BASE = 10000.0


@dataclass(frozen=True, slots=True)
class LlamaFacts:
    """One Llama-type model without its weights: RMS norms, rotary positions, gated FFN, grouped keys and values."""

    name: str
    layers: int
    hidden: int
    heads: int
    """Query heads: these are the units that are masked."""
    kv_heads: int
    """Heads of keys and values, each shared by heads / kv_heads query heads; they are always computed."""
    head_size: int
    ffn: int
    vocab: int
    positions: int
    """Longest context in tokens (max_position_embeddings)."""
    bos: int
    eos: int
    pad: int
    norm_eps: float = 1e-6
    tied: bool = False
    """True: the LM head is the embedding."""
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: str = ""
    """Parameters of the rotary positions as JSON, keys in order."""

    @property
    def family(self) -> str:
        """What messages call the kind of model."""
        return "Llama-type"

    @property
    def predicted_layers(self) -> int:
        """All layers but the first, which stays dense because the predictor reads its attention."""
        return self.layers - 1

    @property
    def head_values(self) -> int:
        """Weights of a layer that an inactive head leaves out: its rows of q_proj, its columns of o_proj."""
        return 2 * self.head_size * self.hidden

    @property
    def kept_values(self) -> int:
        """Weights of a layer that every token reads, whatever its mask: k_proj and v_proj."""
        return 2 * self.kv_heads * self.head_size * self.hidden

    @property
    def neuron_values(self) -> int:
        """Weights of a layer that an inactive neuron leaves out: its gate and up rows, its column of down_proj."""
        return 3 * self.hidden

    @property
    def token_parameters(self) -> int:
        """Parameters that a dense token reads: all layers and the LM head."""
        matrices = self.heads * self.head_values + self.kept_values + self.ffn * self.neuron_values
        return self.layers * matrices + self.vocab * self.hidden

    @staticmethod
    def from_config(config: Mapping[str, object], name: str) -> LlamaFacts:
        """Read the facts from a config.json.

        Args:
            config: its content.
            name: what the model is called in messages and traces.

        Raises:
            UnsupportedError: a variant that is not handled; all reasons at once.
            InputError: sizes that are missing or do not fit together; all of them at once.
        """
        sizes, problems = _read_sizes(config)
        tokens = _read_tokens(config, sizes, problems)
        if {"hidden", "heads", "kv_heads"} <= sizes.keys() and not problems:
            problems += _misfits(sizes)
        if problems:
            raise InputError(
                f"{name}: config.json does not describe a Llama-type model: {'; '.join(problems)}",
                hint="compare it with the config.json that the model was published with",
                problems=problems,
            )
        sizes.setdefault("head_size", sizes["hidden"] // sizes["heads"])
        _refuse_variants(config, sizes, name)
        epsilon = config.get("rms_norm_eps", 1e-6)
        return LlamaFacts(
            name=name,
            norm_eps=float(epsilon) if isinstance(epsilon, int | float) else 1e-6,
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            rope=json.dumps(_rope(config), sort_keys=True),
            **sizes,
            **tokens,
        )


_SIZE_KEYS = MappingProxyType(
    {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "ffn": "intermediate_size",
        "vocab": "vocab_size",
        "positions": "max_position_embeddings",
    }
)
_OPTIONAL_KEYS = MappingProxyType({"kv_heads": "num_key_value_heads", "head_size": "head_dim"})


def _read_sizes(config: Mapping[str, object]) -> tuple[dict[str, int], list[str]]:
    sizes: dict[str, int] = {}
    problems: list[str] = []
    for field, key in (*_SIZE_KEYS.items(), *_OPTIONAL_KEYS.items()):
        value = config.get(key)
        if value is None and field in _OPTIONAL_KEYS:
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            sizes[field] = value
        else:
            found = f"{key} is {value!r}, expected a positive whole number"
            problems.append(found if key in config else f"{key} is missing")
    if "heads" in sizes:
        sizes.setdefault("kv_heads", sizes["heads"])
    if sizes.get("layers") == 1:
        problems.append(
            "num_hidden_layers is 1, expected at least 2: the first layer feeds the predictor of the others"
        )
    return sizes, problems


def _read_tokens(config: Mapping[str, object], sizes: Mapping[str, int], problems: list[str]) -> dict[str, int]:
    """Return bos, eos and pad: of several ends of a text the first; what is not said is the end of a text."""
    tokens: dict[str, int] = {}
    for field, usual in (("eos", 2), ("bos", None), ("pad", None)):
        key = f"{field}_token_id"
        value = config.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None or (field == "pad" and value == -1):
            value = tokens.get("eos", 2) if usual is None else usual
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < sizes.get("vocab", value + 1):
            problems.append(f"{key} is {value!r}, expected a token id below the vocabulary's {sizes.get('vocab')}")
        else:
            tokens[field] = value
    return tokens


def _misfits(sizes: Mapping[str, int]) -> list[str]:
    found = []
    if sizes["heads"] % sizes["kv_heads"]:
        found.append(
            f"num_attention_heads {sizes['heads']} is not a multiple of num_key_value_heads {sizes['kv_heads']}"
        )
    if "head_size" not in sizes and sizes["hidden"] % sizes["heads"]:
        found.append(f"hidden_size {sizes['hidden']} is not a multiple of num_attention_heads {sizes['heads']}")
    return found


def _refuse_variants(config: Mapping[str, object], sizes: Mapping[str, int], name: str) -> None:
    reasons = []
    if config.get("hidden_act", "silu") != "silu":
        reasons.append(f"activation {config.get('hidden_act')!r}, expected 'silu'")
    if sizes["heads"] * sizes["head_size"] != sizes["hidden"]:
        reasons.append(
            f"{sizes['heads']} heads of {sizes['head_size']}, which together are not the hidden size {sizes['hidden']}"
        )
    if config.get("quantization_config"):
        reasons.append("weights that are already quantised, expected fp32, fp16, bf16 or a GGUF file")
    if reasons:
        raise UnsupportedError(
            f"{name}: this Llama-type variant is not handled: {'; '.join(reasons)}",
            hint="Llama 2 and 3, SmolLM and TinyLlama are handled, and what has their form",
            problems=reasons,
        )


def _rope(config: Mapping[str, object]) -> dict[str, object]:
    """Return the parameters of the rotary positions, from either spelling of transformers."""
    base = config.get("rope_theta", DEFAULT_ROPE_BASE)
    for key in ("rope_parameters", "rope_scaling"):
        given = config.get(key)
        if isinstance(given, Mapping):
            kind = given.get("rope_type", given.get("type", "default"))
            return {"rope_theta": base, **given, "rope_type": kind}
    return {"rope_theta": base, "rope_type": "default"}


def parameter_shapes(facts: LlamaFacts) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every parameter, sorted by name; a tied head is left out."""
    e, f, q, kv = facts.hidden, facts.ffn, facts.heads * facts.head_size, facts.kv_heads * facts.head_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (facts.vocab, e), FINAL_NORM: (e,)}
    if not facts.tied:
        shapes[HEAD] = (facts.vocab, e)
    attention = {"q_proj": (q, e), "k_proj": (kv, e), "v_proj": (kv, e), "o_proj": (e, q)}
    ffn = {"gate_proj": (f, e), "up_proj": (f, e), "down_proj": (e, f)}
    for layer in range(facts.layers):
        scope = f"model.layers.{layer}"
        shapes |= {f"{scope}.input_layernorm.weight": (e,), f"{scope}.post_attention_layernorm.weight": (e,)}
        for part, matrices, biased in (("self_attn", attention, facts.attention_bias), ("mlp", ffn, facts.mlp_bias)):
            for name, shape in matrices.items():
                shapes[f"{scope}.{part}.{name}.weight"] = shape
                if biased:
                    shapes[f"{scope}.{part}.{name}.bias"] = shape[:1]
    return dict(sorted(shapes.items()))


def is_known_buffer(name: str) -> bool:
    """Whether a tensor of this name may be ignored: older transformers stored the frequencies of the positions."""
    return name.endswith("rotary_emb.inv_freq")


def config_dict(facts: LlamaFacts) -> dict[str, object]:
    """The arguments of transformers' `LlamaConfig` for this model."""
    return {
        "vocab_size": facts.vocab,
        "hidden_size": facts.hidden,
        "num_hidden_layers": facts.layers,
        "intermediate_size": facts.ffn,
        "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads,
        "head_dim": facts.head_size,
        "max_position_embeddings": facts.positions,
        "hidden_act": "silu",
        "rms_norm_eps": facts.norm_eps,
        "tie_word_embeddings": facts.tied,
        "attention_bias": facts.attention_bias,
        "mlp_bias": facts.mlp_bias,
        "rope_parameters": json.loads(facts.rope),
        "bos_token_id": facts.bos,
        "eos_token_id": facts.eos,
        "pad_token_id": facts.pad,
    }
