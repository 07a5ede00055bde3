# SPDX-License-Identifier: Apache-2.0
"""One contestant as a process of its own: started, asked, paused while others run, ended.

A paused process is stopped by SIGSTOP, so that the pools of idle runtimes, some of which wait by spinning, take
nothing from the one that is measured.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

LOAD_SECONDS = 900.0
RUN_SECONDS = 300.0
_TAIL = 3


class ContestantError(Exception):
    """A contestant failed; the message says how in one line."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How a contestant is started."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    """Its standard error; begun anew by every start."""


class ContestantProcess:
    """A running contestant.

    Args:
        launch: how to start it.

    Raises:
        ContestantError: it cannot load its model.
    """

    def __init__(self, launch: Launch) -> None:
        self._log = launch.log
        with launch.log.open("wb") as log:
            self._process = subprocess.Popen(
                launch.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=dict(launch.environment)
            )
        self._pending = b""
        try:
            self.versions: dict[str, str] = self._ask({}, LOAD_SECONDS)["versions"]
        except ContestantError:
            self.close()
            raise

    def generate(self, prompt: Sequence[int], new_tokens: int, setting: str) -> dict[str, Any]:
        """One continuation, as contestants/protocol.py describes it; the process must not be paused.

        Raises:
            ContestantError: it failed, ended, or took too long.
        """
        return self._ask({"prompt": list(prompt), "new_tokens": new_tokens, "setting": setting}, RUN_SECONDS)

    def pause(self) -> None:
        """Stop all of its threads, and wait until they have stopped: a busy machine delivers the signal late."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def peak_bytes(self) -> int:
        """Most resident memory so far, mapped weight files included."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text("ascii")
        except OSError as error:
            raise ContestantError(self._end()) from error
        return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)

    def close(self) -> None:
        """End it, paused or not."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, request: Mapping[str, object], seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ContestantError(self._end()) from error
        reply: dict[str, Any] = json.loads(self._line(monotonic() + seconds, seconds))
        if "error" in reply:
            raise ContestantError(" ".join(str(reply["error"]).split()))
        return reply

    def _line(self, deadline: float, seconds: float) -> bytes:
        """The next line of its replies."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not ready.select(max(0.0, deadline - monotonic())):
                    raise ContestantError(f"no answer within {seconds:.0f} s")
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    raise ContestantError(self._end())
                self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _end(self) -> str:
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        lines = [line.strip() for line in self._log.read_text("utf-8", "replace").splitlines() if line.strip()]
        return " / ".join([f"it ended ({how})", *lines[-_TAIL:]])
