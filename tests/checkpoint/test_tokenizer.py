# SPDX-License-Identifier: Apache-2.0
"""Tokenizers in both forms, made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shadowc.checkpoint.tokenizer import (
    has_tokenizer,
    highest_token_id,
    load_tokenizer,
    tokenizer_files,
    write_tokenizer,
)
from shadowc.spec.errors import InputError
from tests.checkpoint.handmade import contents

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
PIECES = ["a", "b", "c", "d", "\u0120", "\u0120a", "ab", "cd", "abcd"]
MERGES = ["\u0120 a", "a b", "c d", "ab cd"]
VOCAB = {token: number for number, token in enumerate([*SPECIALS, *PIECES])}


def slow_form(folder: Path, **settings: object) -> Path:
    """vocab.json and merges.txt, as OPT was published."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(VOCAB))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def fast_form(folder: Path, *, start: bool, **settings: object) -> Path:
    """tokenizer.json, with or without a rule that puts </s> first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(vocab=VOCAB, merges=[tuple(merge.split(" ")) for merge in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.post_processor = (
        processors.TemplateProcessing(single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)])
        if start
        else processors.ByteLevel()
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def ids(folder: Path, text: str) -> list[int]:
    return list(load_tokenizer(folder)(text)["input_ids"])


def ids_of(*tokens: str) -> list[int]:
    return [VOCAB[token] for token in tokens]


def test_published_form_is_merged_and_starts_with_token_two(tmp_path: Path) -> None:
    assert ids(slow_form(tmp_path), "abcd a") == ids_of("</s>", "abcd", "\u0120a")
    assert VOCAB["</s>"] == 2


@pytest.mark.parametrize("start", [True, False])
def test_fast_form_starts_with_token_two_exactly_once(start: bool, tmp_path: Path) -> None:
    assert ids(fast_form(tmp_path, start=start), "abcd a") == ids_of("</s>", "abcd", "\u0120a")


@pytest.mark.parametrize("make", [slow_form, lambda folder, **settings: fast_form(folder, start=False, **settings)])
def test_start_is_left_out_when_the_checkpoint_says_so(make, tmp_path: Path) -> None:
    assert ids(make(tmp_path / "in", add_bos_token=False), "ab") == ids_of("ab")
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "in", tmp_path / "out")
    assert ids(tmp_path / "out", "ab") == ids_of("ab")


def test_empty_text_is_the_start_alone(tmp_path: Path) -> None:
    assert ids(slow_form(tmp_path), "") == [2]


def test_special_tokens_have_opts_usual_roles(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(slow_form(tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 1)


def test_special_tokens_are_read_from_settings_in_both_spellings(tmp_path: Path) -> None:
    slow_form(tmp_path, eos_token={"content": "<s>", "lstrip": False}, unk_token="<unk>")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<unk>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (0, 3, 3)


def test_special_tokens_are_dropped_from_text_on_request(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(slow_form(tmp_path))
    assert tokenizer.decode(tokenizer("ab cd").input_ids, skip_special_tokens=True) == "ab cd"


def test_batch_is_padded_on_the_left(tmp_path: Path) -> None:
    batch = load_tokenizer(slow_form(tmp_path))(["abcd a", "a"], padding=True)
    assert batch["attention_mask"] == [[1, 1, 1], [0, 1, 1]]
    assert batch["input_ids"][1] == ids_of("<pad>", "</s>", "a")


def test_truncation_and_padding_stored_in_the_file_are_switched_off(tmp_path: Path) -> None:
    fast_form(tmp_path, start=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert len(ids(tmp_path, "ab cd ab")) > 2


@pytest.mark.parametrize("make", [slow_form, lambda folder: fast_form(folder, start=False)])
def test_written_tokenizer_gives_the_same_ids_also_to_transformers(make, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make(tmp_path / "in")
    (tmp_path / "out").mkdir()
    written = write_tokenizer(tmp_path / "in", tmp_path / "out")
    assert sorted(path.name for path in written) == sorted(contents(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json") in written
    expected = ids(tmp_path / "in", "abcd a cd")
    assert ids(tmp_path / "out", "abcd a cd") == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)("abcd a cd").input_ids == expected


def test_written_tokenizer_is_byte_equal_when_repeated_and_when_rewritten(tmp_path: Path) -> None:
    slow_form(tmp_path / "in")
    for source, target in (("in", "one"), ("in", "two"), ("one", "three")):
        (tmp_path / target).mkdir()
        write_tokenizer(tmp_path / source, tmp_path / target)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_files_are_those_that_decide_the_ids(tmp_path: Path) -> None:
    slow_form(tmp_path, unk_token="<unk>")
    assert [path.name for path in tokenizer_files(tmp_path)] == ["merges.txt", "tokenizer_config.json", "vocab.json"]
    fast_form(tmp_path, start=True)
    assert [path.name for path in tokenizer_files(tmp_path)] == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("make", [slow_form, lambda folder: fast_form(folder, start=True)])
def test_highest_id_is_read_from_both_forms(make, tmp_path: Path) -> None:
    assert highest_token_id(make(tmp_path)) == len(VOCAB) - 1


def test_half_of_the_published_form_is_no_tokenizer(tmp_path: Path) -> None:
    (slow_form(tmp_path) / "merges.txt").unlink()
    assert not has_tokenizer(tmp_path)
    with pytest.raises(InputError, match="has no tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "merges.txt" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("vocab.json", "[]", "vocab.json: is not a JSON object"),
        ("vocab.json", "", "vocab.json: is not valid JSON"),
        ("vocab.json", '{"a": "b"}', "vocab.json: 'a' has the id 'b'"),
        ("vocab.json", '{"a": 0, "b": 1}', "vocab.json and merges.txt cannot be read"),
        ("merges.txt", "a b c\n", "merges.txt, line 1"),
        ("merges.txt", "#version: 0.2\na b\nab\n", "merges.txt, line 3"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: is not valid JSON"),
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token is 3"),
        ("tokenizer_config.json", '{"bos_token": "<start>"}', "the vocabulary lacks '<start>'"),
    ],
)
def test_damaged_tokenizer_is_refused_by_file(name: str, content: str, words: str, tmp_path: Path) -> None:
    slow_form(tmp_path / "in")
    (tmp_path / "in" / name).write_text(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError) as caught:
        write_tokenizer(tmp_path / "in", tmp_path / "out")
    assert words in caught.value.message
    assert caught.value.hint
    assert contents(tmp_path / "out") == {}
