# SPDX-License-Identifier: Apache-2.0
"""Prose of Python's own manual (`pydoc_data.topics`), cut into a training half and a held-out half.

Every Python installation carries these texts, so the held-out half is a test text that needs no download:
`python heldout.py --out FILE` writes it, one topic a document, one paragraph a line, a blank line between
documents. Standard library only. The half of a topic is a hash of its key, so it is the same in every version
of Python; a paragraph that stands in topics of both halves is in neither.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

MIN_WORDS = 8  # shorter blocks are headings, "New in version", signatures and table cells
MIN_LETTERS = 0.88  # share of letters, spaces and , . in a block; code and tables lie below
CODE_LINE = re.compile(
    r"^\s*(>>>|\.\.\. |def |class |import |from \w+ import |@\w|for .*:$|if .*:$|print\(|\||#|[+|]--)"
)
RULE_LINE = re.compile(r"^\s*([*=\-~^\"+#|])\1{2,}[\s*=\-~^+|]*$")
SENTENCE_END = re.compile(r"[.!?:;][\")'”’]*$")
LIST_MARK = re.compile(r"^\s*([*+-]|\d+\.)\s+")
BROKEN_WORD = re.compile(r"(?<=\w-) (?=\w)")  # "floating- point", wrapped behind the hyphen
BACKSLASH = re.compile(r"\\([*_`|\\])")


def topics() -> Mapping[str, str]:
    """Return the topic texts of the running Python."""
    found: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    return found


def is_held_out(topic: str) -> bool:
    """Say whether a topic belongs to the held-out half."""
    return hashlib.sha256(topic.encode()).digest()[0] % 2 == 1


def prose_paragraphs(text: str) -> Iterator[str]:
    """Yield the prose paragraphs of a topic, each on one line, without headings, grammar, code and tables."""
    after_colons = False
    for block in re.split(r"\n\s*\n", textwrap.dedent(text)):
        lines = [line for line in block.splitlines() if line.strip()]
        if not lines:
            continue
        # A definition ("object.__init__(self)") is glued to the indented text that explains it.
        if len(lines) > 1 and "(" in lines[0] and lines[1].startswith(lines[0][: _indent(lines[0])] + "   "):
            lines = lines[1:]
        introduced_code = after_colons and _indent(lines[0]) >= 3
        paragraph = BACKSLASH.sub(r"\1", LIST_MARK.sub("", " ".join(" ".join(lines).split())))
        paragraph = BROKEN_WORD.sub("", paragraph)
        after_colons = paragraph.endswith(":")
        if any(CODE_LINE.match(line) or RULE_LINE.match(line) or "::=" in line for line in lines):
            continue
        starts_as_prose = paragraph[:1].isupper() or bool(LIST_MARK.match(lines[0]))
        if introduced_code and not starts_as_prose:
            continue
        is_sentence = len(paragraph.split()) >= MIN_WORDS and SENTENCE_END.search(paragraph)
        if is_sentence and _letters(paragraph) >= MIN_LETTERS:
            yield paragraph


def pydoc_documents(held_out: bool, texts: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Return (topic, text) of one half, in the order of the topics; paragraphs are lines.

    A paragraph is kept once a half, and left out of both halves when both have it.
    """
    source = topics() if texts is None else texts
    paragraphs = {topic: list(prose_paragraphs(source[topic])) for topic in sorted(source)}
    other = {fingerprint(p) for topic, found in paragraphs.items() if is_held_out(topic) != held_out for p in found}
    documents = []
    for topic, found in paragraphs.items():
        if is_held_out(topic) != held_out:
            continue
        kept = []
        for paragraph in found:
            mark = fingerprint(paragraph)
            if mark not in other:
                other.add(mark)
                kept.append(paragraph)
        if kept:
            documents.append((topic, "\n".join(kept)))
    return documents


def fingerprint(paragraph: str) -> str:
    """Return the letters and digits of a paragraph: versions of Python differ in quotes and marks."""
    return re.sub(r"[\W_]+", "", paragraph).lower()


def heldout_text() -> str:
    """Return the held-out half of the running Python's manual as one text."""
    return "\n\n".join(text for _, text in pydoc_documents(held_out=True)) + "\n"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _letters(paragraph: str) -> float:
    return sum(c.isalpha() or c in " ,.'" for c in paragraph) / len(paragraph)


def main() -> None:
    """Write the held-out half."""
    parser = argparse.ArgumentParser(description="Write the held-out half of Python's manual as plain text.")
    parser.add_argument("--out", type=Path, required=True, help="text file to write")
    out: Path = parser.parse_args().out
    text = heldout_text()
    out.write_text(text, encoding="utf-8", newline="\n")
    documents = text.count("\n\n") + 1
    sys.stderr.write(f"{out}: {documents} topics, {len(text.encode())} bytes\n")


if __name__ == "__main__":
    main()
