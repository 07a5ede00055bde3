# SPDX-License-Identifier: Apache-2.0
"""One engine, compiled once by the command line itself from the tiny checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from shadowc.cli.app import app

Shadowc = Callable[..., Result]


def environment(home: Path) -> dict[str, str]:
    """What commands read; tests of other folders in this process may set the same variables meanwhile."""
    return {"SHADOWC_CACHE": str(home / "cache"), "XDG_STATE_HOME": str(home / "state"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def cli_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own for all command-line tests of this session, and no network."""
    home = tmp_path_factory.mktemp("cli")
    wanted = environment(home)
    before = {name: os.environ.get(name) for name in (*wanted, "SHADOWC_DEBUG")}
    os.environ.update(wanted)
    os.environ.pop("SHADOWC_DEBUG", None)
    yield home
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def shadowc(cli_home: Path) -> Shadowc:
    """Run a command in this process: `shadowc("run", engine, "text")`."""
    env = environment(cli_home)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)


@pytest.fixture(scope="session")
def quick(cli_home: Path) -> tuple[str, ...]:
    """Flags of a short collect: calibration text from a file, since sampling it from the model takes longer."""
    text = cli_home / "calibration.txt"
    text.write_text("The dog reads one record, the fox reads another, and both jump over neurons. " * 40)
    return ("--data", str(text), "--positions", "64")


@pytest.fixture(scope="session")
def engine(shadowc: Shadowc, tiny_checkpoint: Path, cli_home: Path, quick: tuple[str, ...]) -> Path:
    """A sparse fp32 engine of the tiny checkpoint. Read only: copy it to change it."""
    out = cli_home / "tiny.engine"
    result = shadowc("compile", "--model", tiny_checkpoint, "--out", out, *quick)
    assert result.exit_code == 0, result.output
    return out
