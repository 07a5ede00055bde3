# SPDX-License-Identifier: Apache-2.0
"""Text as files: what calibrates and what is evaluated is read, and refused, in one way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from shadowc.spec.errors import InputError


def read_utf8(path: Path, flag: str) -> tuple[str, bytes]:
    """Read a UTF-8 file as it is: text mode would change line ends, and with them bytes and hash.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint=f"{flag} takes a UTF-8 text file") from None
    try:
        return content.decode("utf-8"), content
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 at byte {error.start}", hint=f"iconv -t UTF-8 {path} converts it"
        ) from None


def texts_of_lines(path: Path, text: str, field: str = "text") -> list[str]:
    """Return the field of every line that is not empty.

    Raises:
        InputError: a line is no JSON object with such a field, or no tokenizer could read the field.
    """
    texts = []
    for number, record in json_lines(path, text, {field: str}):
        texts.append(str(record[field]))
        if half := half_pair(texts[-1]):
            raise bad_line(path, number, f"has half of a surrogate pair in field {field!r}: {half}", f'"{field}"')
    return texts


def half_pair(text: str) -> str:
    r"""Return half of a surrogate pair and what stands around it, escaped; empty: there is none.

    JSON can write one (\ud83d alone), UTF-8 cannot: neither a tokenizer nor a hash takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return repr(text[max(error.start - 12, 0) : error.start + 12])
    return ""


def json_lines(path: Path, text: str, fields: Mapping[str, type]) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield the number and object of every line that is not empty.

    Raises:
        InputError: a line is not a JSON object, or lacks a field; file, line and reason are named.
    """
    wanted = ", ".join(f'"{name}"' for name in fields)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise bad_line(path, number, f"is not JSON: {error.msg} at column {error.colno}", wanted) from None
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets as deep
            raise bad_line(path, number, f"cannot be read: {error}", wanted) from None
        if not isinstance(record, dict):
            raise bad_line(path, number, f"is {type(record).__name__}, expected an object", wanted)
        for name, kind in fields.items():
            if name not in record:
                raise bad_line(path, number, f"has no field {name!r}", wanted)
            if not isinstance(record[name], kind) or isinstance(record[name], bool):
                found = type(record[name]).__name__
                raise bad_line(path, number, f"has {found} in field {name!r}, expected {kind.__name__}", wanted)
        yield number, record


def bad_line(path: Path, number: int, reason: str, wanted: str) -> InputError:
    """The refusal of one line of a file."""
    return InputError(f"{path}, line {number} {reason}", hint=f"one JSON object a line, with {wanted}")
