# SPDX-License-Identifier: Apache-2.0
"""Rounds of decoding.py over several engines, kept in a file: what is there is not measured again.

In: engines by name, settings. Out: a JSON file with every sample, written after each round, and the figures over
its rounds. A round is a process of its own, which a launcher such as `chrt -f 50` may precede.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.decoding import Round
from benchmarks.peers import machine
from shadowc.emit.folder import hash_file
from shadowc.measure.bench import floor_seconds
from shadowc.measure.rounds import mean_seconds
from shadowc.runtime.cores import usable_cores
from shadowc.runtime.library import OpLibrary

ROOT = Path(__file__).resolve().parents[1]
FORMAT = 2
"""Of the file of rounds."""
_TAIL = 3


class LedgerError(Exception):
    """The file was made with other options, or a round failed; the message says what to do."""


def say(text: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"{text}\n")


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


def compile_dummy(name: str, model: str, folder: Path, *flags: str) -> None:
    """Compile with random weights where `folder` is not up to date, in a process that gives its memory back.

    Raises:
        LedgerError: it did not compile; the message has the command.
    """
    command = [str(Path(sys.executable).with_name("shadowc")), "compile", "--model", model, "--load-format", "dummy"]
    command += [*flags, "--offline", "--out", str(folder)]
    say(f"{name}: compiling")
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode != 0:
        raise LedgerError(f"{name}: it did not compile; {' '.join(command)} says why")


@dataclass(frozen=True, slots=True)
class Asked:
    """What is measured; rounds of other options are not mixed."""

    weights: str
    mask: str
    """What a mask holds for, "token" or "sequence"."""
    settings: tuple[str, ...]
    tokens: int
    threads: int


class Ledger:
    """All rounds so far, in a file.

    Args:
        path: JSON; made when it is not there.
        asked: what is measured.

    Raises:
        LedgerError: the file holds what was measured with other options, or was written by another version.
    """

    def __init__(self, path: Path, asked: Asked) -> None:
        self.path, self.asked = path, asked
        if path.is_file():
            self.content: dict[str, Any] = json.loads(path.read_text("utf-8"))
            if self.content.get("format") != FORMAT:
                raise LedgerError(f"{path} was written by another version: name another --out")
            found = self.content["asked"]
            if found != json.loads(json.dumps(asdict(asked))):
                raise LedgerError(f"{path} was measured with {found}, asked is {asdict(asked)}: name another --out")
        else:
            self.content = {"format": FORMAT, "asked": asdict(asked), "machine": asdict(machine.here()), "engines": {}}

    def require_same(self, launcher: str) -> None:
        """Refuse to add rounds to those of another machine, launcher or op library: their medians would be of neither.

        Raises:
            LedgerError: they differ; of what an older file does not say nothing is known.
        """
        library = hash_file(OpLibrary.installed().path).sha256[:16]
        now = {"machine": asdict(machine.here()), "launcher": launcher, "library": library}
        if any(one.get("rounds") for one in self.content["engines"].values()):
            differing = [
                f"{name} {self.content[name]}" for name in now if self.content.get(name, now[name]) != now[name]
            ]
            if differing:
                raise LedgerError(
                    f"{self.path} has rounds of {', '.join(differing)}; here it is {now}: name another --out"
                )
        self.content.update(now)

    def rounds(self, name: str) -> list[Round]:
        """The rounds of one engine."""
        return [Round.of(found) for found in self.content["engines"].get(name, {}).get("rounds", [])]

    def facts(self, name: str) -> Mapping[str, Any]:
        """What was noted about an engine."""
        return dict(self.content["engines"].get(name, {}).get("facts", {}))

    def note(self, name: str, **facts: object) -> None:
        """Add facts about an engine."""
        self.content["engines"].setdefault(name, {}).setdefault("facts", {}).update(facts)
        self._write()

    def add(self, name: str, found: Round) -> None:
        """Keep one more round, with the load of the machine in front of it."""
        entry = {**asdict(found), "date": date.today().isoformat(), "load_average": os.getloadavg()[0]}
        self.content["engines"].setdefault(name, {}).setdefault("rounds", []).append(entry)
        self._write()

    def loads(self) -> list[float]:
        """Load averages behind the rounds."""
        return [found["load_average"] for one in self.content["engines"].values() for found in one.get("rounds", [])]

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n", "utf-8")
        unfinished.replace(self.path)


def measure(folder: Path, asked: Asked, turn: int, launcher: str = "") -> Round:
    """One round in a process of its own.

    Args:
        folder: the engine.
        asked: what is measured.
        turn: number of the round.
        launcher: a command that starts the process, such as `chrt -f 50`; empty: none.

    Raises:
        LedgerError: it failed; the message has the end of what it said.
    """
    options = ["--settings", ",".join(asked.settings), "--turn", str(turn)]
    options += ["--tokens", str(asked.tokens), "--threads", str(asked.threads)]
    command = [*shlex.split(launcher), sys.executable, "-m", "benchmarks.decoding", str(folder.resolve()), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode != 0:
        end = " / ".join(done.stderr.strip().splitlines()[-_TAIL:])
        raise LedgerError(f"round {turn + 1} of {folder} failed (exit status {done.returncode}): {end}")
    return Round.of(json.loads(done.stdout))


@dataclass(frozen=True, slots=True)
class Figures:
    """One setting of one engine over its rounds: medians."""

    ms: float
    lowest: float
    highest: float
    size: float
    """Bytes per token."""
    floor_ms: float
    """Of each round, its bytes at 0.9 of what the memory gave before and behind each turn."""
    above_ms: float | None
    """Of each round, the time beyond the floor, of turns during which memory kept its pace; None without any."""
    ratio: float
    """Of each round, its time over that of the base."""


def figures(rounds: Sequence[Round], setting: str, base: str) -> Figures:
    """Medians over at least one round; ratios and floors are taken within each."""
    samples = [found.samples[setting] for found in rounds]
    times = [sample.ms for sample in samples]
    steady = [(kept, one.size) for one in samples if (kept := [turn for turn in one.turns if turn.steady])]
    above = [(mean_seconds(turns) - floor_seconds(turns, size)) * 1e3 for turns, size in steady]
    return Figures(
        ms=median(times),
        lowest=min(times),
        highest=max(times),
        size=median(sample.size for sample in samples),
        floor_ms=median(floor_seconds(one.turns, one.size) * 1e3 for one in samples),
        above_ms=median(above) if above else None,
        ratio=median(found.samples[setting].ms / found.samples[base].ms for found in rounds),
    )


FLOOR_TOLD = (
    "*floor*: the bytes at 0.9 of what the memory gave before and behind each turn of a few tokens (of models that "
    "caches may hold: of the round's stream); *above it*: of turns during which memory kept its pace within a fifth "
    "(of those models: of all)."
)
"""For the foot of a table that has both."""


def above(figure: Figures) -> str:
    """A table's cell: milliseconds above the floor."""
    return "" if figure.above_ms is None else f"{figure.above_ms:.2f}"


def threads_of(asked: int | None) -> int:
    """Threads of the operators: as asked, else one per core."""
    return asked or usable_cores()


def surroundings(ledger: Ledger) -> str:
    """Machine, threads, streams and load, as a sentence for the foot of a table."""
    asked, here = ledger.asked, ledger.content["machine"]
    every = [found for name in ledger.content["engines"] for found in ledger.rounds(name)]
    streams = [turn.pace / 1e9 for found in every for sample in found.samples.values() for turn in sample.turns]
    large = [found.large_pages for found in every if found.large_pages is not None]
    pages = f", {min(large):.0%} of the weights or more in large pages" if large else ""
    loads = ledger.loads()
    return (
        f"{here['cpu']}, {asked.threads} threads, {asked.weights} weights, a mask per {asked.mask}, "
        f"{asked.tokens} tokens a sample{pages}; around the turns the stream read {median(streams):.1f} GB/s "
        f"({min(streams):.1f} to {max(streams):.1f}); load average behind a round {min(loads):.1f} to {max(loads):.1f}."
    )
