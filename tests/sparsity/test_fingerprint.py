# SPDX-License-Identifier: Apache-2.0
"""An evaluation on the calibration text is refused, also on a copy, a part, or a rewrapped version of it."""

from __future__ import annotations

import json
import textwrap
from hashlib import sha256

import numpy as np
import pytest

from shadowc.sparsity.fingerprint import KEPT, Fingerprint, common_share, fingerprint, refuse_if_calibrated
from shadowc.spec.errors import InputError


def prose(paragraphs: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    words = ["".join(chr(97 + c) for c in rng.integers(26, size=6)) for _ in range(200)]
    return "\n\n".join(" ".join(rng.choice(words, size=60)) for _ in range(paragraphs)) + "\n"


def seen(text: str) -> Fingerprint:
    return fingerprint(text.encode(), [text])


def meta_of(text: str) -> dict[str, object]:
    """What the predictor keeps, after the way through JSON."""
    meta: dict[str, object] = json.loads(json.dumps({"text": seen(text).to_meta()}))
    return meta


CALIBRATION = prose(40, seed=1)


@pytest.mark.parametrize(
    "evaluated",
    [
        pytest.param(CALIBRATION, id="the same text"),
        pytest.param(CALIBRATION[1000:], id="trimmed"),
        pytest.param("\n\n".join(textwrap.fill(p, 60) for p in CALIBRATION.split("\n\n")), id="other line width"),
        pytest.param(CALIBRATION.replace("\n\n", "\r\n \r\n"), id="other line ends"),
        pytest.param(prose(40, seed=2) + "\n" + CALIBRATION, id="mixed with another"),
    ],
)
def test_a_text_that_was_calibrated_on_is_refused(evaluated: str) -> None:
    with pytest.raises(InputError, match="calibrated on"):
        refuse_if_calibrated(seen(evaluated), meta_of(CALIBRATION))


ON_LINES = CALIBRATION.replace("\n\n", "\n")


@pytest.mark.parametrize(
    ("calibrated", "evaluated"),
    [
        pytest.param(ON_LINES, ON_LINES[1000:], id="trimmed"),
        pytest.param(ON_LINES, CALIBRATION[1000:], id="blank lines put in"),
        pytest.param(CALIBRATION, ON_LINES[1000:], id="blank lines taken out"),
        pytest.param(ON_LINES, ON_LINES.replace("\n", "\r\n")[1000:], id="other line ends"),
        pytest.param(ON_LINES, prose(40, seed=2) + ON_LINES, id="mixed with another"),
    ],
)
def test_paragraphs_of_one_line_need_no_blank_lines_between_them(calibrated: str, evaluated: str) -> None:
    with pytest.raises(InputError, match="lines of at least 200 characters"):
        refuse_if_calibrated(seen(evaluated), meta_of(calibrated))


def test_a_document_of_json_lines_is_recognised_line_by_line() -> None:
    documents = [ON_LINES[:6000], ON_LINES[6000:]]
    calibrated = {"text": fingerprint(b"[...]", documents).to_meta()}
    with pytest.raises(InputError, match="calibrated on"):
        refuse_if_calibrated(fingerprint(b"", [documents[1][2000:] + prose(9, seed=2)]), calibrated)


def test_lines_of_less_than_200_characters_do_not_count() -> None:
    lines = "\n".join(line[:199] for line in ON_LINES.splitlines())
    refuse_if_calibrated(seen(lines[1000:]), meta_of(lines))


@pytest.mark.parametrize("evaluated", [CALIBRATION[1000:], ON_LINES[1000:]], ids=["paragraphs", "lines"])
def test_predictors_that_know_paragraphs_alone_still_recognise_them(evaluated: str) -> None:
    """As they were written before lines were hashed: paragraphs of several lines, and of one."""
    wrapped = "\n\n".join(textwrap.fill(paragraph, 250) for paragraph in CALIBRATION.split("\n\n"))
    old = [sha256(paragraph.encode()).hexdigest()[:16] for paragraph in CALIBRATION.strip().split("\n\n")]
    meta = {"text": {"sha256": "0" * 64, "paragraphs": sorted(old), "complete": True}}
    for text in (evaluated, wrapped[1000:]):
        with pytest.raises(InputError, match="calibrated on"):
            refuse_if_calibrated(seen(text), meta)


def test_a_text_on_lines_keeps_no_more_hashes_than_another() -> None:
    kept = seen("\n".join(f"{i:06d} " * 40 for i in range(2 * KEPT)))
    assert (len(kept.paragraphs), kept.complete) == (KEPT, False)
    assert len(seen(CALIBRATION).paragraphs) == 40


def test_the_same_file_is_refused_by_its_hash_alone() -> None:
    short = "a text without any long paragraph"
    with pytest.raises(InputError, match="this very text"):
        refuse_if_calibrated(seen(short).sha256, meta_of(short))


def test_another_text_is_accepted() -> None:
    refuse_if_calibrated(seen(prose(40, seed=2)), meta_of(CALIBRATION))
    refuse_if_calibrated(seen("short"), meta_of(CALIBRATION))
    refuse_if_calibrated(seen(CALIBRATION), {"origin": "dummy"})
    refuse_if_calibrated(seen(CALIBRATION), {"text": {"sha256": "0", "paragraphs": [], "complete": False}})


def test_one_common_paragraph_in_many_is_no_reason_to_refuse() -> None:
    licence = prose(1, seed=9)
    refuse_if_calibrated(seen(prose(150, seed=3) + "\n" + licence), meta_of(CALIBRATION + "\n" + licence))


def test_a_part_of_a_text_with_more_paragraphs_than_are_kept_is_found() -> None:
    long = "\n\n".join(f"{i:06d} " * 40 for i in range(2 * KEPT))
    kept = seen(long)
    part = "\n\n".join(long.split("\n\n")[100:400])
    assert not kept.complete
    assert len(kept.paragraphs) == KEPT
    assert common_share(seen(part), kept) == 1.0
    assert common_share(seen(prose(40, seed=2)), kept) == 0.0
