# SPDX-License-Identifier: Apache-2.0
"""The dummy checkpoint that other runtimes read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.peers.checkpoint import write_checkpoint
from shadowc.checkpoint.resolve import resolve


@pytest.fixture
def written(tmp_path: Path) -> Path:
    config = {
        "model_type": "opt", "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "ffn_dim": 24,
        "num_attention_heads": 2, "max_position_embeddings": 16,
    }  # fmt: skip
    model = tmp_path / "opt-small"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    return write_checkpoint(str(model), tmp_path / "out")


def test_it_holds_the_numbers_that_the_compiler_makes_rounded_to_fp16(written: Path, tmp_path: Path) -> None:
    ours = resolve(str(tmp_path / "opt-small"), load_format="dummy").weights
    tensors = load_file(written / "model.safetensors")
    assert sorted([*tensors, "lm_head.weight"]) == list(ours.names())
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, ours.tensor(name).astype(np.float16), strict=True)


def test_shadowc_reads_it_as_the_same_model(written: Path, tmp_path: Path) -> None:
    assert resolve(str(written)).facts == resolve(str(tmp_path / "opt-small"), load_format="dummy").facts


def test_its_tokenizer_maps_names_to_their_numbers(written: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(written / "tokenizer.json"))
    assert tokenizer.encode("t7 t39 t0").ids == [7, 39, 0]


def test_what_is_there_is_not_written_again(written: Path, tmp_path: Path) -> None:
    before = (written / "model.safetensors").stat().st_mtime_ns
    assert write_checkpoint(str(tmp_path / "opt-small"), tmp_path / "out") == written
    assert (written / "model.safetensors").stat().st_mtime_ns == before
