# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the whole suite: a tiny random OPT in memory and as a checkpoint folder. Offline and seeded.

torch and transformers are imported inside the fixtures: tests/null runs without them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import OPTForCausalLM

TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "ffn_dim": 256,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "dropout": 0.0,
}
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in OPT's own vocabulary
TOKENIZER_TEXT = (
    "A sparse engine reads the weights of the heads and neurons that a token needs, and no others.",
    "The quick brown fox jumps over the lazy dog; the dog, being lazy, lets the fox jump again.",
    "One neuron is one record, one head is one record, and a record that is not read costs nothing.",
)


# How long an example takes tells of the machine, and of what is imported meanwhile.
settings.register_profile("shadowc", deadline=None)
settings.load_profile("shadowc")

SLOW_SECONDS = 1200
"""Limit of a slow test that names none: some compile, some run a suite of their own, on whatever machine there is."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


@pytest.fixture(scope="session")
def tiny_model() -> OPTForCausalLM:
    """A random OPT whose masks matter: weights large enough that every head and neuron moves the logits.

    Shared by the session: do not change it; take a `copy.deepcopy` where a test must.
    """
    return random_model(TINY)


def random_model(config: Mapping[str, Any]) -> OPTForCausalLM:
    """A model whose weights are so large that every part of it moves the logits."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    with torch.random.fork_rng():
        model = OPTForCausalLM(OPTConfig(**config, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.3 if name.endswith(".bias") else 0.15))
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model: OPTForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a folder: config.json, model.safetensors and a byte-level BPE tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("tiny") / "opt-tiny"
    tiny_model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


LLAMA = {
    "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 256, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def llama_model() -> Any:
    """A random Llama-type model, two query heads to a head of keys and values; every part of it moves the logits.

    Shared: take a `copy.deepcopy` to change it.
    """
    return random_llama(LLAMA)


def random_llama(config: Mapping[str, Any]) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else 0.2 * noise)
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def llama_folder(llama_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama-type model as a folder with a tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("llama") / "llama-tiny"
    llama_model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE that puts </s> in front of a text, as OPT's tokenizer does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": TINY["max_position_embeddings"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
