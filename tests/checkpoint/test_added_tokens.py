# SPDX-License-Identifier: Apache-2.0
"""Tokens that a fine-tune added, in every form in which transformers has saved them; transformers is the reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shadowc.checkpoint.tokenizer import highest_token_id, load_tokenizer, tokenizer_files, write_tokenizer
from shadowc.spec.errors import InputError
from tests.checkpoint.test_tokenizer import VOCAB, fast_form, slow_form

FIRST = len(VOCAB)
NEW = {"<user>": FIRST, "newword": FIRST + 1}
TEXT = "ab<user> cd newword ab"
SETTINGS = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}


def flags(content: str, *, special: bool, **others: bool) -> dict[str, object]:
    usual = {"lstrip": False, "rstrip": False, "normalized": not special, "single_word": False}
    return {"content": content, "special": special, **usual, **others}


def newer_slow(folder: Path, **new_word: bool) -> Path:
    """vocab.json, merges.txt, and the added tokens in tokenizer_config.json."""
    decoder = {
        "1": flags("<pad>", special=True),
        "2": flags("</s>", special=True),
        str(FIRST): flags("<user>", special=True),
        str(FIRST + 1): flags("newword", special=False, **new_word),
    }
    return slow_form(
        folder,
        tokenizer_class="GPT2Tokenizer",
        added_tokens_decoder=decoder,
        additional_special_tokens=["<user>"],
        **SETTINGS,
    )


def older_slow(folder: Path) -> Path:
    """vocab.json, merges.txt, added_tokens.json and special_tokens_map.json."""
    slow_form(folder, tokenizer_class="GPT2Tokenizer", **SETTINGS)
    (folder / "added_tokens.json").write_text(json.dumps(NEW))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<user>"]}))
    return folder


def fast(folder: Path) -> Path:
    """tokenizer.json with the added tokens in it, as save_pretrained writes it."""
    from tokenizers import AddedToken, Tokenizer

    fast_form(folder, start=True, tokenizer_class="PreTrainedTokenizerFast", **SETTINGS)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<user>", special=True)])
    tokenizer.add_tokens([AddedToken("newword")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def half_fast(folder: Path) -> Path:
    """A tokenizer.json from before the tokens were added, with added_tokens.json beside it."""
    fast_form(folder, start=True, tokenizer_class="PreTrainedTokenizerFast", **SETTINGS)
    (folder / "added_tokens.json").write_text(json.dumps(NEW))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<user>"]}))
    return folder


FORMS = [newer_slow, older_slow, fast, half_fast]


@pytest.mark.parametrize("make", FORMS)
def test_added_tokens_have_the_ids_that_were_trained(make: Callable[[Path], Path], tmp_path: Path) -> None:
    ids = load_tokenizer(make(tmp_path))(TEXT).input_ids
    assert ids[:3] == [VOCAB["</s>"], VOCAB["ab"], NEW["<user>"]]
    assert NEW["newword"] in ids
    assert ids[-1] in (VOCAB["ab"], VOCAB["b"])


@pytest.mark.parametrize("make", FORMS)
def test_ids_and_texts_are_those_of_transformers(make: Callable[[Path], Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(make(tmp_path)), AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in (TEXT, "<user>newword", "a newword<user>", "anewworda", "</s><pad>", "newwor <use>"):
        found, expected = ours(text).input_ids, theirs(text, add_special_tokens=False).input_ids
        assert found == [VOCAB["</s>"], *expected], text
        assert ours.decode(found[1:]) == theirs.decode(expected)


@pytest.mark.parametrize("make", FORMS)
def test_special_ones_are_left_out_of_text_on_request_and_others_are_not(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(make(tmp_path))
    assert tokenizer.decode(tokenizer(TEXT).input_ids, skip_special_tokens=True) == TEXT.replace("<user>", "")


@pytest.mark.parametrize("make", FORMS)
def test_written_tokenizer_keeps_them(make: Callable[[Path], Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_tokenizer(make(tmp_path / "in"), tmp_path / "out")
    before, after = load_tokenizer(tmp_path / "in"), load_tokenizer(tmp_path / "out")
    assert after(TEXT).input_ids == before(TEXT).input_ids
    assert after.decode([NEW["<user>"], VOCAB["ab"]], skip_special_tokens=True) == "ab"
    assert highest_token_id(tmp_path / "out") == max(NEW.values())


@pytest.mark.parametrize("make", FORMS)
def test_highest_id_counts_them(make: Callable[[Path], Path], tmp_path: Path) -> None:
    assert highest_token_id(make(tmp_path)) == max(NEW.values())


@pytest.mark.parametrize("make", [older_slow, half_fast])
def test_their_file_is_part_of_the_identity(make: Callable[[Path], Path], tmp_path: Path) -> None:
    assert "added_tokens.json" in [path.name for path in tokenizer_files(make(tmp_path))]


@pytest.mark.parametrize(
    ("flag", "text"), [("lstrip", "ab newword"), ("rstrip", "newword ab"), ("single_word", "anewword")]
)
def test_flags_of_an_added_token_are_kept(flag: str, text: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    newer_slow(tmp_path / "plain")
    newer_slow(tmp_path / "flagged", **{flag: True})
    found = {name: load_tokenizer(tmp_path / name)(text).input_ids for name in ("plain", "flagged")}
    theirs = AutoTokenizer.from_pretrained(tmp_path / "flagged", local_files_only=True)
    assert found["flagged"] != found["plain"]
    assert found["flagged"][1:] == theirs(text, add_special_tokens=False).input_ids


def test_ids_with_a_gap_are_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rows that pad the embedding to a round number may lie between the old tokens and the new ones."""
    slow_form(tmp_path / "in", **SETTINGS)
    (tmp_path / "in" / "added_tokens.json").write_text(json.dumps({"<far>": FIRST + 7}))
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "in", tmp_path / "out")
    for folder in ("in", "out"):
        assert load_tokenizer(tmp_path / folder)("ab<far>").input_ids[-1] == FIRST + 7
        assert highest_token_id(tmp_path / folder) == FIRST + 7
    assert capfd.readouterr().out == ""


