# SPDX-License-Identifier: Apache-2.0
"""Turns what leaves a command into one sentence and an exit code; the reader never sees a traceback.

0 done, 2 to 6 and 70 as in `shadowc.spec.errors`, 130 interrupted, 141 the reader of a pipe went away.
`SHADOWC_DEBUG=1` lets the traceback through.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import typer

from shadowc.cli import render
from shadowc.spec.errors import InternalError, ShadowcError

INTERRUPTED = 130
PIPE_CLOSED = 141


def guarded(command: Callable[..., None], *, kept: str = "") -> Callable[..., None]:
    """Wrap a command function; its signature stays what typer reads the flags from.

    Args:
        command: the function behind a subcommand.
        kept: what is left on disk when the user interrupts, as the end of a sentence.
    """

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        _quieten_libraries()
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except ShadowcError as error:
            if _debug():
                raise
            render.error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            render.interrupted(kept)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Python flushes standard output once more at exit, and would complain then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(PIPE_CLOSED) from None
        except Exception as error:
            if _debug():
                raise
            render.unexpected(error, _write_log(error))
            raise typer.Exit(InternalError.exit_code) from None

    return run


def _debug() -> bool:
    return os.environ.get("SHADOWC_DEBUG", "") not in ("", "0")


def _quieten_libraries() -> None:
    """Keep the talk of libraries off the terminal; shadowc says itself what matters."""
    if _debug():
        return
    warnings.simplefilter("ignore")
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TORCH_LOGS", "-all"),
    ):
        os.environ.setdefault(name, value)


def _write_log(error: Exception) -> Path | None:
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
