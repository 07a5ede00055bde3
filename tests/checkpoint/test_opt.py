# SPDX-License-Identifier: Apache-2.0
"""The facts of the OPT family."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowc.checkpoint.opt import (
    EMBEDDING,
    HEAD,
    PUBLISHED_NAMES,
    OptFacts,
    config_dict,
    layer_names,
    parameter_shapes,
    published_config,
)
from shadowc.spec.errors import InputError, UnsupportedError
from tests.checkpoint.handmade import CONFIG, FACTS

PUBLISHED_MILLIONS = {
    "opt-125m": 125.24,
    "opt-350m": 331.20,
    "opt-1.3b": 1315.76,
    "opt-2.7b": 2651.60,
    "opt-6.7b": 6658.47,
    "opt-13b": 12853.47,
    "opt-30b": 29974.54,
    "opt-66b": 65719.70,
}


VARIANTS = (FACTS, replace(FACTS, norm_first=False, projected=4), replace(FACTS, norm_first=False))
VARIANT_NAMES = ("norms first", "as opt-350m", "norms last")


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_facts_give_the_published_number_of_parameters(name: str) -> None:
    facts = OptFacts.from_config(published_config(name), name)
    count = sum(math.prod(shape) for shape in parameter_shapes(facts).values())
    assert round(count / 1e6, 2) == PUBLISHED_MILLIONS[name]


def test_table_of_published_models_is_the_counted_one() -> None:
    assert set(PUBLISHED_NAMES) == set(PUBLISHED_MILLIONS)


@pytest.mark.parametrize("facts", VARIANTS, ids=VARIANT_NAMES)
def test_names_and_shapes_are_those_of_transformers(facts: OptFacts) -> None:
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    with torch.device("meta"):
        model = OPTForCausalLM(OPTConfig(**config_dict(facts)))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert theirs.pop(HEAD) == theirs[EMBEDDING]
    assert theirs == parameter_shapes(facts)
    assert list(parameter_shapes(facts)) == sorted(theirs)


def test_layer_names_are_all_parameters_of_a_layer() -> None:
    named = {name for pair in asdict(layer_names(2)).values() for name in pair.values()}
    assert named == {name for name in parameter_shapes(FACTS) if name.startswith("model.decoder.layers.2.")}


@pytest.mark.parametrize("facts", VARIANTS, ids=VARIANT_NAMES)
def test_facts_survive_the_way_through_transformers_config(facts: OptFacts) -> None:
    from transformers import OPTConfig

    assert OptFacts.from_config(OPTConfig(**config_dict(facts)).to_dict(), facts.name) == facts


def test_facts_take_usual_tokens_when_config_names_none() -> None:
    bare = {key: value for key, value in CONFIG.items() if "token" not in key}
    assert OptFacts.from_config(bare, "small") == FACTS


def test_first_layer_is_not_predicted() -> None:
    assert FACTS.predicted_layers == FACTS.layers - 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation_function": "gelu"}, "activation 'gelu'"),
        ({"_remove_final_layer_norm": True}, "no final layer norm"),
        ({"enable_bias": False}, "enable_bias is false"),
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is false"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantised (gptq)"),
    ],
)
def test_variant_of_opt_is_refused_with_its_reason(change: dict[str, object], reason: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        OptFacts.from_config({**CONFIG, **change}, "small")
    assert reason in caught.value.message
    assert caught.value.hint


def test_all_reasons_are_given_when_there_are_several() -> None:
    with pytest.raises(UnsupportedError) as caught:
        OptFacts.from_config({**CONFIG, "enable_bias": False, "activation_function": "gelu"}, "small")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", None, 3])
def test_other_family_is_refused_by_name(family: object) -> None:
    with pytest.raises(UnsupportedError, match="model_type") as caught:
        OptFacts.from_config({"model_type": family}, "other")
    assert repr(family) in caught.value.message


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": 9, "word_embed_proj_dim": 9}, "hidden_size 9 is not a multiple of num_attention_heads 2"),
        ({"ffn_dim": 0}, "ffn_dim is 0"),
        ({"vocab_size": "20"}, "vocab_size is '20'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, expected at least 2"),
        ({"bos_token_id": 20}, "bos_token_id 20 lies outside the vocabulary of 20"),
        ({"eos_token_id": [2, 3]}, "eos_token_id is [2, 3]"),
        ({"eos_token_id": -1, "vocab_size": None}, "eos_token_id is -1"),
        ({"word_embed_proj_dim": 0}, "word_embed_proj_dim is 0, expected a positive whole number"),
        ({"do_layer_norm_before": "no"}, "do_layer_norm_before is 'no', expected true or false"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError) as caught:
        OptFacts.from_config({**CONFIG, **change}, "small")
    assert problem in caught.value.message
    assert caught.value.exit_code == 2


def test_missing_sizes_are_all_named() -> None:
    with pytest.raises(InputError) as caught:
        OptFacts.from_config({"model_type": "opt"}, "small")
    assert len(caught.value.problems) == 6


@given(
    st.dictionaries(
        st.sampled_from(sorted(CONFIG)), st.sampled_from([None, -1, 0, 1, 2, 7, 8, 1.5, True, "relu", "x", [2], []])
    )
)
def test_any_config_gives_facts_or_one_of_our_errors(change: dict[str, object]) -> None:
    facts = None
    with contextlib.suppress(InputError, UnsupportedError):
        facts = OptFacts.from_config({**CONFIG, **change}, "small")
    assert facts is None or facts.heads * facts.head_size == facts.hidden
