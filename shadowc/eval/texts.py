# SPDX-License-Identifier: Apache-2.0
"""Running text: bits per byte in disjoint windows, and WikiText pages as lm-eval reads them.

A `.jsonl` file holds one document a line (field `text`); any other file is one document. Windows never reach from one
document into the next. Where there are few documents, their windows are what the bootstrap draws.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shadowc.eval.corpus import Corpus, Item
from shadowc.eval.metric import Metric
from shadowc.eval.request import Request
from shadowc.sparsity.text_files import read_utf8, texts_of_lines
from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    from shadowc.eval.model import EvaluatedModel
    from shadowc.eval.request import Outcome

ENOUGH_DOCUMENTS = 10
"""From so many on the bootstrap draws documents, below it windows."""
LEAST_WINDOW = 2


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is scored by itself."""

    text: str
    """What the model sees."""
    bytes: int
    """Of the text as it is in the file."""
    words: int = 0
    """Of the text as it is in the file; 0: not counted."""


class TextCorpus(Corpus):
    """Documents in windows.

    Args:
        name: of the file.
        sha256: of its content.
        kind: text or wikitext.
        documents: the texts.
        items: windows, of which each names its document.
        window: tokens of a window, and whether they were chosen by the caller.
    """

    def __init__(
        self,
        name: str,
        sha256: str,
        kind: Literal["text", "wikitext"],
        documents: Sequence[Document],
        items: tuple[Item, ...],
        window: int,
    ) -> None:
        self.name, self.sha256, self.items = name, sha256, items
        self.kind, self.documents, self.window = kind, documents, window

    @property
    def bytes(self) -> int:
        """Of all documents."""
        return sum(document.bytes for document in self.documents)

    @property
    def facts(self) -> Mapping[str, str | int]:
        """What a report says of it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "documents": len(self.documents),
            "windows": len(self.items),
            "window": self.window,
            "tokens": self.tokens,
            "drawn": "documents" if self._by_document else "windows",
        }

    @property
    def _by_document(self) -> bool:
        return len(self.documents) >= ENOUGH_DOCUMENTS

    @cached_property
    def _tokens(self) -> list[int]:
        """Of every document."""
        counts = [0] * len(self.documents)
        for item in self.items:
            counts[item.document] += item.requests[0].scored
        return counts

    def metrics(self, outcomes: Sequence[Sequence[Outcome]]) -> tuple[Metric, ...]:
        """Bits per byte and token perplexity; for WikiText word and byte perplexity too, as lm-eval has them."""
        nats = [-outcome[0].log_probability for outcome in outcomes]
        tokens = [float(item.requests[0].scored) for item in self.items]
        # A window has the bytes and words of its document by its share of the tokens.
        share = [count / self._tokens[item.document] for count, item in zip(tokens, self.items, strict=True)]
        owner = [self.documents[item.document] for item in self.items]
        sizes = [part * document.bytes for part, document in zip(share, owner, strict=True)]
        words = [part * document.words for part, document in zip(share, owner, strict=True)]
        bits = [value / math.log(2) for value in nats]
        columns = [bits, nats, tokens, sizes, words]
        if self._by_document:
            columns = [self._summed(column) for column in columns]
        bits, nats, tokens, sizes, words = columns
        found = [
            Metric("bits_per_byte", "bits", tuple(bits), tuple(sizes)),
            Metric("token_perplexity", "perplexity", tuple(nats), tuple(tokens)),
        ]
        if self.kind == "wikitext":
            found.insert(0, Metric("word_perplexity", "perplexity", tuple(nats), tuple(words)))
            found.append(Metric("byte_perplexity", "perplexity", tuple(nats), tuple(sizes)))
        return tuple(found)

    def place(self, index: int) -> str:
        """Say which window it is, for messages."""
        return f"window {index + 1} (document {self.items[index].document + 1}) of {self.name}"

    def _summed(self, column: Sequence[float]) -> list[float]:
        """Return the sums over each document's windows; documents without a token are left out."""
        sums = [0.0] * len(self.documents)
        for value, item in zip(column, self.items, strict=True):
            sums[item.document] += value
        return [value for value, tokens in zip(sums, self._tokens, strict=True) if tokens]


