# SPDX-License-Identifier: Apache-2.0
"""The command line in a process of its own that writes down every progress event, and gets a signal at a given moment.

Called with a file for the events, the moment as JSON (or null), and the arguments of `shadowc`. A line of the file is a
JSON list: seconds since the start, kind of event, open stages. A moment is [stage, number of the event within it,
seconds after that event, signal]; stage "" is the time before the first event. Without a delay the process signals
itself, so that the moment is exact; else a second process does, which no lock of Python can hold up.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

START = time.monotonic()


def waiting_signaller(number: int) -> int:
    """A process that sends the signal to this one, as many seconds later as the pipe that is returned says."""
    reader, writer = os.pipe()
    target = os.getpid()
    if os.fork() == 0:
        os.close(writer)
        text = os.read(reader, 64)
        if text:
            time.sleep(float(text))
            with suppress(ProcessLookupError):
                os.kill(target, number)
        os._exit(0)
    os.close(reader)
    return writer


def plant(defect: str | None) -> None:
    """Break what a test wants to see found, or take away what it wants to do without."""
    if defect == "written in its place":
        from shadowc import output

        output._sibling = lambda out, kind: out
    if defect == "no account":
        import pwd

        def unknown(number: int) -> object:
            raise KeyError(f"getpwuid(): uid not found: {number}")

        pwd.getpwuid = unknown


def main() -> None:
    log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    plant(os.environ.get("PLANTED"))
    stage, at, delay, number = json.loads(sys.argv.pop(1)) or (None, 0, 0.0, 0)
    signaller = waiting_signaller(number) if delay else -1
    if stage == "":
        os.write(signaller, str(delay).encode())
    from shadowc.cli import render
    from shadowc.cli.app import app
    from shadowc.spec.progress import Event, EventProgress, Progress

    seen: Counter[str] = Counter()

    def sink(event: Event) -> None:
        os.write(log, json.dumps([time.monotonic() - START, event.kind, event.stage]).encode() + b"\n")
        outer = event.stage[0] if event.stage else ""
        seen[outer] += 1
        if outer == stage and seen[outer] == at + 1:
            if delay:
                os.write(signaller, str(delay).encode())
            else:
                os.kill(os.getpid(), number)

    @contextmanager
    def progress() -> Iterator[Progress]:
        yield EventProgress(sink)

    render.progress = progress
    app()


if __name__ == "__main__":
    main()
