# SPDX-License-Identifier: Apache-2.0
"""Turns what leaves a command into one sentence and an exit code; the reader never sees a traceback.

0 done, 2 to 6 and 70 as in `shadowc.spec.errors`, 130 interrupted (Ctrl-C), 143 stopped (SIGTERM), 141 the reader of a
pipe went away.
`SHADOWC_DEBUG=1` lets the traceback through.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from shadowc.cli import render
from shadowc.spec.errors import InternalError, LookAheadWarning, ShadowcError, SlowPlaceWarning

INTERRUPTED = 130
PIPE_CLOSED = 141
STOPPED = 143


def guarded(command: Callable[..., None], *, kept: str = "", again: str = "") -> Callable[..., None]:
    """Wrap a command function; its signature stays what typer reads the flags from.

    Args:
        command: the function behind a subcommand.
        kept: what is left on disk when the user interrupts, as the end of a sentence.
        again: how to go on after that.
    """

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        _quieten_libraries()
        asked = _AskedToEnd()
        try:
            with asked:
                command(*args, **kwargs)
                sys.stdout.flush()
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if asked.by or isinstance(error, KeyboardInterrupt):  # libraries turn an interrupt into errors of theirs
                render.interrupted(kept, again, stopped=asked.by == signal.SIGTERM)
                raise typer.Exit(STOPPED if asked.by == signal.SIGTERM else INTERRUPTED) from None
            if isinstance(error, BrokenPipeError):
                # Python flushes standard output once more at exit, and would complain then.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(PIPE_CLOSED) from None
            if _debug():
                raise
            raise typer.Exit(_explain(error)) from None

    return run


class _AskedToEnd:
    """While it is entered, Ctrl-C and SIGTERM raise KeyboardInterrupt, and `by` says which came first (0: neither).

    A signal that the process was started to ignore, as in the background of a shell, stays ignored.
    """

    def __init__(self) -> None:
        self.by = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread hears signals
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = signal.signal(number, self._heard)

    def __exit__(self, *problem: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _: object) -> None:
        self.by = self.by or number
        raise KeyboardInterrupt


def _explain(error: BaseException) -> int:
    """Tell what went wrong; the exit code."""
    if isinstance(error, ShadowcError):
        render.error(error)
        return error.exit_code
    render.unexpected(error, _write_log(error))
    return InternalError.exit_code


def _debug() -> bool:
    return os.environ.get("SHADOWC_DEBUG", "") not in ("", "0")


def _quieten_libraries() -> None:
    """Keep the talk of libraries off the terminal; shadowc says itself what matters."""
    if _debug():
        return
    warnings.simplefilter("ignore")
    for ours in (SlowPlaceWarning, LookAheadWarning):
        warnings.simplefilter("always", ours)
    warnings.showwarning = _show_warning
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TORCH_LOGS", "-all"),
    ):
        os.environ.setdefault(name, value)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    render.say(f"note: {message}")


def _write_log(error: BaseException) -> Path | None:
    """Save the traceback where it can be attached to a report; None if nothing can be written."""
    import tempfile

    from platformdirs import user_log_path

    text = "".join(traceback.format_exception(error))
    for folder in (user_log_path("shadowc"), Path(tempfile.gettempdir())):
        path = folder / f"shadowc-error-{os.getpid()}.log"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError:
            continue
        return path
    return None
