# SPDX-License-Identifier: Apache-2.0
"""scripts/lowest.sh removes nothing outside its environment, whatever the interpreters answer."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && ln -s {made} "$3/bin/python" ;;
"-m pip") ;;
"-c import"*) {answer} ;;
-*) echo "torch==2.0" ;;
esac
"""
"""In the place of an interpreter: `-` lists what is wanted, `-c` says where packages lie."""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def ran(top: Path, here: str, there: str) -> tuple[int, list[str]]:
    """Run the script in a clone whose two interpreters answer so; its exit code, and what `rm` and `cp` were given."""
    (top / "clone" / "scripts").mkdir(parents=True)
    shutil.copy(TOP / "scripts" / "lowest.sh", top / "clone" / "scripts")
    script(top / "clone" / "scripts" / "torch_index.sh", "")
    for tool in ("rm", "cp"):
        script(top / "bin" / tool, f'#!/bin/sh\necho "{tool} $*" >> {top / "asked"}\n')
    script(top / "bin" / "df", "#!/bin/sh\necho 99\n")
    made = script(top / "made", PYTHON.format(answer=there, made=""))
    script(top / "clone" / ".venv" / "bin" / "python", PYTHON.format(answer=here, made=made))
    environment = {**os.environ, "PATH": f"{top / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "scripts/lowest.sh"], cwd=top / "clone", env=environment, capture_output=True, check=False, timeout=60
    )
    return done.returncode, (top / "asked").read_text().splitlines()


def test_the_same_sources_are_put_into_the_environment(tmp_path: Path) -> None:
    code, asked = ran(tmp_path, "echo /one/site", "echo /two/site")
    environment = tmp_path / "clone" / ".cache" / "lowest"
    assert code == 0
    assert asked == [f"rm -rf {environment}", "rm -rf /two/site/*shadowc*", "cp -r /one/site/*shadowc* /two/site/"]


@pytest.mark.parametrize("answer", ["exit 1", ":"], ids=["fails", "says nothing"])
@pytest.mark.parametrize("silent", ["here", "there"])
def test_nothing_is_removed_where_an_interpreter_does_not_say_where_packages_lie(
    tmp_path: Path, answer: str, silent: str
) -> None:
    code, asked = ran(tmp_path, **{"here": "echo /one/site", "there": "echo /two/site", silent: answer})
    assert code != 0
    assert asked == [f"rm -rf {tmp_path / 'clone' / '.cache' / 'lowest'}"]
