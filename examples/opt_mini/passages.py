# SPDX-License-Identifier: Apache-2.0
"""Draw a calibration text and a test text for opt-mini: passages from the training and held-out parts.

In: the texts that opt-mini was trained on. Out: `calibration.jsonl` and `test.jsonl`, one passage a line (field
`text`), as many from each source. Passages never overlap, and `corpus.split` decides what is held out. Python's manual
is left out: another version of Python would draw other passages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

import corpus

FILES = ("calibration.jsonl", "test.jsonl")


def draw(name: str, texts: Iterable[str], count: int, tokenizer: Tokenizer, tokens: int, seed: int) -> list[str]:
    """Return `count` passages of the texts; only the end of a text gives one of less than `tokens`, at least half.

    Raises:
        SystemExit: there are not so many.
    """
    pieces = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        pieces += [ids[start : start + tokens] for start in range(0, len(ids), tokens)]
    random.Random(seed).shuffle(pieces)
    passages: list[str] = []
    for ids in pieces:
        passage = tokenizer.decode(ids)
        # A border inside a character reads otherwise where the passage stands alone.
        alone = tokenizer.encode(passage, add_special_tokens=False).ids
        if len(ids) >= tokens // 2 and len(alone) == len(ids):
            passages.append(passage)
        if len(passages) == count:
            return passages
    raise SystemExit(f"{name}: {count} passages of {tokens} tokens asked for, there are {len(passages)}")


def main() -> None:
    """Parse the arguments, write both files, print their hashes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="the texts that train.py was given")
    parser.add_argument("--count", type=int, default=30, help="passages of each source")
    parser.add_argument("--tokens", type=int, default=255, help="of a passage, at most; a window has one more, </s>")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder, which must not hold the files")
    given = parser.parse_args()
    if taken := [str(given.out / name) for name in FILES if (given.out / name).exists()]:
        raise SystemExit(f"{', '.join(taken)}: already there; give another --out")
    tokenizer = Tokenizer.from_file(str(Path(__file__).parent / "tokenizer.json"))
    given.out.mkdir(parents=True, exist_ok=True)
    parts = [part for part in corpus.load(given.text) if part.source != corpus.PYDOC]
    drawn: list[list[str]] = [[], []]
    for source in corpus.sources(parts):
        mine = [part for part in parts if part.source == source]
        texts = {f"{source}, training": [p.train for p in mine], f"{source}, held out": [p.held_out for p in mine]}
        for passages, (name, of_part) in zip(drawn, texts.items(), strict=True):
            passages += draw(name, of_part, given.count, tokenizer, given.tokens, given.seed)
    for name, passages in zip(FILES, drawn, strict=True):
        content = "".join(json.dumps({"text": passage}, ensure_ascii=False) + "\n" for passage in passages).encode()
        (given.out / name).write_bytes(content)
        sys.stdout.write(f"{hashlib.sha256(content).hexdigest()}  {name}: {len(passages)} passages\n")


if __name__ == "__main__":
    main()
