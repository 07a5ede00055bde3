# SPDX-License-Identifier: Apache-2.0
"""What the project file promises, and what a wheel holds."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from shadowc import __version__

TOP = Path(__file__).parents[2]
LICENCE = "SPDX-License-Identifier: Apache-2.0"
SOURCES = (".py", ".cc", ".h", ".cu", ".cuh", ".sh", ".cmake", ".map")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))


def test_no_extra_adds_a_second_onnxruntime(project: dict[str, Any]) -> None:
    """The plain distributions overwrite each other; a plugin provider (onnxruntime-ep-...) is something else."""
    extras = [need for needs in project["project"]["optional-dependencies"].values() for need in needs]
    assert not [need for need in extras if re.match(r"onnxruntime(?!-ep-)", need)]


def test_tests_build_with_the_tensorrt_that_the_extra_installs(project: dict[str, Any]) -> None:
    extra = project["project"]["optional-dependencies"]["rtx"]
    assert all("==" in need for need in extra)
    assert set(extra) <= set(project["dependency-groups"]["rtx"])


def test_exactly_one_onnxruntime_is_required_on_every_platform(project: dict[str, Any]) -> None:
    from packaging.requirements import Requirement

    needs = [Requirement(need) for need in project["project"]["dependencies"]]
    for system, machine in (("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"), ("Windows", "AMD64")):
        environment = {"platform_system": system, "platform_machine": machine}
        chosen = [
            need.name
            for need in needs
            if need.name.startswith("onnxruntime") and need.marker is not None and need.marker.evaluate(environment)
        ]
        assert chosen == ["onnxruntime-gpu" if (system, machine) == ("Linux", "x86_64") else "onnxruntime"]


def test_doctor_knows_the_lowest_versions_of_the_project_file(project: dict[str, Any]) -> None:
    from shadowc.cli.doctor_checks import LOWEST
    from shadowc.runtime.session import LOWEST_ORT

    needs = dict(re.match(r"([\w-]+)>=([\d.]+)", need).groups() for need in project["project"]["dependencies"])  # type: ignore[union-attr]
    assert {name: tuple(map(int, needs[name].split("."))) for name in LOWEST} == LOWEST
    assert tuple(map(int, needs["onnxruntime-gpu"].split("."))) == LOWEST_ORT


def test_version_is_read_from_one_file(project: dict[str, Any]) -> None:
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["scikit-build"]["metadata"]["version"]["input"] == "shadowc/_version.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_every_source_file_has_a_licence_line() -> None:
    """An empty file (a package marker) has nothing to license."""
    folders = ("shadowc", "passes", "plugins", "scripts", "examples", "tests", "cmake", ".ci")
    paths = [path for folder in folders for path in (TOP / folder).rglob("*") if path.suffix in SOURCES]
    assert len(paths) > 100
    bare = [
        str(path.relative_to(TOP)) for path in paths if path.stat().st_size and LICENCE not in path.read_text()[:300]
    ]
    assert bare == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this tree, built as `make wheel` builds it where no nvcc is (the GPU code takes a minute)."""
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(TOP),
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(out),
    ]
    command += ["--config-settings", f"build-dir={out / 'build'}"]
    command += ["--config-settings", "cmake.define.SHADOWC_CUDA=OFF"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return zipfile.ZipFile(next(out.glob("shadowc-*.whl")))


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the compiler counts for the first
def test_wheel_serves_every_python_and_is_bound_to_its_platform(wheel: zipfile.ZipFile) -> None:
    assert re.fullmatch(rf"shadowc-{re.escape(__version__)}-py3-none-(?!any)\w+\.whl", Path(wheel.filename or "").name)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wheel_holds_the_whole_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    needed = {"shadowc/py.typed", "shadowc/plugins/libshadowc_ort.so", "shadowc/passes/__init__.py"}
    needed |= {f"shadowc/data/opt_mini/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert needed <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"shadowc"}
    assert not [name for name in names if name.endswith((".cc", ".cu", ".cuh", ".h", ".map", "CMakeLists.txt"))]
    assert not [name for name in names if name.startswith("shadowc/data/") and name.endswith(".py")]


@pytest.mark.slow
def test_library_in_the_wheel_needs_nothing_beyond_the_system_and_what_lies_beside_it(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    beside = {Path(name).name for name in wheel.namelist() if name.startswith("shadowc/plugins/lib")}
    allowed = re.compile(r"(libc|libm|libstdc\+\+|libgcc_s|libpthread|libdl|ld-linux-[\w-]+)\.so\.\d+")
    for name in sorted(beside):
        library = Path(wheel.extract(f"shadowc/plugins/{name}", tmp_path))
        dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
        assert needed
        assert {entry for entry in needed if not allowed.fullmatch(entry)} <= beside
