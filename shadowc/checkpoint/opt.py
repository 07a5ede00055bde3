# SPDX-License-Identifier: Apache-2.0
"""All facts of the OPT family: sizes, parameter names and shapes, and which variants are handled.

In: a config.json as a dict. Out: `OptFacts`, the only description of a model that the other stages see.

Letters: E hidden, F neurons, V vocabulary, W width of the token embeddings.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from shadowc.spec.errors import InputError, UnsupportedError

EMBEDDING = "model.decoder.embed_tokens.weight"
POSITIONS = "model.decoder.embed_positions.weight"
FINAL_NORM = "model.decoder.final_layer_norm"
PROJECT_IN = "model.decoder.project_in.weight"
"""[E,W]: makes hidden states of token embeddings that are narrower (opt-350m); it has no bias."""
PROJECT_OUT = "model.decoder.project_out.weight"
"""[W,E]: makes of hidden states what the tied head multiplies."""
HEAD = "lm_head.weight"
"""Tied: it names the same tensor as EMBEDDING."""

MODEL_SCOPES = ("model.", "lm_head.")
"""What the names of an OPTForCausalLM's tensors begin with."""

_BUFFERS = re.compile(
    r"model\.decoder\.version|model\.decoder\.embed_positions\._float_tensor|(.*\.)?(position_ids|rotary_emb\.inv_freq)"
)
"""Left in checkpoints by fairseq and by older transformers; nothing is computed from them."""

POSITION_OFFSET = 2
"""Row of the table of learned positions that belongs to the first token."""


@dataclass(frozen=True, slots=True)
class OptFacts:
    """One OPT model without its weights: ReLU, learned positions, tied embeddings."""

    name: str
    layers: int
    hidden: int
    heads: int
    head_size: int
    ffn: int
    vocab: int
    positions: int
    """Longest context in tokens (max_position_embeddings)."""
    bos: int
    eos: int
    pad: int
    norm_eps: float = 1e-5
    position_offset: int = POSITION_OFFSET
    norm_first: bool = True
    """False: each norm follows its block's sum, as in opt-350m; blocks then read the residual stream itself."""
    projected: int = 0
    """Width of token embeddings that are projected to the hidden size; 0: they have it."""

    @property
    def final_norm(self) -> bool:
        """Whether a norm stands behind the last layer: not where that layer ends with one."""
        return self.norm_first

    @property
    def embedding_width(self) -> int:
        """W: columns of the embedding, and of the tied head."""
        return self.projected or self.hidden

    @property
    def predicted_layers(self) -> int:
        """All layers but the first, which stays dense because the predictor reads its attention."""
        return self.layers - 1

    @property
    def family(self) -> str:
        """What messages call the kind of model."""
        return "OPT"

    @property
    def head_values(self) -> int:
        """Weights of a layer that an inactive head leaves out: its rows of q_proj, its columns of out_proj."""
        return 2 * self.head_size * self.hidden

    @property
    def kept_values(self) -> int:
        """Weights of a layer that every token reads, whatever its mask: k_proj and v_proj."""
        return 2 * self.hidden * self.hidden

    @property
    def neuron_values(self) -> int:
        """Weights of a layer that an inactive neuron leaves out: its row of fc1, its column of fc2."""
        return 2 * self.hidden

    @property
    def token_parameters(self) -> int:
        """Parameters that a dense token reads: all layers and the LM head."""
        per_layer = 4 * self.hidden * (self.hidden + 1) + self.ffn * (2 * self.hidden + 1) + self.hidden
        projections = 2 * self.hidden * self.projected
        return self.layers * per_layer + self.vocab * self.embedding_width + projections

    @staticmethod
    def from_config(config: Mapping[str, object], name: str) -> OptFacts:
        """Read the facts from a config.json.

        Args:
            config: its content.
            name: what the model is called in messages and manifests.

        Raises:
            UnsupportedError: not OPT, or a variant of OPT that is not handled; all reasons at once.
            InputError: sizes that are missing or do not fit together; all of them at once.
        """
        family = config.get("model_type")
        if family == "llama":
            raise llama_is_not_compiled(name, "config.json says model_type 'llama'")
        if family != "opt":
            raise UnsupportedError(
                f"{name}: shadowc compiles OPT models; config.json says model_type {family!r}",
                hint="try --model opt-mini, or one of opt-125m to opt-66b",
            )
        _refuse_variants(config, name)
        return _read_sizes(config, name)


