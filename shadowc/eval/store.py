# SPDX-License-Identifier: Apache-2.0
"""Outcomes that were computed, in memory or in a folder that an interrupted sweep goes on from.

`outcomes.jsonl` grows by one line for each piece of work and is flushed to the disk with it; a line that a kill cut
short is dropped when the folder is opened again. `sweep.json` says what the outcomes are of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import IO

from shadowc.eval.request import Outcome
from shadowc.spec.errors import InputError

SCHEMA = 1
OUTCOMES_FILE = "outcomes.jsonl"
ABOUT_FILE = "sweep.json"
LOCK_FILE = ".lock"
Key = tuple[str, str]
"""Corpus and setting."""
DAMAGE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
"""What reading JSON of another shape than was written raises."""


class Store:
    """Outcomes by corpus, setting and item."""

    def __init__(self) -> None:
        self._found: dict[Key, dict[int, tuple[Outcome, ...]]] = {}
        self._file: IO[str] | None = None

    def of(self, key: Key) -> Mapping[int, tuple[Outcome, ...]]:
        """What is known, by the index of the item."""
        return self._found.get(key, {})

    def put(self, key: Key, outcomes: Mapping[int, Sequence[Outcome]]) -> None:
        """Keep outcomes of some items."""
        self._found.setdefault(key, {}).update({index: tuple(one) for index, one in outcomes.items()})
        if self._file is not None:
            values = {index: [_row(outcome) for outcome in one] for index, one in outcomes.items()}
            self._file.write(json.dumps({"corpus": key[0], "setting": key[1], "items": values}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    @contextmanager
    def kept_in(self, folder: Path, about: Mapping[str, object]) -> Iterator[None]:
        """Read what a folder knows, and write to it what is put while the block runs.

        Raises:
            InputError: the folder holds something else, outcomes of something else, a damaged line, or is in use.
        """
        import filelock

        check_folder(folder)
        _check_same(folder, about)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder / LOCK_FILE, timeout=0), _opened(folder, about) as self._file:
                self._read(folder / OUTCOMES_FILE)
                yield
        except filelock.Timeout:
            raise InputError(
                f"another process writes to {folder}", hint="wait for it, or give another folder to --sweep"
            ) from None
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror or error}", hint="--sweep OTHER") from error
        finally:
            self._file = None

    def _read(self, path: Path) -> None:
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                record = json.loads(line)
                items = {int(index): tuple(map(_outcome, one)) for index, one in record["items"].items()}
                self._found.setdefault((record["corpus"], record["setting"]), {}).update(items)
            except DAMAGE as error:
                raise InputError(
                    f"{path}, line {number} is damaged: {error}",
                    hint=f"sed -i {number}d '{path}' takes it out; what it held is computed again",
                ) from None


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but a sweep; nothing is touched.

    Raises:
        InputError: it does, or it is a file.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, expected a folder for the sweep", hint="--sweep OTHER")
    if not (folder / ABOUT_FILE).is_file() and any(entry.name != LOCK_FILE for entry in folder.iterdir()):
        raise InputError(f"{folder} holds something else than a sweep", hint="--sweep with an empty folder")


def _check_same(folder: Path, about: Mapping[str, object]) -> None:
    """Refuse outcomes of other things."""
    path = folder / ABOUT_FILE
    if not path.is_file():
        return
    hint = f"rm -r {folder}, or --sweep OTHER"
    try:
        known = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}", hint=hint) from None
    if not isinstance(known, dict):
        raise InputError(f"{path} is damaged: it is {type(known).__name__}, expected an object", hint=hint)
    wanted = {"schema": SCHEMA, **about}
    differing = [
        f"{name} is {known.get(name)}, now {wanted.get(name)}"
        for name in sorted({*known, *wanted})
        if known.get(name) != wanted.get(name)
    ]
    if differing:
        raise InputError(
            f"{folder} holds a sweep of something else: {'; '.join(differing)}",
            hint="--sweep with another folder",
            problems=differing,
        )


@contextmanager
def _opened(folder: Path, about: Mapping[str, object]) -> Iterator[IO[str]]:
    """Open the file of outcomes behind its last whole line."""
    path, part = folder / OUTCOMES_FILE, folder / f"{ABOUT_FILE}.part"
    part.write_text(json.dumps({"schema": SCHEMA, **about}, indent=1) + "\n", "utf-8")
    part.replace(folder / ABOUT_FILE)
    with path.open("ab+") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as text:
        yield text


def _row(outcome: Outcome) -> list[float | bool]:
    return [outcome.log_probability, outcome.greedy, outcome.masked, outcome.heads, outcome.neurons]


def _outcome(row: Sequence[float]) -> Outcome:
    if len(row) != len(fields(Outcome)):
        raise ValueError(f"{len(row)} values of an outcome, expected {len(fields(Outcome))}")
    return Outcome(float(row[0]), bool(row[1]), int(row[2]), float(row[3]), float(row[4]))
