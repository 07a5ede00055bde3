# SPDX-License-Identifier: Apache-2.0
"""Tokens become text while they arrive: only whole characters are given out.

Letters: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shadowc.runtime.prompts import Ids

_INCOMPLETE = "\ufffd"
"""What a decoder writes for the bytes of an unfinished character."""
_CONTEXT = 4
"""Tokens of the prompt that are decoded along: some decoders treat the first token of a text differently."""


class TextRow:
    """Decodes one row step by step; the pieces together are the decoded whole.

    Args:
        tokenizer: as transformers' are.
        prompt: ids before the first new token.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._from = 0
        self._shown = len(self._ids)

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes, or nothing."""
        self._ids.append(token)
        return self._piece(final=False)

    def flush(self) -> str:
        """The rest, unfinished characters included."""
        return self._piece(final=True)

    def _piece(self, *, final: bool) -> str:
        known = self._decode(self._ids[self._from : self._shown])
        whole = self._decode(self._ids[self._from :])
        if whole.endswith(_INCOMPLETE) and not final:
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return whole[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class TextBatch:
    """Collects the text of all rows and shows the pieces; tokens after a row's end token are dropped.

    Args:
        tokenizer: as transformers' are.
        ids_BS: the prompts.
        eos: the end token.
        show: called with one piece per row whenever there is any; None: nobody looks.
    """

    def __init__(
        self, tokenizer: Any, ids_BS: Ids, eos: int, show: Callable[[list[str]], object] | None = None
    ) -> None:
        self._rows = [TextRow(tokenizer, ids) for ids in ids_BS.tolist()]
        self._ended = [False] * len(self._rows)
        self._texts = [""] * len(self._rows)
        self._eos = eos
        self._show = show

    def push(self, ids_B: Ids) -> None:
        """Take one new token per row."""
        tokens = ids_B.tolist()
        self._ended = [ended or token == self._eos for ended, token in zip(self._ended, tokens, strict=True)]
        rows = zip(self._rows, tokens, self._ended, strict=True)
        self._add(["" if ended else row.push(token) for row, token, ended in rows])

    def finish(self) -> list[str]:
        """Give out what is left; returns the whole text of each row."""
        self._add([row.flush() for row in self._rows])
        return list(self._texts)

    def _add(self, pieces: list[str]) -> None:
        self._texts = [text + piece for text, piece in zip(self._texts, pieces, strict=True)]
        if self._show is not None and any(pieces):
            self._show(pieces)