def llama_is_not_compiled(model: str, reason: str) -> UnsupportedError:
    """Return the refusal of a Llama-type model where an engine is wanted: what can be done with it instead."""
    return UnsupportedError(
        f"{model}: {reason}; engines are compiled from OPT models only. With a Llama-type model work, in torch: "
        "collect, train (which shows recall), eval",
        hint=f"shadowc train --model {shlex.quote(model)}",
    )


def _refuse_variants(config: Mapping[str, object], name: str) -> None:
    reasons: list[str] = []
    if config.get("_remove_final_layer_norm", False) and config.get("do_layer_norm_before", True):
        reasons.append("no final layer norm (_remove_final_layer_norm is true)")
    if config.get("activation_function", "relu") != "relu":
        reasons.append(
            f"activation {config.get('activation_function')!r}, expected 'relu': only ReLU makes neurons exactly zero"
        )
    reasons += [
        f"{flag} is false, expected true"
        for flag in ("enable_bias", "layer_norm_elementwise_affine")
        if not config.get(flag, True)
    ]
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, Mapping) else quantisation
        reasons.append(f"weights that are already quantised ({method}), expected fp32, fp16 or bf16")
    if reasons:
        raise UnsupportedError(
            f"{name}: this variant of OPT is not handled: {'; '.join(reasons)}",
            hint="opt-125m to opt-66b are handled, and what has their form",
            problems=reasons,
        )


_SIZE_KEYS = MappingProxyType(
    {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "ffn": "ffn_dim",
        "vocab": "vocab_size",
        "positions": "max_position_embeddings",
    }
)
_TOKEN_KEYS = MappingProxyType({"bos": ("bos_token_id", 2), "eos": ("eos_token_id", 2), "pad": ("pad_token_id", 1)})


