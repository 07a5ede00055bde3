# SPDX-License-Identifier: Apache-2.0
"""Parts of a token's time of one engine, in a process of its own.

`python -m benchmarks.styles.parts ENGINE` prints JSON: setting -> shares of predictor, selection, attention, FFN, LM
head and the rest, and milliseconds, all under ONNX Runtime's profiler.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.decoding import PROMPT_TOKENS, Setting
from benchmarks.rounds import ROOT, LedgerError
from shadowc.measure.rounds import prompt_ids
from shadowc.measure.settings import PER_TOKEN, Variant
from shadowc.measure.shares import profile
from shadowc.runtime.load import load_cpu
from shadowc.spec.density import Density


def profiled(folder: Path, settings: Sequence[str], threads: int) -> dict[str, Any]:
    """Setting HEADS/NEURONS -> the parts of a token, zeros not skipped."""
    engine = load_cpu(folder, threads=threads, skip_zeros=False, verify=False)
    densities = [Setting.parse(text).density or Density() for text in settings]
    variant = Variant(PER_TOKEN, "token", False, engine, tuple(densities))
    found = profile(variant, engine, prompt_ids(engine.manifest, PROMPT_TOKENS))
    return {text: asdict(shares) for text, shares in zip(settings, found, strict=True)}


def in_process(folder: Path, settings: Sequence[str], threads: int, launcher: str = "") -> dict[str, Any]:
    """As `profiled`, in a process that a launcher such as `chrt -f 50` may start.

    Raises:
        LedgerError: it failed; the message has the end of what it said.
    """
    options = ["--settings", ",".join(settings), "--threads", str(threads)]
    command = [*shlex.split(launcher), sys.executable, "-m", "benchmarks.styles.parts", str(folder.resolve()), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode != 0:
        raise LedgerError(f"the profile of {folder} failed: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.styles.parts", description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--settings", required=True, help="HEADS/NEURONS kept, by commas")
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args(arguments)
    sys.stdout.write(json.dumps(profiled(given.engine, given.settings.split(","), given.threads)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
