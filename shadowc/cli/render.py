# SPDX-License-Identifier: Apache-2.0
"""The only module that prints. Standard output carries results, standard error carries the talk.

On a terminal there is colour and a moving line; elsewhere there are plain lines, so that logs stay readable.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from shadowc.spec.errors import ShadowcError
    from shadowc.spec.progress import Progress

PLAIN_WIDTH = 200
_UNBOUNDED = 10_000
_UNITS = ("B", "kB", "MB", "GB", "TB")


def line(text: str) -> None:
    """One line of the result."""
    sys.stdout.write(text + "\n")


def piece(text: str) -> None:
    """A piece of streamed text, shown at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def as_json(value: object) -> None:
    """The whole result for a script: one JSON document, keys in the order given."""
    line(json.dumps(_without_nan(value), indent=2, ensure_ascii=False, allow_nan=False, default=str))


def _without_nan(value: object) -> object:
    """Replace what was not counted (NaN) by null: JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facts(rows: Mapping[str, str], *, title: str = "", talk: bool = False) -> None:
    """Names and values below each other; `talk` sends them to standard error."""
    from rich.text import Text

    console = _console(talk)
    if title:
        console.print(Text(title, style="bold"))
    width = max((len(name) for name in rows), default=0)
    for name, value in rows.items():
        console.print(Text.assemble("  ", (name.ljust(width), "cyan"), "  ", value), soft_wrap=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", talk: bool = False) -> None:
    """A table; the first column holds names, the others numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = _console(talk)
    if title:
        console.print(Text(title, style="bold"))
    view = Table(
        box=box.SIMPLE_HEAD if console.is_terminal else None,
        pad_edge=False,
        header_style="cyan" if console.is_terminal else "",
    )
    for at, column in enumerate(columns):
        view.add_column(column, justify="left" if at == 0 else "right", no_wrap=True)
    for row in rows:
        view.add_row(*(Text(cell) for cell in row))
    # A terminal that is too narrow wraps the lines: rich would cut figures.
    console.width = max(console.width, console.measure(view, options=console.options.update(width=_UNBOUNDED)).maximum)
    console.print(view)


def say(text: str) -> None:
    """One line of talk."""
    from rich.text import Text

    _console(talk=True).print(Text(text), soft_wrap=True)


def error(failure: ShadowcError) -> None:
    """One sentence, every single finding, and the next thing to type."""
    from rich.text import Text

    console = _console(talk=True)
    console.print(Text.assemble(("error: ", "bold red"), failure.message), soft_wrap=True)
    for problem in (single for single in failure.problems if single not in failure.message):
        console.print(Text(f"  - {problem}"), soft_wrap=True)
    if failure.hint:
        console.print(Text.assemble(("next: ", "bold"), failure.hint), soft_wrap=True)


def unexpected(failure: BaseException, log: Path | None) -> None:
    """A bug: one line, and where its traceback lies."""
    from rich.text import Text

    what = " ".join(str(failure).split()) or "no message"
    if len(what) > PLAIN_WIDTH:
        what = what[: PLAIN_WIDTH - 1] + "…"
    console = _console(talk=True)
    console.print(
        Text.assemble(
            ("error: ", "bold red"), f"unexpected {type(failure).__name__}: {what}; this is a bug in shadowc"
        ),
        soft_wrap=True,
    )
    where = f"attach {log} to a report" if log else "repeat with SHADOWC_DEBUG=1 to see where"
    console.print(Text.assemble(("next: ", "bold"), where), soft_wrap=True)


def interrupted(kept: str, again: str = "", *, stopped: bool = False) -> None:
    """Ctrl-C, or a signal to stop: what is left on disk, and how to go on."""
    say(f"{'stopped' if stopped else 'interrupted'}; {kept or 'nothing was written'}")
    if again:
        say(f"next: {again}")


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in _UNITS[:-1]:
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} {_UNITS[-1]}"


def share(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f} %"


def seconds(value: float) -> str:
    """A duration for people."""
    if value < 100:
        return f"{value:.1f} s"
    return f"{int(value) // 60} min {int(value) % 60:02d} s"


@contextmanager
def progress() -> Iterator[Progress]:
    """Show what a stage reports: a moving line on a terminal, else a plain line per long stage."""
    from shadowc.cli.views import LiveLine, PlainLines
    from shadowc.spec.progress import EventProgress

    console = _console(talk=True)
    view = LiveLine(console) if console.is_terminal else PlainLines(say)
    try:
        yield EventProgress(view.show)
    finally:
        view.close()


def talk_console() -> Console:
    """The console of standard error, for views that move."""
    return _console(talk=True)


def _console(talk: bool) -> Console:
    """A console on today's stream; streams may have been replaced since the last call (as test runners do)."""
    from rich.console import Console

    stream = sys.stderr if talk else sys.stdout
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(file=stream, highlight=False, markup=False, emoji=False, width=PLAIN_WIDTH, no_color=True)
    return console