def _read_sizes(config: Mapping[str, object], name: str) -> OptFacts:
    problems: list[str] = []
    sizes: dict[str, int] = {}
    for field, key in _SIZE_KEYS.items():
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            sizes[field] = value
        else:
            problems.append(
                f"{key} is {value!r}, expected a positive whole number" if key in config else f"{key} is missing"
            )
    width = config.get("word_embed_proj_dim")
    if width is not None and (not isinstance(width, int) or isinstance(width, bool) or width <= 0):
        problems.append(f"word_embed_proj_dim is {width!r}, expected a positive whole number")
    norm_first = config.get("do_layer_norm_before", True)
    if not isinstance(norm_first, bool):
        problems.append(f"do_layer_norm_before is {norm_first!r}, expected true or false")
    tokens: dict[str, int] = {}
    for field, (key, usual) in _TOKEN_KEYS.items():
        value = config.get(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        value = usual if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            problems.append(f"{key} is {value!r}, expected one token id")
        elif value < 0:
            problems.append(f"{key} is {value}, expected one token id")
        elif value >= sizes.get("vocab", value + 1):
            problems.append(f"{key} {value} lies outside the vocabulary of {sizes['vocab']} tokens")
        else:
            tokens[field] = value
    if {"hidden", "heads"} <= sizes.keys() and sizes["hidden"] % sizes["heads"]:
        problems.append(f"hidden_size {sizes['hidden']} is not a multiple of num_attention_heads {sizes['heads']}")
    if sizes.get("layers") == 1:
        problems.append(
            "num_hidden_layers is 1, expected at least 2: the first layer feeds the predictor of the others"
        )
    if problems:
        raise InputError(
            f"{name}: config.json does not describe an OPT model: {'; '.join(problems)}",
            hint="compare it with the config.json of facebook/opt-125m",
            problems=problems,
        )
    return OptFacts(
        name=name,
        head_size=sizes["hidden"] // sizes["heads"],
        norm_first=bool(norm_first),
        projected=width if isinstance(width, int) and width != sizes["hidden"] else 0,
        **sizes,
        **tokens,
    )


@dataclass(frozen=True, slots=True)
class Affine:
    """Names of the weight and the bias of one linear layer or norm."""

    weight: str
    bias: str

    @staticmethod
    def of(scope: str) -> Affine:
        """The two names below one module scope."""
        return Affine(f"{scope}.weight", f"{scope}.bias")


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Parameter names of one decoder layer, as transformers spells them."""

    q: Affine
    k: Affine
    v: Affine
    out: Affine
    attention_norm: Affine
    fc1: Affine
    fc2: Affine
    ffn_norm: Affine


def layer_names(layer: int) -> LayerNames:
    """Names of the parameters of one layer, counted from 0."""
    scope = f"model.decoder.layers.{layer}"
    return LayerNames(
        q=Affine.of(f"{scope}.self_attn.q_proj"),
        k=Affine.of(f"{scope}.self_attn.k_proj"),
        v=Affine.of(f"{scope}.self_attn.v_proj"),
        out=Affine.of(f"{scope}.self_attn.out_proj"),
        attention_norm=Affine.of(f"{scope}.self_attn_layer_norm"),
        fc1=Affine.of(f"{scope}.fc1"),
        fc2=Affine.of(f"{scope}.fc2"),
        ffn_norm=Affine.of(f"{scope}.final_layer_norm"),
    )


def parameter_shapes(facts: OptFacts) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every parameter, sorted by name; the tied head is left out."""
    e, f = facts.hidden, facts.ffn
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (facts.vocab, facts.embedding_width),
        POSITIONS: (facts.positions + facts.position_offset, e),
    }

    def add(names: Affine, *shape: int) -> None:
        shapes[names.weight] = shape
        shapes[names.bias] = shape[:1]

    if facts.projected:
        shapes |= {PROJECT_IN: (e, facts.projected), PROJECT_OUT: (facts.projected, e)}
    if facts.final_norm:
        add(Affine.of(FINAL_NORM), e)
    for layer in range(facts.layers):
        names = layer_names(layer)
        for projection in (names.q, names.k, names.v, names.out):
            add(projection, e, e)
        add(names.attention_norm, e)
        add(names.fc1, f, e)
        add(names.fc2, e, f)
        add(names.ffn_norm, e)
    return dict(sorted(shapes.items()))


def is_known_buffer(name: str) -> bool:
    """Whether a tensor of this canonical name may be ignored: it is no parameter, and the graph makes its own."""
    return _BUFFERS.fullmatch(name) is not None


def config_dict(facts: OptFacts) -> dict[str, object]:
    """The arguments of transformers' `OPTConfig` for this model, without dropout."""
    return {
        "vocab_size": facts.vocab,
        "hidden_size": facts.hidden,
        "num_hidden_layers": facts.layers,
        "ffn_dim": facts.ffn,
        "num_attention_heads": facts.heads,
        "max_position_embeddings": facts.positions,
        "word_embed_proj_dim": facts.embedding_width,
        "activation_function": "relu",
        "do_layer_norm_before": facts.norm_first,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "bos_token_id": facts.bos,
        "eos_token_id": facts.eos,
        "pad_token_id": facts.pad,
        "tie_word_embeddings": True,
    }


# layers, hidden, heads, ffn (published in the OPT paper, table 1, and in the models' config.json)
_PUBLISHED = MappingProxyType(
    {
        "opt-125m": (12, 768, 12, 3072),
        "opt-350m": (24, 1024, 16, 4096),
        "opt-1.3b": (24, 2048, 32, 8192),
        "opt-2.7b": (32, 2560, 32, 10240),
        "opt-6.7b": (32, 4096, 32, 16384),
        "opt-13b": (40, 5120, 40, 20480),
        "opt-30b": (48, 7168, 56, 28672),
        "opt-66b": (64, 9216, 72, 36864),
    }
)
PUBLISHED_NAMES = tuple(_PUBLISHED)


def published_config(name: str) -> dict[str, object]:
    """config.json of a published OPT model, known without the network; raises KeyError for other names."""
    layers, hidden, heads, ffn = _PUBLISHED[name]
    odd = name == "opt-350m"
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "ffn_dim": ffn,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 512 if odd else hidden,
        "activation_function": "relu",
        "do_layer_norm_before": not odd,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
