# SPDX-License-Identifier: Apache-2.0
"""What the shared fixtures promise to the other tests."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import settings
from safetensors.torch import load_file
from transformers import AutoTokenizer, OPTForCausalLM

from tests.conftest import TINY

TOKENIZED = "a lazy neuron"


def test_tiny_checkpoint_holds_the_tiny_model(tiny_checkpoint: Path, tiny_model: OPTForCausalLM) -> None:
    stored = load_file(tiny_checkpoint / "model.safetensors")
    state = tiny_model.state_dict()
    assert stored.keys() == state.keys() - {"lm_head.weight"}
    assert all(torch.equal(stored[name], state[name]) for name in stored)


def test_tiny_checkpoint_is_readable_by_transformers(tiny_checkpoint: Path, tiny_model: OPTForCausalLM) -> None:
    model = OPTForCausalLM.from_pretrained(tiny_checkpoint, local_files_only=True)
    ids = torch.arange(4, 20)[None]
    torch.testing.assert_close(model(ids).logits, tiny_model(ids).logits)


def test_tiny_tokenizer_starts_with_the_end_token_and_restores_the_text(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint, local_files_only=True)
    ids = tokenizer(TOKENIZED)["input_ids"]
    assert ids[0] == 2
    assert max(ids) < TINY["vocab_size"] == len(tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True) == TOKENIZED


def test_no_property_fails_because_a_machine_is_slow() -> None:
    assert settings().deadline is None
