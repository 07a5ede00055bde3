# SPDX-License-Identifier: Apache-2.0
"""Tokens that a fine-tune added to the vocabulary, as transformers writes them beside the tokenizer.

In: the `added_tokens_decoder` of tokenizer_config.json (newer) and added_tokens.json (older). Out: the tokens with
the ids whose rows of the embedding were trained for them; a tokenizer that would give others is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ADDED_FILE = "added_tokens.json"

_HINT = "copy the tokenizer files of the fine-tune again, all of them"


@dataclass(frozen=True, slots=True)
class AddedTokenRow:
    """One token that is matched in the text before it is split into pieces."""

    id: int
    content: str
    special: bool
    """Left out of decoded text on request."""
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True


def added_rows(
    folder: Path, settings: Mapping[str, object], listed: Mapping[str, object], specials: Collection[str]
) -> tuple[AddedTokenRow, ...]:
    """The added tokens of a folder, by id.

    Args:
        folder: for messages.
        settings: content of tokenizer_config.json.
        listed: content of added_tokens.json.
        specials: tokens that are special although added_tokens.json cannot say so.

    Raises:
        InputError: an entry is damaged, or two tokens have one id, or one token two.
    """
    rows = [_row(folder, number, entry) for number, entry in _decoder(folder, settings).items()]
    known = {row.content for row in rows}
    for content, number in listed.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise InputError(f"{folder / ADDED_FILE}: {content!r} has the id {number!r}, expected a number", hint=_HINT)
        if content not in known:
            special = content in specials
            rows.append(AddedTokenRow(number, content, special, normalized=not special))
        elif all(row.id != number for row in rows if row.content == content):
            raise InputError(
                f"{folder}: {ADDED_FILE} gives {content!r} the id {number}, tokenizer_config.json another", hint=_HINT
            )
    rows.sort(key=lambda row: row.id)
    for row, following in pairwise(rows):
        if row.id == following.id:
            raise InputError(f"{folder}: {row.content!r} and {following.content!r} have one id, {row.id}", hint=_HINT)
    return tuple(rows)


def extend_vocabulary(folder: Path, vocab: dict[str, int], rows: Sequence[AddedTokenRow]) -> None:
    """Put the added tokens into a vocabulary under their ids, in place; raises InputError where an id is taken."""
    owners = {number: token for token, number in vocab.items()}
    for row in rows:
        if vocab.get(row.content, row.id) != row.id:
            raise _contradiction(folder, row, vocab[row.content])
        if owners.get(row.id, row.content) != row.content:
            raise InputError(f"{folder}: {row.content!r} and {owners[row.id]!r} have one id, {row.id}", hint=_HINT)
        vocab[row.content] = row.id


def register(folder: Path, tokenizer: Tokenizer, rows: Sequence[AddedTokenRow]) -> None:
    """Make a tokenizer match the added tokens that it does not match yet.

    Raises:
        InputError: it gives one of them another id than the checkpoint does.
    """
    from tokenizers import AddedToken

    matched = tokenizer.get_added_tokens_decoder()
    for row in rows:
        if row.id not in matched or matched[row.id].content != row.content:
            token = AddedToken(
                row.content,
                single_word=row.single_word,
                lstrip=row.lstrip,
                rstrip=row.rstrip,
                normalized=row.normalized,
                special=row.special,
            )
            (tokenizer.add_special_tokens if row.special else tokenizer.add_tokens)([token])
        found = tokenizer.token_to_id(row.content)
        if found != row.id:
            raise _contradiction(folder, row, found)


def _contradiction(folder: Path, row: AddedTokenRow, found: int | None) -> InputError:
    return InputError(
        f"{folder}: the tokenizer gives the added token {row.content!r} the id {found}, expected {row.id}", hint=_HINT
    )


def _decoder(folder: Path, settings: Mapping[str, object]) -> Mapping[str, object]:
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise InputError(f"{folder}: added_tokens_decoder in tokenizer_config.json is not an object", hint=_HINT)
    return decoder


def _row(folder: Path, number: str, entry: object) -> AddedTokenRow:
    content = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(content, str) or not content or not number.isdecimal():
        raise InputError(f"{folder}: tokenizer_config.json has the added token {number}: {entry!r}", hint=_HINT)
    flags = entry if isinstance(entry, dict) else {}
    special = flags.get("special") is True
    return AddedTokenRow(
        int(number),
        content,
        special,
        lstrip=flags.get("lstrip") is True,
        rstrip=flags.get("rstrip") is True,
        single_word=flags.get("single_word") is True,
        normalized=bool(flags.get("normalized", not special)),
    )
