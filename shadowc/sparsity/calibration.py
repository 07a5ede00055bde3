# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N815 - fields carry their shape letters
"""Calibration text: token sequences on which importance is measured.

In: a model and `CollectOptions.data`. Out: ids [N, length] (N sequences, each starting with bos) and the text's
fingerprint. "self" samples the text from the model, which needs no file, no network and no tokenizer;
a .txt or .jsonl file is tokenised with the checkpoint's tokenizer.

Letters: N sequences, B sequences of one batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowc.sparsity.fingerprint import Fingerprint, fingerprint
from shadowc.sparsity.text_files import read_utf8, texts_of_lines
from shadowc.sparsity.threads import threads_for
from shadowc.spec.errors import InputError
from shadowc.spec.progress import NullProgress

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from shadowc.checkpoint.facts import ModelFacts
    from shadowc.checkpoint.resolve import ModelCheckpoint
    from shadowc.spec.options import CollectOptions
    from shadowc.spec.progress import Progress

SELF = "self"
SUFFIXES = frozenset({".txt", ".jsonl"})
_WANTED = "give a .txt or .jsonl file, or use --data self"
TOKENS_PER_POSITION = 4
"""Tokens run per position recorded: neighbours resemble each other, so more texts are worth more than all of one."""
LEAST_SEQUENCES = 8
"""Enough to hold some out for validation."""
CACHE_BYTES = 512 << 20
"""Bound on the K/V cache while sampling; decides the batch."""
LARGEST_BATCH = 96
EDGE_TOKENS = 2
"""Positions of a sequence that are never recorded: the first (always bos, the same everywhere) and the last (its
successor is unknown, so it has no loss)."""


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """The tokens, and what to recognise their text by."""

    ids_NT: npt.NDArray[np.int64]
    text: Fingerprint
    source: str
    """"self" or the file's name."""


def sequence_length(options: CollectOptions, facts: ModelFacts) -> int:
    """Return the tokens per sequence: what was asked for, or the model's context if that is shorter."""
    return min(options.length, facts.positions)


def sequence_count(options: CollectOptions, facts: ModelFacts) -> int:
    """Return how many sequences give the positions asked for."""
    usable = sequence_length(options, facts) - EDGE_TOKENS
    return max(-(-options.positions // max(usable // TOKENS_PER_POSITION, 1)), LEAST_SEQUENCES)


def calibration_text(
    model: Any,  # transformers' model, which has no types
    checkpoint: ModelCheckpoint,
    options: CollectOptions,
    progress: Progress | None = None,
) -> CalibrationText:
    """Return the calibration sequences.

    Raises:
        InputError: the file is missing, empty, too short or of another kind; or the model's logits are not finite.
    """
    facts = checkpoint.facts
    count, length = sequence_count(options, facts), sequence_length(options, facts)
    if options.data == SELF:
        ids_NT = sample_text(model, facts, count, length, options.seed, progress)
        return CalibrationText(ids_NT, Fingerprint(hashlib.sha256(ids_NT.tobytes()).hexdigest()), SELF)
    path = Path(options.data)
    documents, text = read_text(path)
    if checkpoint.tokenizer is None:
        raise InputError(
            f"{path} cannot be tokenised: the checkpoint {facts.name} has no tokenizer files",
            hint="put tokenizer.json (or vocab.json and merges.txt) beside the weights, or use --data self",
        )
    return CalibrationText(pack(tokenise(documents, checkpoint), facts, count, length, path), text, path.name)


def check_data(data: str) -> None:
    """Refuse what cannot be calibration text by its name and kind alone; nothing is read.

    Raises:
        InputError: neither "self" nor an existing .txt or .jsonl file.
    """
    if data == SELF:
        return
    path = Path(data)
    try:
        folder, file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise InputError(f"the calibration text cannot be looked at: {error}", hint=_WANTED) from error
    if folder:
        raise InputError(f"{path} is a folder, expected a .txt or .jsonl file", hint=_WANTED)
    if path.suffix not in SUFFIXES:
        raise InputError(f"a text file ends in .txt or .jsonl; found {path.name}", hint="or use --data self")
    if not file:
        raise InputError(f"there is no file {path}", hint=_WANTED)


def read_text(path: Path) -> tuple[list[str], Fingerprint]:
    """Read a .txt file (one document) or a .jsonl file (field `text` of every line).

    Raises:
        InputError: it cannot be read as that, or holds no text.
    """
    check_data(str(path))
    text, content = read_utf8(path, "--data")
    documents = [text] if path.suffix == ".txt" else texts_of_lines(path, text)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"{path} holds no text", hint="give a file with some text, or use --data self")
    return documents, fingerprint(content, documents)


def tokenise(documents: list[str], checkpoint: ModelCheckpoint) -> list[list[int]]:
    """Tokenise each document, without special tokens.

    Raises:
        InputError: the tokenizer's files are damaged.
    """
    from shadowc.checkpoint.models import tokenizer_of

    tokenizer = tokenizer_of(checkpoint)
    # verbose would warn about texts beyond the model's context; they are cut into sequences later.
    return [tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] for document in documents]


