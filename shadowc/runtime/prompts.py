# SPDX-License-Identifier: Apache-2.0
"""Prompts of any accepted form become one left-padded batch, or one clear refusal.

Letters: B rows, S slots, P slots of the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shadowc.sparsity.text_files import half_pair
from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    from shadowc.spec.manifest import ModelPart

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids [B,S] with padding on the left only."""

    ids: Ids
    starts: Ids
    """First slot of each row that holds a real token."""

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return int(self.ids.shape[0])

    @property
    def slots(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.ids.shape[1])

    @property
    def margin(self) -> int:
        """Columns on the left that are padding in every row; `trimmed` drops them."""
        return int(self.starts.min())

    def trimmed(self) -> Batch:
        """The batch without columns that are padding in every row: they would only use up the context."""
        return Batch(np.ascontiguousarray(self.ids[:, self.margin :]), self.starts - self.margin)

    def mask(self, slots: int) -> Ids:
        """The attention mask [B, slots]: 0 for padding, 1 from each row's start on."""
        return (np.arange(slots) >= self.starts[:, None]).astype(np.int64)


def from_texts(texts: Sequence[str], tokenizer: Any, model: ModelPart) -> Batch:
    """Tokenise, and pad on the left to the longest.

    Raises:
        InputError: there is no text, or one without any token, or one that is not Unicode.
    """
    if not texts:
        raise InputError("no prompt given; expected at least one text", hint='for example ["Once upon a time"]')
    for number, text in enumerate(texts, start=1):
        if half := half_pair(text):  # so come bytes of a command line that are not UTF-8
            raise InputError(f"prompt {number} of {len(texts)} is no Unicode text at {half}", hint="give text in UTF-8")
    rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    if not all(rows):
        raise InputError("an empty prompt has no tokens to go on from", hint="give at least one word")
    longest = max(map(len, rows))
    ids_BS = np.full((len(rows), longest), model.pad, np.int64)
    for row, ids in enumerate(rows):
        ids_BS[row, longest - len(ids) :] = ids
    return Batch(ids_BS, np.array([longest - len(ids) for ids in rows], np.int64))


def from_ids(ids: object, attention_mask: object, model: ModelPart) -> Batch:
    """Check ids [B,S] and their mask; without a mask, leading pad tokens are padding.

    Raises:
        InputError: other shapes, ids outside the vocabulary, or a mask row that is not 0...01...1.
    """
    ids_BS = _array(ids, "token ids")
    if ids_BS.ndim != 2 or not ids_BS.size or not np.issubdtype(ids_BS.dtype, np.integer):
        raise InputError(
            f"token ids must be whole numbers of shape [rows, tokens], at least one of each; "
            f"found {ids_BS.dtype}{list(ids_BS.shape)}",
            hint='for example numpy.array([engine.tokenizer("Once upon a time")["input_ids"]])',
        )
    low, high = int(ids_BS.min()), int(ids_BS.max())
    if low < 0 or high >= model.vocab:
        wrong = low if low < 0 else high
        raise InputError(
            f"token id {wrong} lies outside the vocabulary of {model.vocab} tokens of {model.name}",
            hint="make the ids with engine.tokenizer",
        )
    ids_BS = np.ascontiguousarray(ids_BS, np.int64)
    mask_BS = (
        _leading_padding(ids_BS, model.pad) if attention_mask is None else _array(attention_mask, "attention_mask")
    )
    return Batch(ids_BS, _starts(mask_BS, ids_BS.shape))


def _array(given: object, name: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(given)
    except ValueError as error:
        raise InputError(
            f"{name} must be a rectangle [rows, tokens]; the rows that were found differ in length",
            hint="pad shorter rows on the left, and pass attention_mask",
        ) from error


def check_length(batch: Batch, model: ModelPart, room: int) -> None:
    """Refuse a prompt that the context cannot hold together with `room` further tokens.

    Raises:
        InputError: stating both numbers.
    """
    if batch.slots + room > model.positions:
        and_room = f" and {room} more must fit" if room else ""
        raise InputError(
            f"the prompt has {batch.slots} tokens{and_room}, the context of {model.name} holds {model.positions}",
            hint=f"shorten the prompt to {model.positions - room} tokens",
        )


def _leading_padding(ids_BS: Ids, pad: int) -> Ids:
    real_BS = (ids_BS != pad).astype(np.int64)
    seen_BS = np.maximum.accumulate(real_BS, axis=1)
    seen_BS[:, -1] = 1  # a row of nothing but padding keeps its last token: something must be computed
    return seen_BS


def _starts(mask_BS: npt.NDArray[Any], shape: tuple[int, ...]) -> Ids:
    if mask_BS.shape != shape:
        raise InputError(
            f"attention_mask is {list(mask_BS.shape)}, the ids are {list(shape)}",
            hint="pass the attention_mask that the tokenizer returned with the ids",
        )
    others = mask_BS[~np.isin(mask_BS, (0, 1))]
    if others.size:
        raise InputError(
            f"attention_mask may hold 0 and 1, found {others[0]!r}",
            hint="pass the attention_mask that the tokenizer returned with the ids",
        )
    wide_BS = mask_BS.astype(np.int64)
    rows_fit = (np.diff(wide_BS, axis=1) >= 0).all()
    if not rows_fit or not wide_BS[:, -1].all():
        raise InputError(
            "every row of attention_mask must be zeros, then ones (padding on the left only)",
            hint='set tokenizer.padding_side = "left"',
        )
    starts_B: Ids = (wide_BS == 0).sum(axis=1)
    return starts_B
