# SPDX-License-Identifier: Apache-2.0
"""Compiles in processes of their own, what they leave on disk, and moments at which they get a signal."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from shadowc import stage_cache
from shadowc.cli.app import app

CHILD = Path(__file__).with_name("child.py")
STAGES = ("checkpoint", "collect", "train", "trace", "passes", "emit", "parity", "sample")
"""All stages of a compile that tell when they begin."""
PATIENCE = 1500
"""Seconds that a process may take on a busy machine."""
TEXT = "The dog reads one record, the fox reads another, and both jump over neurons. " * 120

Tree = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Moment:
    """When a signal is sent."""

    stage: str
    """"" before the first event."""
    event: int = 0
    """Number of the event within the stage."""
    delay: float = 0.0
    """Seconds after the event."""
    signal: int = signal.SIGKILL

    def as_json(self) -> str:
        return json.dumps([self.stage, self.event, self.delay, int(self.signal)])


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that has ended."""

    code: int
    output: str
    errors: str
    events: tuple[tuple[float, str, tuple[str, ...]], ...]
    """Seconds since the start, kind, open stages."""

    @property
    def stage(self) -> str:
        """The outer stage that was open last; "" if none had begun, "after" if all had ended."""
        if not self.events:
            return ""
        _, kind, stages = self.events[-1]
        return "after" if kind == "end" and len(stages) == 1 and stages[0] == STAGES[-1] else stages[0]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a compile works: a folder of its own with its cache, its output and the calibration text."""

    top: Path
    model: str
    width: int = 32

    @property
    def out(self) -> Path:
        return self.top / "out" / "mini.engine"

    @property
    def cache(self) -> Path:
        return self.top / "cache"

    def arguments(self, *more: str) -> list[str]:
        text = self.top / "text.txt"
        self.top.mkdir(parents=True, exist_ok=True)
        text.write_text(TEXT)
        given = ["compile", "--model", self.model, "--data", str(text), "--positions", "32", "--width", str(self.width)]
        return [*given, "--out", str(self.out), "--offline", *more]

    def start(self, moment: Moment | None = None, *more: str, **environment: str) -> Started:
        """Start a compile, and arrange for its signal."""
        arguments = self.arguments(*more)
        events = self.top / f"events-{len(list(self.top.glob('events-*')))}"
        events.touch()
        wanted = {"SHADOWC_CACHE": str(self.cache), "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(self.top / "state")}
        command = [sys.executable, str(CHILD), str(events), moment.as_json() if moment else "null", *arguments]
        process = subprocess.Popen(
            command, env={**os.environ, **wanted, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, preexec_fn=_hears_interrupts,
        )  # fmt: skip
        return Started(process, events)

    def run(self, moment: Moment | None = None, *more: str, **environment: str) -> Ended:
        return self.start(moment, *more, **environment).wait()

    def run_here(self, *more: str) -> None:
        """The same in this process, which has torch already; it must end well."""
        result = self._here(*more)
        assert result.exit_code == 0, result.output

    def refused_here(self, *more: str, cache: Path | None = None) -> str:
        """The same, and it must end with an error of the user's or of the machine's, which is returned."""
        result = self._here(*more, cache=cache)
        assert result.exit_code in (2, 6), result.output
        return result.stderr

    def _here(self, *more: str, cache: Path | None = None) -> Result:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SHADOWC_CACHE", str(cache or self.cache))
            patch.setenv("XDG_STATE_HOME", str(self.top / "state"))
            return CliRunner().invoke(app, self.arguments(*more))

    def left(self) -> Tree:
        """What stands where the engine belongs: relative name -> content."""
        return tree(self.out)

    def leftovers(self) -> list[str]:
        """Temporary folders beside the output and in the cache."""
        beside = [path.name for path in self.out.parent.glob(".*")] if self.out.parent.exists() else []
        return beside + [path.name for path in self.cache.rglob(".tmp-*")]


@dataclass(frozen=True, slots=True)
class Started:
    """A process that runs."""

    process: subprocess.Popen[str]
    log: Path

    def wait(self) -> Ended:
        output, errors = self.process.communicate(timeout=PATIENCE)
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        events = tuple((seconds, kind, tuple(stages)) for seconds, kind, stages in lines)
        return Ended(self.process.returncode, output, errors, events)


def _hears_interrupts() -> None:
    """A job in the background inherits SIGINT ignored; these tests are about processes that hear it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def tree(folder: Path) -> Tree:
    """All files of a folder: relative name -> content."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def entries(cache: Path) -> Iterator[tuple[str, Tree]]:
    """Entries of a stage cache that a run would take: "stage/key" -> content.

    Digests of files are left out: those of a file that has just been written are not kept.
    """
    for key in sorted(cache.glob("*/*/key.json")):
        if not key.parent.name.startswith(".") and key.parent.parent.name != "file-digest":
            yield f"{key.parent.parent.name}/{key.parent.name}", tree(key.parent)


def incomplete(cache: Path) -> list[str]:
    """Folders under the name of an entry that are not what their key.json says."""
    found = []
    for folder in sorted(path for path in cache.glob("*/*") if not path.name.startswith(".")):
        try:
            text = json.dumps(json.loads((folder / "key.json").read_bytes())["of"])
        except (OSError, ValueError, KeyError):
            text = "null"
        if not stage_cache._is_complete(folder, text):
            found.append(f"{folder.parent.name}/{folder.name}")
    return found


def moments(run: Ended, stage: str, count: int, seed: int, signal: int = signal.SIGKILL) -> Sequence[Moment]:
    """Seeded moments within a stage, as a measured run went: the first right at an event, the others between two.

    A process may be faster than the measured one: it is hit in the first half of the time up to the next event, and
    once at the very beginning of the time before the first.
    """
    chance = random.Random(f"{stage} {seed}")
    if stage == "":
        shares = (0.1, *(0.8,) * (count - 1))
        return [Moment("", 0, chance.uniform(0.01, share * run.events[0][0]), signal) for share in shares]
    times = [seconds for seconds, _, stages in run.events if stages[0] == stage]
    found = [Moment(stage, chance.randrange(len(times) - 1), 0.0, signal)]
    while len(found) < count:
        at = chance.uniform(times[0], times[-1])
        event = max(index for index, seconds in enumerate(times) if seconds <= at)
        found.append(Moment(stage, event, max(0.5 * (at - times[event]), 1e-4), signal))
    return found
