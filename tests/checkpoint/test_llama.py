# SPDX-License-Identifier: Apache-2.0
"""Llama-type checkpoints: facts, folders, GGUF files, and plain refusals of what is not handled."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shadowc.checkpoint import gguf as module
from shadowc.checkpoint.facts import facts_of
from shadowc.checkpoint.finite import check_finite
from shadowc.checkpoint.llama import LlamaFacts, config_dict, parameter_shapes
from shadowc.checkpoint.models import resolve_model, tokenizer_of
from shadowc.checkpoint.opt import OptFacts
from shadowc.checkpoint.resolve import Checkpoint, resolve
from shadowc.sparsity.reference import load_torch_model
from shadowc.spec.errors import InputError, SetupError, ShadowcError, UnsupportedError
from tests.conftest import LLAMA

SMOLLM2 = {  # config.json of HuggingFaceTB/SmolLM2-135M, spelt as transformers 4 did
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
    "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
    "vocab_size": 49152, "bos_token_id": 0, "eos_token_id": 0, "pretraining_tp": 1,
}  # fmt: skip


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(llama_folder, tmp_path / "llama-tiny"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHADOWC_CACHE", str(tmp_path / "cache"))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def write_gguf(path: Path, model: Any, folder: Path, architecture: str = "llama", *, turned: bool = True) -> None:
    """The model as llama.cpp stores it: float32, rows of q and k in the order of its rotary positions."""
    gguf = pytest.importorskip("gguf")
    config, content = model.config, json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocab = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab + [f"<unused{n}>" for n in range(config.vocab_size - len(vocab))])
    writer.add_token_types([3] * 4 + [1] * (config.vocab_size - 4))
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(config.pad_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in name and turned:
                value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        stem, _, ending = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(4, 320, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids).logits


# --- facts -------------------------------------------------------------------------------------------------


def test_facts_are_those_of_a_published_config() -> None:
    facts = LlamaFacts.from_config(SMOLLM2, "smollm2")
    assert (facts.layers, facts.heads, facts.kv_heads, facts.head_size, facts.ffn) == (30, 9, 3, 64, 1536)
    assert (facts.bos, facts.eos, facts.pad, facts.positions, facts.tied) == (0, 0, 0, 8192, True)
    assert json.loads(facts.rope) == {"rope_theta": 100000, "rope_type": "default"}
    assert sum(np.prod(shape) for shape in parameter_shapes(facts).values()) == 134_515_008
    assert LlamaFacts.from_config(config_dict(facts), "smollm2") == facts
    assert facts_of(json.loads(json.dumps({name: getattr(facts, name) for name in facts.__slots__}))) == facts


def test_shapes_are_those_of_transformers(llama_model: Any) -> None:
    facts = LlamaFacts.from_config(llama_model.config.to_dict(), "tiny")
    theirs = {name: tuple(value.shape) for name, value in llama_model.named_parameters()}
    assert parameter_shapes(facts) == theirs
    assert list(parameter_shapes(facts)) == sorted(theirs)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"num_hidden_layers": 1}, InputError, "expected at least 2"),
        ({"num_key_value_heads": 3}, InputError, "not a multiple of num_key_value_heads 3"),
        ({"vocab_size": "many"}, InputError, "vocab_size is 'many'"),
        ({"bos_token_id": 999}, InputError, "bos_token_id is 999"),
        ({"hidden_act": "gelu"}, UnsupportedError, "activation 'gelu'"),
        ({"head_dim": 32}, UnsupportedError, "4 heads of 32"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedError, "already quantised"),
    ],
)
def test_a_config_that_cannot_be_used_says_why(
    folder: Path, changes: dict[str, Any], error: type[ShadowcError], says: str
) -> None:
    change_config(folder, **changes)
    with pytest.raises(error, match=says) as caught:
        resolve_model(str(folder))
    assert caught.value.hint


def test_all_findings_come_at_once() -> None:
    with pytest.raises(InputError) as caught:
        LlamaFacts.from_config({"model_type": "llama", "num_hidden_layers": 0}, "m")
    assert len(caught.value.problems) == 6


# --- folders -----------------------------------------------------------------------------------------------


def test_a_folder_is_resolved_with_its_weights_and_tokenizer(folder: Path, llama_model: Any) -> None:
    found = resolve_model(str(folder), offline=True)
    assert not isinstance(found, Checkpoint)
    assert found.facts == LlamaFacts.from_config(llama_model.config.to_dict(), "llama-tiny")
    stored = dict(llama_model.named_parameters())
    assert set(found.weights.names()) == set(stored)
    assert all(np.array_equal(found.weights.tensor(name), value.numpy()) for name, value in stored.items())
    assert tokenizer_of(found)("a fox", add_special_tokens=False)["input_ids"]
    check_finite(found)


def test_identity_is_of_facts_weights_and_tokenizer(folder: Path) -> None:
    before = resolve_model(str(folder)).identity
    assert resolve_model(str(Path(shutil.move(folder, folder.with_name("other"))))).identity == before
    change_config(folder.with_name("other"), rms_norm_eps=1e-3)
    assert resolve_model(str(folder.with_name("other"))).identity != before


def test_dummy_weights_have_the_models_shapes(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    found = resolve_model(str(folder), load_format="dummy", seed=3)
    shapes = {name: found.weights.tensor(name).shape for name in found.weights.names()}
    assert shapes == parameter_shapes(found.facts)
    assert found.weights.tensor("model.norm.weight").mean() == pytest.approx(1, abs=0.02)
    assert torch.isfinite(logits(load_torch_model(found))).all()


def test_weights_that_lack_a_tensor_are_refused_by_name(folder: Path) -> None:
    change_config(folder, attention_bias=True)
    with pytest.raises(InputError, match=r"q_proj\.bias is missing"):
        resolve_model(str(folder))


def test_what_is_no_llama_is_resolved_as_ever(tiny_checkpoint: Path) -> None:
    found = resolve_model(str(tiny_checkpoint))
    assert isinstance(found, Checkpoint)
    assert isinstance(found.facts, OptFacts)
    assert resolve_model("opt-125m", load_format="dummy").facts.family == "OPT"


# --- GGUF --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_gguf_file_is_the_model_that_it_was_made_of(
    llama_model: Any, llama_folder: Path, tmp_path: Path, named: str
) -> None:
    place = tmp_path / "stored"
    place.mkdir()
    write_gguf(place / "small.gguf", llama_model, llama_folder)
    found = resolve_model(str(place if named == "folder" else place / "small.gguf"))
    assert found.facts.name == "small"
    assert (found.facts.bos, found.facts.eos, found.facts.tied) == (LLAMA["bos_token_id"], LLAMA["eos_token_id"], False)
    torch.testing.assert_close(logits(load_torch_model(found)), logits(llama_model), rtol=0, atol=2e-5)
    text = "the quick brown fox"
    tokenizers = [tokenizer_of(one) for one in (found, resolve_model(str(llama_folder)))]
    mine, theirs = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in tokenizers)
    assert mine == theirs
    assert resolve_model(str(place / "small.gguf")).identity == found.identity


def test_rows_of_q_and_k_in_another_order_would_be_noticed(
    llama_model: Any, llama_folder: Path, tmp_path: Path
) -> None:
    """Planted defect: the file holds them as transformers does, which is not how its reader takes them."""
    write_gguf(tmp_path / "m.gguf", llama_model, llama_folder, turned=False)
    found = logits(load_torch_model(resolve_model(str(tmp_path / "m.gguf"))))
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(found, logits(llama_model), rtol=0, atol=2e-5)


def test_a_folder_with_several_gguf_files_wants_one_named(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"2 GGUF files, expected one: a\.gguf, b\.gguf") as caught:
        resolve_model(str(tmp_path))
    assert "a.gguf" in caught.value.hint


def test_a_gguf_file_of_another_architecture_is_refused(llama_model: Any, llama_folder: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", llama_model, llama_folder, architecture="phi3")
    with pytest.raises(UnsupportedError, match="'phi3', expected 'llama'"):
        resolve_model(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"GGUF" + struct.pack("<IQQ", 3, 9, 9) + b"\xff" * 50])
def test_a_damaged_gguf_file_is_refused(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(InputError, match=r"m\.gguf") as caught:
        resolve_model(str(tmp_path / "m.gguf"))
    assert caught.value.hint == "download the file again"


def test_missing_packages_are_named_with_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("gguf_that_nobody_has", "accelerate"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(SetupError, match="gguf_that_nobody_has") as caught:
        resolve_model(str(tmp_path / "m.gguf"))
    assert caught.value.hint == "pip install 'shadowc[gguf]'"


def test_dummy_weights_of_a_gguf_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"need a folder with a config\.json"):
        resolve_model(str(tmp_path / "m.gguf"), load_format="dummy")


# --- where an engine is wanted -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "gguf file", "folder with a gguf file"])
def test_no_engine_is_made_of_it_and_the_refusal_says_what_works(folder: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "stored" / "m.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    place = {"folder": folder, "gguf file": file, "folder with a gguf file": file.parent}[kind]
    for load_format in ("auto", "dummy"):
        with pytest.raises(UnsupportedError, match=r"compiled from OPT models only.*collect, train") as caught:
            resolve(str(place), load_format=load_format)
        assert caught.value.hint == f"shadowc train --model {place}"
