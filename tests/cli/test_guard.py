# SPDX-License-Identifier: Apache-2.0
"""Whatever a command raises becomes one sentence and an exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from shadowc.cli.guard import INTERRUPTED, PIPE_CLOSED, STOPPED, guarded
from shadowc.spec import errors
from shadowc.spec.errors import InputError, ShadowcError


def raising(error: BaseException) -> typer.Typer:
    def command() -> None:
        raise error

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(guarded(command, kept="the trace is complete"))
    return app


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SHADOWC_DEBUG", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ShadowcError)]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_kind_of_error_has_its_exit_code_and_no_traceback(kind: type[ShadowcError]) -> None:
    result = CliRunner().invoke(raising(kind("no such model", hint="shadowc doctor")), [])
    assert result.exit_code == kind.exit_code
    assert result.stderr == "error: no such model\nnext: shadowc doctor\n"
    assert result.stdout == ""


def test_exit_codes_are_distinct_and_stable() -> None:
    codes = {kind.__name__: kind.exit_code for kind in ALL}
    assert codes == {
        "ShadowcError": 1,
        "InputError": 2,
        "UnsupportedError": 3,
        "IncompatibleEngineError": 4,
        "VerificationError": 5,
        "SetupError": 6,
        "InternalError": 70,
    }


def test_all_problems_are_listed_once() -> None:
    error = InputError("2 files differ, a.bin is one", problems=["a.bin is one", "b.bin is missing"])
    result = CliRunner().invoke(raising(error), [])
    assert result.stderr == "error: 2 files differ, a.bin is one\n  - b.bin is missing\n"


def test_an_unexpected_exception_is_one_line_and_leaves_its_traceback_in_a_file() -> None:
    result = CliRunner().invoke(raising(ZeroDivisionError("by\nzero")), [])
    assert result.exit_code == 70
    first, second = result.stderr.splitlines()
    assert first == "error: unexpected ZeroDivisionError: by zero; this is a bug in shadowc"
    log = Path(second.removeprefix("next: attach ").removesuffix(" to a report"))
    assert "Traceback (most recent call last)" in log.read_text(encoding="utf-8")


def test_debug_lets_the_traceback_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHADOWC_DEBUG", "1")
    result = CliRunner().invoke(raising(InputError("x")), [])
    assert isinstance(result.exception, InputError)


def test_an_interrupt_says_what_is_kept() -> None:
    result = CliRunner().invoke(raising(KeyboardInterrupt()), [])
    assert result.exit_code == INTERRUPTED
    assert result.stderr == "interrupted; the trace is complete\n"


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
@pytest.mark.parametrize(
    ("number", "code", "word"), [("SIGINT", INTERRUPTED, "interrupted"), ("SIGTERM", STOPPED, "stopped")]
)
def test_a_signal_that_a_library_turns_into_an_error_is_still_no_bug(
    monkeypatch: pytest.MonkeyPatch, number: str, code: int, word: str
) -> None:
    monkeypatch.setattr("shadowc.cli.guard._write_log", lambda _: pytest.fail("a traceback was written"))
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def command() -> None:
        try:
            os.kill(os.getpid(), getattr(signal, number))
            time.sleep(30)
        except KeyboardInterrupt:
            raise RuntimeError("a session failed") from None

    before = signal.getsignal(signal.SIGTERM)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(guarded(command, kept="the trace is complete", again="type it again"))
    result = CliRunner().invoke(app, [])
    assert result.exit_code == code
    assert result.stderr == f"{word}; the trace is complete\nnext: type it again\n"
    assert signal.getsignal(signal.SIGTERM) is before


def in_a_process(body: str, **options: object) -> subprocess.CompletedProcess[str]:
    code = (
        f"import typer\nfrom shadowc.cli import render\nfrom shadowc.cli.guard import guarded\ndef command():\n{body}\n"
    )
    code += "app = typer.Typer(pretty_exceptions_enable=False)\napp.command()(guarded(command))\napp()\n"
    return subprocess.run([sys.executable, "-c", code], text=True, timeout=60, check=False, **options)  # type: ignore[call-overload, no-any-return]


def test_ctrl_c_ends_a_process_with_130() -> None:
    # A job in the background inherits SIGINT ignored; the test is about a process that hears it.
    body = " import os, signal, time\n signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    body += " os.kill(os.getpid(), signal.SIGINT)\n time.sleep(30)"
    result = in_a_process(body, capture_output=True)
    assert result.returncode == INTERRUPTED
    assert result.stderr == "interrupted; nothing was written\n"


def test_a_reader_that_goes_away_ends_a_process_quietly() -> None:
    body = " import os, sys\n r, w = os.pipe()\n os.dup2(w, 1)\n os.close(w)\n os.close(r)\n render.line('text')"
    result = in_a_process(body, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert result.returncode == PIPE_CLOSED
    assert result.stderr == ""


def test_warnings_of_libraries_stay_off_the_terminal() -> None:
    result = in_a_process(" import warnings\n warnings.warn('old api')", capture_output=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_signature_that_typer_reads_is_the_commands_own() -> None:
    import inspect

    def command(model: str, width: int = 3) -> None:
        """Do it."""

    wrapped: Callable[..., None] = guarded(command)
    assert inspect.signature(wrapped) == inspect.signature(command)
    assert wrapped.__doc__ == "Do it."
