# SPDX-License-Identifier: Apache-2.0
"""The blocks of a page that a reader would run: found, and run in order in the current folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN = ("sh", "python")
"""Blocks of these languages are run; `console` shows what is typed elsewhere, `text` what comes out."""
PATIENCE = 3000


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    language: str
    text: str
    line: int
    """Of its first line within the page."""


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page."""
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        found.append(Block(match[1], match[2], page.count("\n", 0, match.start(2)) + 1))
    return found


def run(page: str, name: str, environment: Mapping[str, str]) -> int:
    """Run a page's blocks; what Python defines stays known to the page's later blocks. Returns how many were run.

    Raises:
        AssertionError: a command failed, with its output and its place.
    """
    known: dict[str, Any] = {"__name__": "page"}
    count = 0
    for block in blocks(page):
        if block.language == "sh":
            _shell(block, name, environment)
        elif block.language == "python":
            # Lines are counted as in the page, so that a traceback names the right one.
            exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), known)
        count += block.language in RUN
    return count


def _shell(block: Block, name: str, environment: Mapping[str, str]) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], env={**os.environ, "PATH": path, **environment},
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, f"{name}:{block.line}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