def test_space_in_front_of_a_text_is_put_where_the_settings_say_so(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    slow_form(tmp_path, tokenizer_class="GPT2Tokenizer", add_prefix_space=True, **SETTINGS)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    found = load_tokenizer(tmp_path)("a b").input_ids
    assert found[1] == VOCAB["\u0120a"]
    assert found[1:] == theirs("a b", add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("added_tokens.json", '{"<user>": "9"}', "'<user>' has the id '9'"),
        ("added_tokens.json", '{"<user>": -1}', "'<user>' has the id -1"),
        ("added_tokens.json", '{"<x>": 20, "<y>": 20}', "'<x>' and '<y>' have one id, 20"),
        ("added_tokens.json", '{"<x>": 5}', "'<x>' and 'b' have one id, 5"),
        ("added_tokens.json", '{"ab": 20}', "gives the added token 'ab' the id 10, expected 20"),
        ("added_tokens.json", "[]", "is not a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "<x>"}}', "added token x"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"20": {}}}', "added token 20"),
    ],
)
def test_contradictions_are_refused_by_token(name: str, content: str, words: str, tmp_path: Path) -> None:
    slow_form(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert words in caught.value.message
    assert caught.value.hint


def test_two_files_that_disagree_about_an_id_are_refused(tmp_path: Path) -> None:
    newer_slow(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<user>": FIRST + 5}))
    with pytest.raises(InputError, match=r"<user>.*another"):
        load_tokenizer(tmp_path)


def test_fast_tokenizer_that_gives_an_added_token_another_id_is_refused(tmp_path: Path) -> None:
    fast_form(tmp_path, start=True)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<user>": FIRST + 5}))
    with pytest.raises(InputError, match=f"the id {FIRST}, expected {FIRST + 5}"):
        load_tokenizer(tmp_path)
