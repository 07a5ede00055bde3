# SPDX-License-Identifier: Apache-2.0
"""Windows, WikiText as lm-eval reads it, and texts that cannot be used."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest

from shadowc.eval.request import Outcome
from shadowc.eval.texts import corpus_of, text_corpus, wikitext_corpus
from shadowc.eval.torch_model import TorchModel
from shadowc.eval.wikitext import detokenised, pages, rolling, words_of
from shadowc.spec.errors import InputError
from tests.eval.conftest import PROSE
from tests.eval.task_files import WIKITEXT


def test_pages_begin_at_headings_of_the_first_level() -> None:
    found = list(pages(WIKITEXT))
    assert [page.strip().splitlines()[0].strip() for page in found] == ["= Lazy Engine =", "= Second Page ="]
    assert "= = Design = =" in found[0]
    assert "\n".join(found) == WIKITEXT.removeprefix(" \n")


def test_the_blanks_of_the_tokenisation_go() -> None:
    first, second = map(detokenised, pages(WIKITEXT))
    assert first == (
        " = Lazy Engine =\n\nA lazy engine (1843) reads 1,024 rows, or 2.5 % of them; it's well-known"
        " for \"rest\" at 20°C.\n\n== Design ==\n\nThe head sleeps' soundly ' until it is asked: twice!\n"
    )
    assert second == " = Second Page =\n\nAnother page [short] ends here. 1 rows remain?\n"


def test_words_and_bytes_are_those_of_the_page_in_the_file() -> None:
    assert words_of(" a b \n") == 4  # an empty word at either end, as lm-eval counts


def test_rolling_windows_predict_each_token_once_and_the_last_has_a_whole_context() -> None:
    ids = list(range(10, 20))
    windows = list(rolling(ids, 2, 4))
    assert [window.ids for window in windows] == [(2, 10, 11, 12, 13), (13, 14, 15, 16, 17), (15, 16, 17, 18, 19)]
    assert [window.scored for window in windows] == [4, 4, 2]
    assert [token for window in windows for token in window.targets] == ids
    assert [window.ids for window in rolling(ids[:3], 2, 4)] == [(2, 10, 11, 12)]
    assert list(rolling([], 2, 4)) == []


def test_disjoint_windows_each_start_with_the_start_token_and_stay_in_their_document(in_torch: TorchModel) -> None:
    corpus = corpus_of(in_torch, "two", [PROSE, PROSE], "0", 16)
    ids = in_torch.tokenizer(PROSE, add_special_tokens=False)["input_ids"]
    mine = [item.requests[0] for item in corpus.items if item.document == 1]
    assert [token for request in mine for token in request.ids[1:]] == ids
    assert {request.ids[0] for request in mine} == {in_torch.start}
    assert corpus.tokens == 2 * len(ids)
    assert all(request.scored == len(request.ids) - 1 for request in mine)


def outcomes(corpus: object, nats: float) -> list[list[Outcome]]:
    return [[Outcome(-nats * item.requests[0].scored, False)] for item in corpus.items]  # type: ignore[attr-defined]


def test_bits_per_byte_and_perplexities_follow_from_the_nats(in_torch: TorchModel, tmp_path: Path) -> None:
    path = tmp_path / "wiki.raw"
    path.write_text(WIKITEXT, "utf-8")
    corpus = wikitext_corpus(in_torch, path)
    found = {metric.name: metric.value for metric in corpus.metrics(outcomes(corpus, 2.0))}
    nats, size = 2.0 * corpus.tokens, sum(len(page.encode()) for page in pages(WIKITEXT))
    words = sum(map(words_of, pages(WIKITEXT)))
    assert found["token_perplexity"] == pytest.approx(math.exp(2.0))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
    assert found["byte_perplexity"] == pytest.approx(math.exp(nats / size))
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / words))


def test_lines_of_json_are_documents_and_many_of_them_are_what_is_drawn(in_torch: TorchModel, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} {PROSE}"}) + "\n" for n in range(12)), "utf-8")
    corpus = text_corpus(in_torch, path, 16)
    assert corpus.facts["documents"] == 12
    assert corpus.facts["drawn"] == "documents"
    (bits, _) = corpus.metrics(outcomes(corpus, 1.0))
    assert len(bits.numerator) == 12 < len(corpus.items)
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    few = corpus_of(in_torch, "few", [PROSE] * 3, "0", 16)
    assert few.facts["drawn"] == "windows"
    assert len(few.metrics(outcomes(few, 1.0))[0].numerator) == len(few.items)


def test_blank_documents_are_left_out(in_torch: TorchModel) -> None:
    bare, spaced = (corpus_of(in_torch, "few", texts, "0", 16) for texts in ([PROSE], [" \n" * 40, PROSE, "\t"]))
    assert spaced.items == bare.items
    assert spaced.facts == bare.facts


def test_blank_pages_are_no_wikitext(in_torch: TorchModel, tmp_path: Path) -> None:
    path = tmp_path / "wiki.jsonl"
    path.write_text(json.dumps({"page": " \n \n"}) + "\n", "utf-8")
    with pytest.raises(InputError, match="holds no pages"):
        wikitext_corpus(in_torch, path)


def test_a_limit_keeps_the_bytes_of_the_windows_that_are_left(in_torch: TorchModel, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(PROSE * 4, "utf-8")
    whole, part = text_corpus(in_torch, path, 16), text_corpus(in_torch, path, 16, limit=4)
    assert len(part.items) == 4
    assert part.bytes == pytest.approx(whole.bytes * part.tokens / whole.tokens, abs=1)


def test_a_text_shorter_than_the_window_that_was_asked_for_is_refused(in_torch: TorchModel, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a lamp", "utf-8")
    with pytest.raises(
        InputError, match=r"shorter than a window: \d+ tokens in its longest document, and a window of 64"
    ):
        text_corpus(in_torch, path, 64)
    assert text_corpus(in_torch, path).window < 64  # nobody asked: the window is the text
    path.write_text(" = A = \n short \n", "utf-8")
    with pytest.raises(InputError, match=r"shorter than a window: its longest page has \d+ tokens"):
        wikitext_corpus(in_torch, path, 64)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("text.txt", b"", "text.txt holds no text"),
        ("text.txt", b" \n\t\n" * 99, "text.txt holds no text"),
        ("text.jsonl", b'{"text": " "}\n{"text": "\\n"}\n', "text.jsonl holds no text"),
        ("text.txt", b"\xff\xfe", "is not UTF-8 at byte 0"),
        ("text.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2 has no field 'text'"),
        ("text.jsonl", b'{"text": 4}\n', "line 1 has int in field 'text', expected str"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(
    in_torch: TorchModel, tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason):
        text_corpus(in_torch, tmp_path / name)
