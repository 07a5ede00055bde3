# SPDX-License-Identifier: Apache-2.0
"""The split: disjoint, deterministic, and nothing held out reaches the tokenizer or the training stream."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest

import card
import corpus
import heldout
import run_state
import train

BOOK = "\n\n".join(f"Paragraph {i} of a long book, " + "which goes on and on. " * 20 + "It ends." for i in range(300))


def test_split_is_disjoint_and_complete_when_the_document_is_a_book() -> None:
    part = corpus.split(corpus.Document("books", BOOK))
    assert part.train + "\n\n" + part.held_out == BOOK.strip()
    assert 0.02 < len(part.held_out) / len(BOOK) < 0.031 + 0.001


def test_split_puts_a_short_document_on_one_side_always_the_same() -> None:
    stories = [f"Story number {i}." for i in range(3000)]
    parts = [corpus.split(corpus.Document("s", text)) for text in stories]
    assert parts == [corpus.split(corpus.Document("s", text)) for text in stories]
    assert all(bool(part.train) != bool(part.held_out) for part in parts)
    assert 0.01 < sum(bool(part.held_out) for part in parts) / len(parts) < 0.03


def test_reading_gives_the_same_documents_when_files_are_compressed(tmp_path: Path) -> None:
    texts = ["One.\n\nTwo.", "Three."]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / f"{name}.xz").write_bytes(lzma.compress((tmp_path / name).read_bytes()))
    for name in ("a.txt", "b.jsonl", "a.txt.xz", "b.jsonl.xz"):
        assert [document.text for document in corpus.read_documents([tmp_path / name])] == texts


def test_reading_names_the_file_when_its_kind_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    with pytest.raises(SystemExit, match=r"a\.pdf: expected \.txt or \.jsonl"):
        list(corpus.read_documents([tmp_path / "a.pdf"]))


def test_heldout_paragraphs_never_occur_in_training_text() -> None:
    train = {heldout.fingerprint(p) for _, text in heldout.pydoc_documents(False) for p in text.split("\n")}
    held_out = {heldout.fingerprint(p) for _, text in heldout.pydoc_documents(True) for p in text.split("\n")}
    assert len(held_out) > 300
    assert train.isdisjoint(held_out)


def test_heldout_halves_are_of_like_size() -> None:
    train, held_out = (sum(len(t) for _, t in heldout.pydoc_documents(half)) for half in (False, True))
    assert 0.5 < train / held_out < 2


def test_prose_paragraphs_leave_out_headings_grammar_and_code() -> None:
    text = (
        'The "spam" statement\n********************\n\nA spam statement is a way to ask for more of the same:\n\n'
        '   spam_stmt ::= "spam" expression ["," expression]\n\nThe simple form is the same as what is shown here:\n\n'
        "   if hungry:\n       print(spam(eggs) for eggs in larder)\n\n"
        "object.__spam__(self)\n\n   Called to serve a dish, and again when the guest\n   is still not content.\n"
    )
    assert list(heldout.prose_paragraphs(text)) == [
        "A spam statement is a way to ask for more of the same:",
        "The simple form is the same as what is shown here:",
        "Called to serve a dish, and again when the guest is still not content.",
    ]


def test_heldout_command_writes_what_the_function_returns_without_other_packages(tmp_path: Path) -> None:
    out = tmp_path / "heldout.txt"
    command = [sys.executable, "-I", "-S", heldout.__file__, "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    assert out.read_text(encoding="utf-8") == heldout.heldout_text()


def test_training_stream_holds_training_text_only(tiny_run: train.Options) -> None:
    options = tiny_run
    prepared = run_state.prepare_corpus(options.text, options.out, options.shape.vocab, options.seed)
    parts = corpus.load(options.text)
    decoded = prepared.tokenizer.decode([int(i) for i in prepared.train], skip_special_tokens=False)
    in_stream = sorted(filter(None, decoded.split("</s>")))
    assert in_stream == sorted(part.train for part in parts if part.train)
    held_out = [part.held_out for part in parts if part.held_out]
    assert set(held_out).isdisjoint(in_stream)
    sizes = sum(int(prepared.token_bytes[ids].sum()) for documents in prepared.held_out.values() for ids in documents)
    assert sizes == sum(len(text.encode()) for text in held_out)


def test_card_says_what_the_report_says() -> None:
    text = (card.HERE / "README.md").read_text(encoding="utf-8")
    report = json.loads((card.HERE / "report.json").read_text(encoding="utf-8"))
    assert card.with_numbers(text, report) == text