def pack(
    documents: list[list[int]],
    facts: ModelFacts,
    count: int,
    length: int,
    origin: Path,
    less: str = "fewer --positions",
) -> npt.NDArray[np.int64]:
    """Cut the documents, joined by eos, into `count` sequences spread evenly over the text, each after a bos.

    Args:
        documents: token ids of each.
        facts: the model's special tokens.
        count: sequences.
        length: tokens of each, its bos included.
        origin: the file, for the error.
        less: how to ask for less text, for the error's hint.

    Raises:
        InputError: there are too few tokens.
    """
    stream = np.concatenate([np.asarray([*document, facts.eos], np.int64) for document in documents])[:-1]
    body = length - 1
    available = len(stream) // body
    if available < count:
        raise InputError(
            f"{origin} is too short: {count} sequences of {length} tokens need {count * body} tokens, "
            f"found {len(stream)}",
            hint=f"give a longer text, or {less}",
        )
    chosen_N = (np.arange(count) * available) // count
    bodies_NT = stream[: available * body].reshape(available, body)[chosen_N]
    return np.concatenate([np.full((count, 1), facts.bos, np.int64), bodies_NT], axis=1)


def sample_text(
    model: Any,
    facts: ModelFacts,
    count: int,
    length: int,
    seed: int,
    progress: Progress | None = None,
) -> npt.NDArray[np.int64]:
    """Let the model write `count` texts of `length` tokens: temperature 1, from bos on, one uniform number per token.

    All random numbers are drawn before anything else, so neither the batch nor the order of work changes the text. A
    machine with other instructions may differ where its rounding turns a draw the other way; then so does the hash.

    Raises:
        InputError: the model's logits are not finite.
    """
    import torch

    progress = progress or NullProgress()
    draws_NT = torch.rand(count, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    written: list[Tensor] = []
    parts = torch.tensor_split(draws_NT, -(-count // sampling_batch(facts, length)))
    work = len(parts[0]) * sum(p.numel() for p in model.parameters())
    with torch.inference_mode(), threads_for(work):
        for part_BT in parts:
            written.append(_continue(model, facts, part_BT))
            progress.advance(sum(map(len, written)), count, "sequences")
    ids_NT: npt.NDArray[np.int64] = torch.cat(written).numpy()
    return ids_NT


def sampling_batch(facts: ModelFacts, length: int) -> int:
    """Return how many texts are written at once within `CACHE_BYTES`."""
    row_bytes = 2 * 4 * facts.layers * facts.hidden * length
    return min(max(CACHE_BYTES // row_bytes, 1), LARGEST_BATCH)


def _continue(model: Any, facts: ModelFacts, draws_BT: Tensor) -> Tensor:
    """Write one batch of texts."""
    import torch
    from transformers import StaticCache

    rows, length = draws_BT.shape
    ids_BT = torch.full((rows, length), facts.bos, dtype=torch.int64)
    # Fixed size: transformers' growing cache copies itself at every token, which takes most of the time.
    cache = StaticCache(config=model.config, max_cache_len=length)
    for t in range(1, length):
        step = model(input_ids=ids_BT[:, t - 1 : t], past_key_values=cache, use_cache=True)
        logits_BV = step.logits[:, -1].double()
        if facts.pad not in {facts.bos, facts.eos}:
            logits_BV[:, facts.pad] = -torch.inf
        if not bool(torch.isfinite(logits_BV.amax(-1)).all()):
            raise InputError(
                f"the logits of {facts.name} are not finite at token {t}; its weights may be damaged",
                hint="check the checkpoint, or use --data FILE",
            )
        mass_BV = torch.softmax(logits_BV, -1).cumsum(-1)
        wanted_B1 = draws_BT[:, t : t + 1] * mass_BV[:, -1:]
        ids_BT[:, t] = torch.searchsorted(mass_BV, wanted_B1, right=True)[:, 0].clamp_(max=mass_BV.shape[1] - 1)
    return ids_BT
