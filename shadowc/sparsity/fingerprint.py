# SPDX-License-Identifier: Apache-2.0
"""Recognises a text that was seen before: the hash of the whole, and hashes of its longer paragraphs and lines.

A predictor keeps the fingerprint of its calibration text, and an evaluation on the same text, a renamed copy of it
or a part of it is refused. A paragraph ends at a blank line, or is a line of its own: nothing tells which of the two a
text has, so both are hashed. Those shorter than 200 characters do not count: headings and formulas of politeness
occur in many texts. A text with none of 200 characters is recognised only as a whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shadowc.spec.errors import InputError

PARAGRAPH_CHARACTERS = 200
"""Shortest paragraph or line that is hashed."""
KEPT = 4096
"""Hashes kept, 80 kB. Of a longer text the smallest ones: a fair sample, in which any other text can look itself up."""
REFUSED_SHARE = 0.01
"""From this share of common paragraphs on an evaluation text counts as calibrated on."""
_HASH_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What is remembered of a text."""

    sha256: str
    """Of the file's bytes, or of the token ids when the model wrote the text itself."""
    paragraphs: tuple[str, ...] = ()
    """Hashes of its paragraphs and lines, ascending; at most `KEPT`. Predictors of before have those of paragraphs."""
    complete: bool = True
    """False: the text has more of them than were kept."""

    def to_meta(self) -> dict[str, object]:
        """Return it as JSON values."""
        return {"sha256": self.sha256, "paragraphs": list(self.paragraphs), "complete": self.complete}

    @staticmethod
    def from_meta(meta: Mapping[str, object]) -> Fingerprint:
        """Read what `to_meta` wrote; missing fields mean nothing is known."""
        paragraphs = meta.get("paragraphs", ())
        known = tuple(str(p) for p in paragraphs) if isinstance(paragraphs, Sequence) else ()
        return Fingerprint(str(meta.get("sha256", "")), known, bool(meta.get("complete", True)))


def fingerprint(content: bytes, documents: Sequence[str]) -> Fingerprint:
    """Return the fingerprint of a file's content and of the texts in it."""
    hashes = sorted({_hash(paragraph) for document in documents for paragraph in _paragraphs(document)})
    return Fingerprint(hashlib.sha256(content).hexdigest(), tuple(hashes[:KEPT]), len(hashes) <= KEPT)


def common_share(evaluated: Fingerprint, calibrated: Fingerprint) -> float:
    """Return which share of the evaluated text's hashes the calibration text has too (0 if it cannot be told)."""
    seen = set(calibrated.paragraphs)
    last = max(seen, default="")
    comparable = [h for h in evaluated.paragraphs if calibrated.complete or h <= last]
    return sum(h in seen for h in comparable) / len(comparable) if comparable else 0.0


def refuse_if_calibrated(evaluated: Fingerprint | str, predictor_meta: Mapping[str, object]) -> None:
    """Refuse to evaluate on the text that the predictor was calibrated on.

    Args:
        evaluated: the evaluation text; a bare SHA-256 compares whole files only.
        predictor_meta: `Predictor.meta`, or its copy in engine.json.

    Raises:
        InputError: it is the same text, or shares at least 1 % of its longer paragraphs and lines with it.
    """
    known = predictor_meta.get("text")
    if not isinstance(known, Mapping):
        return
    calibrated = Fingerprint.from_meta(known)
    mine = Fingerprint(evaluated) if isinstance(evaluated, str) else evaluated
    hint = "evaluate on another text, or calibrate on another one: shadowc collect --data FILE"
    if mine.sha256 == calibrated.sha256:
        raise InputError("the predictor was calibrated on this very text, so its score would be flattering", hint=hint)
    share = common_share(mine, calibrated)
    if share >= REFUSED_SHARE:
        raise InputError(
            f"{share:.0%} of this text's paragraphs and lines of at least {PARAGRAPH_CHARACTERS} characters were in "
            "the text that the predictor was calibrated on",
            hint=hint,
        )


def _paragraphs(text: str) -> list[str]:
    """Return the longer paragraphs and lines, with white space made uniform: another line width changes no paragraph.

    A paragraph on one line is both, with one hash.
    """
    blocks = (" ".join(block.split()) for block in (*re.split(r"\n\s*\n", text), *text.split("\n")))
    return [block for block in blocks if len(block) >= PARAGRAPH_CHARACTERS]


def _hash(paragraph: str) -> str:
    return hashlib.sha256(paragraph.encode()).hexdigest()[:_HASH_DIGITS]
