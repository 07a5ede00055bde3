# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of opt-mini and the token streams made with it.

In: split documents. Out: a byte-level BPE tokenizer that writes `</s>` (id 2) in front of every text, as OPT's
does, and one array of ids per part, each document with its own `</s>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from opt_model import BOS_ID, EOS_ID, PAD_ID, UNK_ID

SPECIAL = {BOS_ID: "<s>", PAD_ID: "<pad>", EOS_ID: "</s>", UNK_ID: "<unk>"}

Ids = NDArray[np.uint16]


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Train byte-level BPE; special tokens take OPT's ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(SPECIAL[i], special=True, normalized=False) for i in range(len(SPECIAL))],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    start = SPECIAL[EOS_ID]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, EOS_ID)]
            ),
        ]
    )
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """Return the ids of each text, `</s>` first."""
    ids: list[Ids] = []
    for start in range(0, len(texts), 64):  # whole books: a small batch bounds the memory
        batch = tokenizer.encode_batch_fast(list(texts[start : start + 64]))
        ids += [np.array(encoded.ids, dtype=np.uint16) for encoded in batch]
    return ids


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Return how many bytes of text each id stands for; special tokens stand for none."""
    sizes = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        sizes[index] = 0 if index in SPECIAL else len(token)  # byte-level: one character a byte
    return sizes
