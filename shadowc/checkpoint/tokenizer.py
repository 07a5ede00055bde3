# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a checkpoint or engine folder, always as a fast one, without the network.

In: a folder with tokenizer.json, or with the vocab.json and merges.txt that OPT was published with, and with what a
fine-tune added to either. Out: a transformers tokenizer that puts `</s>` (id 2) in front of every text, as OPT was
trained, and pads on the left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shadowc.checkpoint.added_tokens import ADDED_FILE, AddedTokenRow, added_rows, extend_vocabulary, register
from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

FAST_FILE = "tokenizer.json"
VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"

_HINT = "copy tokenizer.json, or vocab.json and merges.txt, from the original checkpoint"
_USUAL = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}


@dataclass(frozen=True, slots=True)
class _Specials:
    """What is said beside the vocabulary."""

    tokens: Mapping[str, str]
    """The special tokens by role."""
    starts_text: bool
    """Whether a text starts with the first of them."""
    prefix_space: bool
    """Whether a space is put in front of a text; the files of the published form alone do not say so."""
    added: tuple[AddedTokenRow, ...]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer in one of the two forms."""
    return (folder / FAST_FILE).is_file() or ((folder / VOCAB_FILE).is_file() and (folder / MERGES_FILE).is_file())


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The files that decide what the tokenizer of a folder does, sorted by name."""
    main = (FAST_FILE,) if (folder / FAST_FILE).is_file() else (MERGES_FILE, VOCAB_FILE)
    names = sorted((*main, SETTINGS_FILE, SPECIAL_FILE, ADDED_FILE))
    return tuple(path for name in names if (path := folder / name).is_file())


def highest_token_id(folder: Path) -> int:
    """The highest id that the tokenizer of a folder can give, read without loading it.

    Raises:
        InputError: its file is damaged.
    """
    highest = max((row.id for row in _read_specials(folder).added), default=-1)
    if not (folder / FAST_FILE).is_file():
        return max((highest, *_read_vocab(folder).values()))
    content = _read_json(folder / FAST_FILE)
    model, added = content.get("model"), content.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return max((highest, *(number for number in ids if isinstance(number, int))))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a folder.

    Raises:
        InputError: there is none, or its files are damaged.
    """
    from transformers import PreTrainedTokenizerFast

    specials = _read_specials(folder)
    tokenizer = _read_tokenizer(folder, specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **_present(specials, tokenizer),
    )


def write_tokenizer(folder_in: Path, folder_out: Path) -> tuple[Path, ...]:
    """Write tokenizer.json and tokenizer_config.json for an engine folder, whatever form the checkpoint has.

    Returns:
        The files written; equal input gives equal bytes.

    Raises:
        InputError: the checkpoint's tokenizer is missing or damaged.
    """
    specials = _read_specials(folder_in)
    tokenizer = _read_tokenizer(folder_in, specials)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": specials.starts_text,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **_present(specials, tokenizer),
    }
    contents = {FAST_FILE: tokenizer.to_str(pretty=True), SETTINGS_FILE: json.dumps(settings, sort_keys=True, indent=1)}
    for name, content in contents.items():
        (folder_out / name).write_text(content + "\n", encoding="utf-8")
    return tuple(folder_out / name for name in contents)


def _read_specials(folder: Path) -> _Specials:
    settings, named, listed = (
        _read_json(path) if (path := folder / name).is_file() else {}
        for name in (SETTINGS_FILE, SPECIAL_FILE, ADDED_FILE)
    )
    tokens: dict[str, str] = {}
    for role, usual in _USUAL.items():
        value = settings.get(role) or named.get(role) or usual
        content = value.get("content") if isinstance(value, dict) else value
        if not isinstance(content, str):
            raise InputError(f"{folder}: {role} is {value!r}, expected a token", hint=_HINT)
        tokens[role] = content
    special = {*tokens.values(), *_more_specials(settings), *_more_specials(named)}
    return _Specials(
        tokens,
        starts_text=settings.get("add_bos_token") is not False,
        prefix_space=settings.get("add_prefix_space") is True,
        added=added_rows(folder, settings, listed, special),
    )


def _more_specials(settings: Mapping[str, object]) -> tuple[str, ...]:
    """Special tokens without a role, in the spellings of older and newer transformers."""
    found: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = settings.get(key)
        for value in values if isinstance(values, list) else ():
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found.append(content)
    return tuple(found)


def _read_tokenizer(folder: Path, specials: _Specials) -> Tokenizer:
    from tokenizers import Tokenizer

    if not has_tokenizer(folder):
        raise InputError(
            f"{folder}: has no tokenizer, expected {FAST_FILE}, or {VOCAB_FILE} and {MERGES_FILE}", hint=_HINT
        )
    path = folder / FAST_FILE
    try:
        tokenizer = (
            Tokenizer.from_str(path.read_text(encoding="utf-8")) if path.is_file() else _from_bpe(folder, specials)
        )
    except InputError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower for damaged content
        source = path.name if path.is_file() else f"{VOCAB_FILE} and {MERGES_FILE}"
        raise InputError(f"{folder}: {source} cannot be read as a tokenizer: {error}", hint=_HINT) from error
    register(folder, tokenizer, specials.added)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _ensure_start(tokenizer, folder, specials)
    return tokenizer


def _from_bpe(folder: Path, specials: _Specials) -> Tokenizer:
    """Build the fast byte-level BPE from the two files of the slow one, as OPT's own code does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = _read_vocab(folder)
    extend_vocabulary(folder, vocab, specials.added)
    lines = (folder / MERGES_FILE).read_text(encoding="utf-8").split("\n")
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise InputError(f"{folder / MERGES_FILE}, line {number}: expected two symbols, found {line!r}", hint=_HINT)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=specials.prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    added = {row.content for row in specials.added}
    known = [token for token in sorted({*specials.tokens.values(), "<s>"} - added) if token in vocab]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in known])
    return tokenizer


def _ensure_start(tokenizer: Tokenizer, folder: Path, specials: _Specials) -> None:
    """Make every text start with the bos token, unless the checkpoint says explicitly that it does not."""
    from tokenizers import processors

    if not specials.starts_text:
        return
    token = specials.tokens["bos_token"]
    start = tokenizer.token_to_id(token)
    if start is None:
        raise InputError(f"{folder}: the vocabulary lacks {token!r}, with which an OPT text starts", hint=_HINT)
    if tokenizer.encode("a").ids[:1] == [start]:
        return
    template = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, start)]
    )
    before = tokenizer.post_processor
    tokenizer.post_processor = template if before is None else processors.Sequence([before, template])


def _present(specials: _Specials, tokenizer: Tokenizer) -> dict[str, str]:
    return {role: token for role, token in specials.tokens.items() if tokenizer.token_to_id(token) is not None}


def _read_vocab(folder: Path) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for token, number in _read_json(folder / VOCAB_FILE).items():
        if not isinstance(number, int):
            raise InputError(f"{folder / VOCAB_FILE}: {token!r} has the id {number!r}, expected a number", hint=_HINT)
        vocab[token] = number
    return vocab


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", hint="check its permissions") from error
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON: {error}", hint=_HINT) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a JSON object", hint=_HINT)
    return content
