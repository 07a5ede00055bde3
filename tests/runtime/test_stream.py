# SPDX-License-Identifier: Apache-2.0
"""Text streams give out whole characters, and together the whole text."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowc.runtime.stream import TextBatch, TextRow


class Bytes:
    """A tokenizer of single bytes; 256 is special."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")


EOS = 256


@settings(max_examples=100)
@given(st.text(max_size=20), st.text(max_size=20))
def test_pieces_join_to_the_text_and_split_no_character(prompt: str, text: str) -> None:
    row = TextRow(Bytes(), list(prompt.encode()))
    pieces = [row.push(token) for token in text.encode()]
    assert all(piece in text for piece in pieces)
    assert "".join([*pieces, row.flush()]) == text


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    row = TextRow(Bytes(), [])
    assert [row.push(token) for token in "aé".encode()[:-1]] == ["a", ""]
    assert row.flush() == "\ufffd"


def test_rows_that_ended_stay_silent() -> None:
    shown: list[list[str]] = []
    batch = TextBatch(Bytes(), np.array([[97], [98]]), EOS, shown.append)
    for step in ([99, 100], [EOS, 101], [1, 102]):
        batch.push(np.array(step))
    assert batch.finish() == ["c", "def"]
    assert shown == [["c", "d"], ["", "e"], ["", "f"]]
