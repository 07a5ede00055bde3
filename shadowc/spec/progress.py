# SPDX-License-Identifier: Apache-2.0
"""How a stage reports what it does: a protocol without a renderer, so that no stage knows about terminals.

A stage takes `progress: Progress | None = None` and writes `progress = progress or NullProgress()`. The
command line turns the events into bars or plain lines; tests record them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

Field = str | int | float


class Progress(Protocol):
    """What a stage may call. None of it can fail, and none of it changes what the stage computes."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Bracket a named piece of work: `with progress.stage("trace"): ...`; stages may nest."""

    def advance(self, done: int, total: int, unit: str = "") -> None:
        """Tell how far the innermost stage is: `done` of `total` (0: unknown) units."""

    def note(self, text: str, **fields: Field) -> None:
        """Tell one finding of the innermost stage, with its numbers as fields."""


class NullProgress:
    """Reports to nobody."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Bracket nothing."""
        return nullcontext()

    def advance(self, done: int, total: int, unit: str = "") -> None:
        """Tell nobody."""

    def note(self, text: str, **fields: Field) -> None:
        """Tell nobody."""


EventKind = Literal["begin", "advance", "note", "end", "failed"]


@dataclass(frozen=True, slots=True)
class Event:
    """One report as data."""

    kind: EventKind
    stage: tuple[str, ...]
    """Names of the open stages, outermost first; for `begin`, `end` and `failed` the last one is the subject."""
    text: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    seconds: float = 0.0
    """Duration of the stage, on `end` and `failed`."""
    fields: Mapping[str, Field] = field(default_factory=dict)


class EventProgress:
    """Turns the calls of a stage into events and hands them to `sink`, in order.

    Args:
        sink: receives every event; a renderer, or `list.append` in a test.
        clock: seconds that only ever grow.
    """

    def __init__(self, sink: Callable[[Event], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._sink = sink
        self._clock = clock
        self._open: tuple[str, ...] = ()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Send `begin`, then `end` (or `failed`, when an exception leaves the block) with the duration."""
        outer, inner = self._open, (*self._open, name)
        started = self._clock()
        self._open = inner
        self._sink(Event("begin", inner))
        kind: EventKind = "failed"
        try:
            yield
            kind = "end"
        finally:
            self._sink(Event(kind, inner, seconds=self._clock() - started))
            self._open = outer

    def advance(self, done: int, total: int, unit: str = "") -> None:
        """Send how far the innermost stage is."""
        self._sink(Event("advance", self._open, done=done, total=total, unit=unit))

    def note(self, text: str, **fields: Field) -> None:
        """Send one finding with its numbers."""
        self._sink(Event("note", self._open, text=text, fields=fields))