def text_corpus(model: EvaluatedModel, path: Path, window: int | None = None, limit: int | None = None) -> TextCorpus:
    """Read a text for bits per byte.

    Args:
        model: its tokenizer and context.
        path: a UTF-8 text, or JSON lines with a field `text`.
        window: tokens of a window, its start token included; None: the model's context.
        limit: first windows only; None: all.

    Raises:
        InputError: the text cannot be read, is empty, was used for calibration, or is shorter than the window.
    """
    text, content = read_utf8(path, "--text")
    texts = texts_of_lines(path, text) if path.suffix == ".jsonl" else [text]
    model.refuse_calibration_text(content, texts)
    return corpus_of(model, path.name, texts, hashlib.sha256(content).hexdigest(), window, limit)


def corpus_of(
    model: EvaluatedModel,
    name: str,
    texts: Sequence[str],
    sha256: str,
    window: int | None = None,
    limit: int | None = None,
) -> TextCorpus:
    """Cut texts into disjoint windows, each behind a start token; blank ones are left out.

    Raises:
        InputError: there is no text but white space, or it has fewer tokens than a window that was asked for.
    """
    size = min(window or model.context, model.context)
    if size < LEAST_WINDOW:
        raise InputError(f"a window of {size} token predicts nothing", hint="--window 512")
    items, longest = [], 0
    texts = [text for text in texts if text.strip()]
    for index, text in enumerate(texts):
        ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        longest = max(longest, len(ids))
        for at in range(0, len(ids), size - 1):
            piece = (model.start, *ids[at : at + size - 1])
            items.append(Item(index, (Request(piece, len(piece) - 1),)))
    if not items:
        raise InputError(f"{name} holds no text; expected prose", hint="shadowc eval ENGINE --text FILE")
    if window is not None and longest < size - 1:
        raise InputError(
            f"{name} is shorter than a window: {longest:,} tokens in its longest document, and a window of {size:,} "
            f"takes {size - 1:,} behind its start token",
            hint=f"--window {longest + 1}, or a longer text",
        )
    kept = tuple(items[:limit])
    documents = [Document(text, len(text.encode())) for text in texts]
    return TextCorpus(name, sha256, "text", _within(documents, items, kept), kept, min(size, longest + 1))


def _within(documents: list[Document], items: Sequence[Item], kept: Sequence[Item]) -> list[Document]:
    """Return the documents with the bytes and words of the windows that were kept, by their tokens."""
    if len(kept) == len(items):
        return documents
    whole, part = [0] * len(documents), [0] * len(documents)
    for counts, chosen in ((whole, items), (part, kept)):
        for item in chosen:
            counts[item.document] += item.requests[0].scored
    shares = [some / every if every else 0.0 for some, every in zip(part, whole, strict=True)]
    last = max(item.document for item in kept)
    return [
        Document(document.text, round(share * document.bytes), round(share * document.words))
        for document, share in zip(documents[: last + 1], shares, strict=False)
    ]


def wikitext_corpus(
    model: EvaluatedModel, path: Path, window: int | None = None, limit: int | None = None
) -> TextCorpus:
    """Read a raw WikiText split as lm-eval's task `wikitext` does: pages, detokenised, in rolling windows.

    Args:
        model: its tokenizer and context.
        path: such as `wiki.test.raw`, or JSON lines with a field `page`.
        window: tokens fed at once; None: the model's context.
        limit: first pages only; None: all.

    Raises:
        InputError: the text cannot be read, is empty, was used for calibration, or is shorter than the window.
    """
    from shadowc.eval.wikitext import detokenised, pages, rolling, words_of

    text, content = read_utf8(path, "--wikitext")
    raw = texts_of_lines(path, text, "page") if path.suffix == ".jsonl" else list(pages(text))
    model.refuse_calibration_text(content, raw)
    size = min(window or model.context, model.context)
    documents, items, longest = [], [], 0
    raw = [page for page in raw if page.strip()]
    for index, page in enumerate(raw[:limit]):
        documents.append(Document(detokenised(page), len(page.encode()), words_of(page)))
        ids = model.tokenizer(documents[-1].text, add_special_tokens=False, verbose=False)["input_ids"]
        longest = max(longest, len(ids))
        items += [Item(index, (request,)) for request in rolling(ids, model.start, size)]
    if not items:
        raise InputError(f"{path} holds no pages; expected a raw WikiText split", hint="--wikitext wiki.test.raw")
    if window is not None and longest < size:
        raise InputError(
            f"{path} is shorter than a window: its longest page has {longest:,} tokens, and a window takes {size:,}",
            hint=f"--window {longest}, or the whole split",
        )
    sha256 = hashlib.sha256(content).hexdigest()
    return TextCorpus(path.name, sha256, "wikitext", documents, tuple(items), size)
