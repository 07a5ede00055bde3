# SPDX-License-Identifier: Apache-2.0
"""Two views of a stage's events. Work that is over within two seconds shows nothing at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from shadowc.spec.progress import Event

QUIET_SECONDS = 2.0
"""Shorter work shows nothing."""
LINE_SECONDS = 15.0
"""Plain lines about one stage are at least this far apart."""


def done_text(event: Event) -> str:
    """How far a stage is: `1,024 of 4,096 positions`."""
    unit = f" {event.unit}" if event.unit else ""
    return f"{event.done:,} of {event.total:,}{unit}" if event.total else f"{event.done:,}{unit}"


class PlainLines:
    """Lines for logs: the end of every outer stage that took a while, what it found, and a sign of life in between.

    Args:
        say: prints one line.
        clock: seconds that only ever grow.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._last = clock()

    def show(self, event: Event) -> None:
        """Render one event."""
        now = self._clock()
        name = ": ".join(event.stage)
        if event.kind == "begin" and len(event.stage) == 1:
            self._last = now
        elif event.kind == "end" and len(event.stage) == 1 and event.seconds >= QUIET_SECONDS:
            self._say(f"{name}: {event.seconds:.1f} s")
        elif event.kind == "failed" and len(event.stage) == 1 and event.seconds >= QUIET_SECONDS:
            self._say(f"{name}: stopped after {event.seconds:.1f} s")
        elif event.kind == "note":
            self._say(f"{name}: {event.text}" if name else event.text)
        elif event.kind in ("advance", "begin") and now - self._last >= LINE_SECONDS:
            self._last = now
            self._say(f"{name}: {done_text(event)}" if event.kind == "advance" else f"{name} …")

    def close(self) -> None:
        """Nothing stays open."""


class LiveLine:
    """One moving line per open stage on a terminal; it appears after two seconds and leaves nothing behind."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[note]}", style="dim"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._tasks: list[TaskID] = []
        self._timer: threading.Timer | None = None

    def show(self, event: Event) -> None:
        """Render one event."""
        if self._timer is None:
            self._timer = threading.Timer(QUIET_SECONDS, self._bars.start)
            self._timer.daemon = True
            self._timer.start()
        if event.kind == "begin":
            name = "  " * (len(event.stage) - 1) + event.stage[-1]
            self._tasks.append(self._bars.add_task(name, total=None, note=""))
        elif event.kind in ("end", "failed") and self._tasks:
            self._bars.remove_task(self._tasks.pop())
        elif self._tasks and event.kind == "advance":
            self._bars.update(self._tasks[-1], completed=event.done, total=event.total or None, note=done_text(event))
        elif self._tasks and event.kind == "note":
            self._bars.update(self._tasks[-1], note=event.text)
        elif event.kind == "note":
            self._bars.console.print(event.text)

    def close(self) -> None:
        """Take the line away."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        self._bars.stop()
