# SPDX-License-Identifier: Apache-2.0
"""WikiText as lm-eval's task `wikitext` (version 2) has it: where pages end, how they are detokenised, their windows.

Words and bytes are counted on the page as it is in the file, before it is detokenised; that is lm-eval's rule too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from shadowc.eval.request import Request

_AROUND = ((" @{0}@ ", "{0}", "-,."), (" {0} ", "{0} ", ":;.!?,"))
"""Template of what is found, of what takes its place, and the signs that both are filled with."""
_PAIRS = (
    (r"\(", r"[^\)]", r"\)"),
    (r"\[", r"[^\]]", r"\]"),
    ("{", "[^}]", "}"),
    ('"', '[^"]', '"'),
    ("'", "[^']", "'"),
)
"""Opening sign, what may stand inside, closing sign: blanks just inside of a pair go."""
_LAST = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"), (" \n", "\n"),
    ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip


def pages(text: str) -> Iterator[str]:
    """Cut a split at its headings of the first level; what stands before the first is a page if it is not blank."""
    lines: list[str] = []
    for line in text.split("\n"):
        if _is_title(line):
            page = "\n".join(lines)
            if page.strip():
                yield page
            lines = []
        lines.append(line)
    page = "\n".join(lines)
    if page.strip():
        yield page


def _is_title(line: str) -> bool:
    """One `=` on either side; headings of lower levels have `= =` or more."""
    bare = line.replace("= = =", "===").replace("= =", "==").strip()
    return bare.startswith("= ") and bare.endswith(" =")


def detokenised(page: str) -> str:
    """Return a page with the blanks taken out that its tokenisation put in."""
    page = page.replace("s '", "s'")
    page = re.sub(r"/' [0-9]/", "/'[0-9]/", page)
    for found, put, signs in _AROUND:
        for sign in signs:
            page = page.replace(found.format(sign), put.format(sign))
    for opening, inner, closing in _PAIRS:
        plain = [sign.removeprefix("\\") for sign in (opening, closing)]
        page = re.sub(rf"{opening}\s*({inner}*?)\s*{closing}", rf"{plain[0]}\1{plain[1]}", page)
    for found, put in _LAST:
        page = page.replace(found, put)
    return page


def words_of(page: str) -> int:
    """Count what blanks separate; blanks at either end count an empty word each, as in lm-eval."""
    return len(re.split(r"\s+", page))


def rolling(ids: Sequence[int], start: int, size: int) -> Iterator[Request]:
    """Cut a document into requests that feed at most `size` tokens and predict each token once.

    The first begins with the start token, each later one with the token before its first predicted one; the last is
    filled up to the left with tokens that are predicted already, so that it has a whole window of context.
    """
    if not ids:
        return
    first = min(size, len(ids))
    yield Request((start, *ids[:first]), first)
    for begin in range(first, len(ids), size):
        end = min(begin + size, len(ids))
        yield Request(tuple(ids[end - size - 1 : end]), end - begin)
