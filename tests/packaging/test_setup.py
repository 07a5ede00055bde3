# SPDX-License-Identifier: Apache-2.0
"""`make` on machines that lack something: it says what to type, and only what is missing."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
TOOLS = ("bash", "dirname", "mkdir", "tail", "sed", "grep", "awk", "cat", "env", "rm", "ls", "timeout")


class Machine:
    """A folder with the setup script and a PATH of its own: real basic tools, and scripts in the place of others."""

    def __init__(self, top: Path) -> None:
        self.top = top / "clone"
        self.bin = top / "bin"
        (self.top / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        for script in ("setup.sh", "torch_index.sh"):
            shutil.copy(TOP / "scripts" / script, self.top / "scripts" / script)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None, tool
            (self.bin / tool).symlink_to(found)

    def add(self, name: str, script: str = "exit 0") -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def setup(self) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "HOME": str(self.top), "LC_ALL": "C"}
        command = ["bash", str(self.top / "scripts" / "setup.sh")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Debian, an ordinary user without sudo, nothing installed but a usable Python."""
    machine = Machine(tmp_path)
    machine.add("id", "echo 1000")
    machine.add("apt-get")
    machine.add("dpkg-query", "exit 1")
    machine.add("python3")
    return machine


def test_without_permission_it_names_all_missing_packages_and_stops(machine: Machine) -> None:
    done = machine.setup()
    assert done.returncode == 1
    assert "sudo apt-get install libonnxruntime-dev libhwy-dev g++ cmake ninja-build" in done.stdout
    assert "no C++ compiler found" in done.stderr
    assert "sudo apt-get install" in done.stderr


def test_it_names_only_what_is_missing(machine: Machine) -> None:
    for tool in ("cmake", "ninja"):
        machine.add(tool)
    machine.add("dpkg-query", 'case "$*" in *libhwy-dev*) echo install ok installed;; *) exit 1;; esac')
    assert "to type: sudo apt-get install libonnxruntime-dev g++\n" in machine.setup().stdout


def test_python_without_ensurepip_gets_its_venv_package(machine: Machine) -> None:
    script = 'case "$*" in *ensurepip*) exit 1;; *print*) echo python3.12-venv;; esac'
    machine.add("python3", script)
    done = machine.setup()
    assert "python3.12-venv" in done.stdout
    assert done.returncode == 1


def test_without_any_usable_python_it_says_so(machine: Machine) -> None:
    machine.add("python3", "exit 1")
    machine.add("c++")
    done = machine.setup()
    assert done.returncode == 1
    assert "python3 python3-venv" in done.stdout
    assert "no Python 3.11 to 3.14 with the venv module found" in done.stderr


def test_as_root_it_installs_what_the_release_has(machine: Machine) -> None:
    machine.add("id", "echo 0")
    machine.add("apt-get", f'echo "apt-get $*" >>{machine.top}/calls')
    machine.add("apt-cache", 'case "$2" in lib*) echo "  Candidate: (none)";; *) echo "  Candidate: 1.0";; esac')
    done = machine.setup()
    calls = (machine.top / "calls").read_text().splitlines()
    assert calls == ["apt-get update", "apt-get install -y --no-install-recommends g++ cmake ninja-build"]
    assert "no apt package libhwy-dev here" in done.stdout


def test_a_step_that_fails_shows_the_end_of_the_log(machine: Machine) -> None:
    machine.add("c++")
    machine.add("python3", 'case "$*" in *venv*.venv) echo the disk is full >&2; exit 1;; esac')
    done = machine.setup()
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert "build/setup.log" in done.stderr


def test_cpu_index_is_not_used_where_a_gpu_is_present(machine: Machine) -> None:
    machine.add("nvidia-smi")
    machine.add("python3", "exit 0")
    command = ["bash", str(machine.top / "scripts" / "torch_index.sh"), "python3"]
    environment = {"PATH": str(machine.bin)}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == ""


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has an NVIDIA GPU")
@pytest.mark.parametrize(
    ("answer", "expected"), [("exit 0", "--index-url=https://download.pytorch.org/whl/cpu\n"), ("exit 1", "")]
)
def test_cpu_index_is_used_only_if_it_answers(machine: Machine, answer: str, expected: str) -> None:
    machine.add("python3", answer)
    command = ["bash", str(machine.top / "scripts" / "torch_index.sh"), "python3"]
    environment = {"PATH": str(machine.bin)}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == expected
