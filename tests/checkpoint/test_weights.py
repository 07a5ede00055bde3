# SPDX-License-Identifier: Apache-2.0
"""Reading safetensors, and every fault of weight files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowc.checkpoint import weights as module
from shadowc.checkpoint.opt import EMBEDDING, HEAD, parameter_shapes
from shadowc.checkpoint.stored import read_header
from shadowc.checkpoint.weights import SafetensorsWeights, open_weights
from shadowc.spec.errors import InputError, ShadowcError, UnsupportedError
from tests.checkpoint.handmade import (
    FACTS,
    contents,
    pack,
    some_tensors,
    write_pickled_shards,
    write_shards,
    write_single,
)

LAST_SHARD = "model-00003-of-00003.safetensors"
A_WEIGHT = "model.decoder.layers.1.fc1.weight"


def refusal(folder: Path, kind: type[ShadowcError]) -> ShadowcError:
    """The error that opening the folder gives; nothing may have been written."""
    before = contents(folder)
    with pytest.raises(kind) as caught:
        open_weights(folder, FACTS)
    assert type(caught.value) is kind
    assert caught.value.hint
    assert contents(folder) == before
    return caught.value


def opened(folder: Path) -> SafetensorsWeights:
    return open_weights(folder, FACTS).source


@pytest.mark.parametrize("write", [write_single, write_shards])
def test_tensors_come_back_bit_for_bit_when_stored_as_float32(write, tmp_path: Path) -> None:
    tensors = some_tensors()
    weights = opened(write(tmp_path, tensors))
    assert weights.names() == tuple(sorted((*tensors, HEAD)))
    for name, tensor in tensors.items():
        assert weights.tensor(name).dtype == np.float32
        assert np.array_equal(weights.tensor(name), tensor)


def test_tensors_equal_what_the_safetensors_library_reads(tiny_checkpoint: Path) -> None:
    from safetensors.numpy import load_file

    from shadowc.checkpoint.resolve import resolve

    weights = resolve(str(tiny_checkpoint)).weights
    theirs = load_file(tiny_checkpoint / "model.safetensors")
    assert set(weights.names()) == {*theirs, HEAD}
    assert all(np.array_equal(weights.tensor(name), theirs[name]) for name in theirs)


def test_files_of_the_checkpoint_are_returned(tmp_path: Path) -> None:
    files = open_weights(write_shards(tmp_path, some_tensors()), FACTS).files
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_every_half_becomes_the_equal_float(tmp_path: Path) -> None:
    halves = np.arange(65536, dtype="<u2").view("<f2")
    (tmp_path / "a").write_bytes(pack({EMBEDDING: halves}))
    weights = SafetensorsWeights(read_header(tmp_path / "a")[0])
    assert np.array_equal(weights.tensor(EMBEDDING), halves.astype(np.float32), equal_nan=True)
    assert weights.count_nonfinite(EMBEDDING) == int(np.count_nonzero(~np.isfinite(halves)))


def test_every_bfloat16_becomes_the_equal_float(tmp_path: Path) -> None:
    bits = np.arange(65536, dtype="<u2")
    (tmp_path / "a").write_bytes(pack({EMBEDDING: bits}))
    weights = SafetensorsWeights(read_header(tmp_path / "a")[0])
    floats = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(weights.tensor(EMBEDDING).view(np.uint32), floats.view(np.uint32))
    assert weights.count_nonfinite(EMBEDDING) == int(np.count_nonzero(~np.isfinite(floats)))


def test_mixed_types_are_all_read_as_float32(tmp_path: Path) -> None:
    tensors = some_tensors()
    tensors[EMBEDDING] = tensors[EMBEDDING].astype("<f2")
    weights = opened(write_single(tmp_path, tensors))
    assert np.array_equal(weights.tensor(EMBEDDING), tensors[EMBEDDING].astype(np.float32))


def test_bare_model_is_read_under_canonical_names(tmp_path: Path) -> None:
    tensors = some_tensors()
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    weights = opened(write_shards(tmp_path, bare))
    assert np.array_equal(weights.tensor(A_WEIGHT), tensors[A_WEIGHT])


def test_tensor_is_the_callers_own_copy(tmp_path: Path) -> None:
    weights = opened(write_single(tmp_path, some_tensors()))
    weights.tensor(A_WEIGHT)[:] = 0
    assert weights.tensor(A_WEIGHT).any()


def test_file_is_not_kept_mapped_after_a_read(tmp_path: Path) -> None:
    weights = opened(write_single(tmp_path, some_tensors()))
    for name in weights.names():
        weights.tensor(name)
        weights.count_nonfinite(name)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_head_is_the_embedding_when_the_file_lacks_it(tmp_path: Path) -> None:
    weights = opened(write_single(tmp_path, some_tensors()))
    assert np.array_equal(weights.tensor(HEAD), weights.tensor(EMBEDDING))


def test_embedding_is_the_head_when_only_that_was_saved(tmp_path: Path) -> None:
    tensors = some_tensors()
    saved = tensors | {HEAD: tensors[EMBEDDING]}
    del saved[EMBEDDING]
    assert np.array_equal(opened(write_single(tmp_path, saved)).tensor(EMBEDDING), tensors[EMBEDDING])


@pytest.mark.parametrize("kind", ["<f4", "<f2"])
def test_head_equal_to_the_embedding_is_accepted(kind: str, tmp_path: Path) -> None:
    tensors = some_tensors() | {EMBEDDING: np.full((FACTS.vocab, FACTS.hidden), 0.5, "<f4")}
    write_shards(tmp_path, tensors | {HEAD: tensors[EMBEDDING].astype(kind)})
    assert np.array_equal(opened(tmp_path).tensor(HEAD), tensors[EMBEDDING])


@pytest.mark.parametrize("place", [0, 77, -1])
def test_head_that_differs_in_one_number_is_refused_by_name(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", 7)
    tensors = some_tensors()
    head = tensors[EMBEDDING].copy()
    head.flat[place] += np.float32(1)
    error = refusal(write_single(tmp_path, tensors | {HEAD: head}), UnsupportedError)
    assert f"{HEAD} in model.safetensors differs from {EMBEDDING}" in error.message
    assert HEAD in error.hint


def test_head_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    head = np.zeros((FACTS.vocab + 1, FACTS.hidden), "<f4")
    assert HEAD in refusal(write_single(tmp_path, some_tensors() | {HEAD: head}), UnsupportedError).message


@pytest.mark.parametrize(
    "name",
    [
        "decoder.version",
        "model.decoder.version",
        "decoder.embed_positions._float_tensor",
        "model.decoder.embed_positions._float_tensor",
        "model.decoder.embed_positions.position_ids",
        "model.decoder.layers.0.self_attn.rotary_emb.inv_freq",
    ],
)
def test_buffers_that_nothing_is_computed_from_are_ignored(name: str, tmp_path: Path) -> None:
    write_single(tmp_path, some_tensors() | {name: np.zeros(1, "<f4")})
    found = open_weights(tmp_path, FACTS)
    assert found.source.names() == tuple(sorted((*some_tensors(), HEAD)))
    assert found.unused == ()


def test_tensors_beside_the_language_model_are_reported(tmp_path: Path) -> None:
    extra = {name: np.zeros(1, "<f4") for name in ("v_head.summary.weight", "score.weight")}
    assert open_weights(write_single(tmp_path, some_tensors() | extra), FACTS).unused == (
        "score.weight",
        "v_head.summary.weight",
    )


@pytest.mark.parametrize(
    "name",
    [
        f"model.decoder.layers.{FACTS.layers}.fc1.weight",
        "decoder.project_in.weight",
        "lm_head.bias",
        "model.decoder.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_tensors_of_the_model_that_config_does_not_account_for_are_refused(name: str, tmp_path: Path) -> None:
    error = refusal(write_single(tmp_path, some_tensors() | {name: np.zeros(1, "<f4")}), InputError)
    assert name in error.message
    assert "config.json" in error.message


def test_names_of_a_wrapper_are_shown_when_the_expected_ones_are_missing(tmp_path: Path) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in some_tensors().items()}
    problems = refusal(write_single(tmp_path, wrapped), InputError).problems
    assert any("such as module.model.decoder" in problem for problem in problems)


def test_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    tensors = some_tensors() | {A_WEIGHT.removeprefix("model."): np.zeros((12, 8), "<f4")}
    assert f"and also {A_WEIGHT}" in refusal(write_single(tmp_path, tensors), InputError).message


def test_embedding_with_other_rows_than_the_vocabulary_is_refused_with_both_numbers(tmp_path: Path) -> None:
    tensors = some_tensors()
    tensors[EMBEDDING] = np.zeros((FACTS.vocab + 1, FACTS.hidden), "<f4")
    message = refusal(write_single(tmp_path, tensors), InputError).message
    assert f"has shape [21, 8], expected [20, 8] (vocab_size is {FACTS.vocab})" in message


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = some_tensors()
    del tensors[A_WEIGHT]
    assert refusal(write_single(tmp_path, tensors), InputError).problems == (f"{A_WEIGHT} is missing",)


def test_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    tensors = some_tensors()
    tensors[A_WEIGHT] = tensors[A_WEIGHT].T.copy()
    message = refusal(write_single(tmp_path, tensors), InputError).message
    assert f"model.safetensors: {A_WEIGHT} has shape [8, 12], expected [12, 8]" in message


def test_missing_shard_is_named_once_and_its_tensors_are_not(tmp_path: Path) -> None:
    write_shards(tmp_path, some_tensors())
    (tmp_path / LAST_SHARD).unlink()
    error = refusal(tmp_path, InputError)
    assert len(error.problems) == 1
    assert error.problems[0].startswith(f"{LAST_SHARD}: is missing")


@pytest.mark.parametrize("write", [write_shards, write_pickled_shards])
def test_all_missing_shards_are_named_at_once(write, tmp_path: Path) -> None:
    write(tmp_path, some_tensors(), shards=12)
    gone = sorted(path.name for path in tmp_path.glob("*-of-*"))[2:]
    for name in gone:
        (tmp_path / name).unlink()
    error = refusal(tmp_path, InputError)
    assert len(error.problems) == 1
    assert all(name in error.message for name in gone)
    assert "are missing" in error.message


def test_shard_truncated_by_one_byte_is_named_with_both_sizes(tmp_path: Path) -> None:
    write_shards(tmp_path, some_tensors())
    whole = (tmp_path / LAST_SHARD).read_bytes()
    (tmp_path / LAST_SHARD).write_bytes(whole[:-1])
    error = refusal(tmp_path, InputError)
    expected = f"{LAST_SHARD}: truncated: its tensors need {len(whole)} bytes, the file has {len(whole) - 1}"
    assert error.problems == (expected,)


@settings(max_examples=50)
@given(st.data())
def test_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = pack(some_tensors())
    cut = data.draw(st.integers(0, len(whole) - 1))
    folder = tmp_path_factory.mktemp("cut")
    (folder / "model.safetensors").write_bytes(whole[:cut])
    error = refusal(folder, InputError)
    assert "model.safetensors" in error.message
    assert len(error.problems) == 1


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path) -> None:
    write_single(tmp_path, some_tensors())
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "1 bytes lie behind its last tensor" in refusal(tmp_path, InputError).message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated: 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"PK\x03\x04 a zip file, as torch.save writes", "is not a safetensors file"),
        (struct.pack("<Q", 4) + b"{{{{", "not valid JSON"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 3) + b"\xff\xfe\xfd", "not valid JSON"),
    ],
)
def test_file_of_another_kind_is_refused_in_words(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    error = refusal(tmp_path, InputError)
    assert words in error.message
    assert len(error.problems) == 1


@pytest.mark.parametrize(
    "entry",
    [
        3,
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": 1, "shape": [1], "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
    ],
)
def test_damaged_entry_of_the_header_is_named(entry: object, tmp_path: Path) -> None:
    text = json.dumps({A_WEIGHT: entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert f"the header's entry of {A_WEIGHT} is damaged" in refusal(tmp_path, InputError).message


def test_quantised_type_is_refused_by_tensor_and_type(tmp_path: Path) -> None:
    tensors = some_tensors()
    tensors[A_WEIGHT] = tensors[A_WEIGHT].astype("i1")
    message = refusal(write_single(tmp_path, tensors), UnsupportedError).message
    assert f"{A_WEIGHT} has type I8" in message


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    tensors = some_tensors()
    del tensors[A_WEIGHT]
    tensors[EMBEDDING] = tensors[EMBEDDING][:-1].copy()
    write_shards(tmp_path, tensors)
    (tmp_path / LAST_SHARD).unlink()
    second = tmp_path / "model-00002-of-00003.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    problems = refusal(tmp_path, InputError).problems
    for part in (LAST_SHARD, "model-00002-of-00003.safetensors: truncated", f"{A_WEIGHT} is missing", EMBEDDING):
        assert any(part in problem for problem in problems)


def test_long_list_of_faults_is_cut_in_the_message_and_whole_in_the_problems(tmp_path: Path) -> None:
    error = refusal(write_single(tmp_path, {}), InputError)
    assert len(error.problems) == len(parameter_shapes(FACTS))
    assert error.message.endswith(f"and {len(error.problems) - 5} more")
