# SPDX-License-Identifier: Apache-2.0
"""The C++ example compiles against the headers, stays short, and says in one sentence what it lacks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from shadowc.runtime.tensorrt.bindings import libraries_folder
from tests.runtime.tensorrt_folder import write_folder

EXAMPLE = Path(__file__).parents[2] / "examples" / "tensorrt_cpp"
CUDA = Path(os.environ.get("CUDA_PATH", "/usr/local/cuda"))


def headers() -> Path | None:
    """The folder of NvInferRuntime.h: named in the environment, or one that the build downloaded."""
    named = os.environ.get("TENSORRT_INCLUDE_DIR")
    downloaded = sorted((EXAMPLE.parents[1] / "build" / "tensorrt_headers").glob("*/NvInferRuntime.h"))
    return Path(named) if named else next((path.parent for path in reversed(downloaded)), None)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    include, folder = headers(), libraries_folder()
    compiler = shutil.which("g++")
    if include is None or compiler is None or not (CUDA / "include" / "cuda_runtime_api.h").is_file():
        pytest.skip("needs g++, the CUDA toolkit and TensorRT's headers (TENSORRT_INCLUDE_DIR)")
    if folder is None:
        pytest.skip("needs libtensorrt_rtx to link against: pip install 'shadowc[rtx]'")
    out = tmp_path_factory.mktemp("example")
    library = next(folder.glob("libtensorrt_rtx.so.*"))
    soname = out / "libtensorrt_rtx.so.1"
    soname.symlink_to(library)
    command = [
        compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", str(EXAMPLE / "main.cc"), "-o", str(out / "generate"),
        "-isystem", str(include), "-isystem", str(CUDA / "include"), str(library), f"-Wl,-rpath,{out}",
        str(CUDA / "lib64" / "libcudart_static.a"), "-lpthread", "-ldl", "-lrt",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out / "generate"


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, check=False)


def test_the_example_is_one_cmake_file_and_one_source_under_200_lines() -> None:
    assert {path.name for path in EXAMPLE.iterdir()} == {"CMakeLists.txt", "README.md", "main.cc"}
    assert len((EXAMPLE / "main.cc").read_text().splitlines()) < 200


def test_without_arguments_it_shows_its_usage(program: Path) -> None:
    result = run(program)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: generate FOLDER")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("{none}", 5, 6), "cannot read {none}/engine.json"),
        (("{folder}", "--tokens", "0", 5, 6), "expected 1 to 63 ids and some --tokens"),
        (("{folder}", *range(4, 80)), "expected 1 to 63 ids and some --tokens"),
    ],
)
def test_what_it_lacks_is_one_sentence(
    program: Path, folders: dict[str, Path], tmp_path: Path, arguments: tuple[object, ...], says: str
) -> None:
    names = {"{none}": str(tmp_path / "none"), "{folder}": str(tmp_path / "engine")}
    write_folder(folders["fp32"], tmp_path / "engine")
    result = run(program, *(names.get(str(argument), argument) for argument in arguments))
    assert result.returncode == 1
    assert result.stderr == "error: " + says.replace("{none}", names["{none}"]) + "\n"


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="an NVIDIA GPU is here")
def test_without_a_gpu_it_says_so(program: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    write_folder(folders["fp32"], tmp_path / "engine")
    result = run(program, tmp_path / "engine", 5, 6)
    assert result.returncode == 1
    assert re.fullmatch(r"error: no usable GPU: .*\n", result.stderr)


def test_the_patterns_find_every_weight_and_number_of_engine_json(folders: dict[str, Path], tmp_path: Path) -> None:
    """The example reads engine.json with the patterns below, which the writer's sorted keys allow."""
    manifest = write_folder(folders["fp32"], tmp_path / "engine")
    source, json = (EXAMPLE / "main.cc").read_text(), (tmp_path / "engine" / "engine.json").read_text()
    entry = r'"name": "([^"]+)",\s*"offset": ([0-9]+)'
    assert entry.replace("\\", "\\\\").replace('"', '\\"') in source
    assert dict(re.findall(entry, json)) == {one.name: str(one.offset) for one in manifest.tensorrt.weights}
    wanted = {"max_context": 64, "vocab": manifest.model.vocab, "eos": manifest.model.eos}
    for name, value in wanted.items():
        assert f'number(json, "{name}")' in source
        assert set(re.findall(rf'"{name}": (-?[0-9]+)', json)) == {str(value)}
    assert re.findall(r'"file": "(libshadowc_[a-z0-9]+\.so)"', json) == ["libshadowc_trt11.so"]
