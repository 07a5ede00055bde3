# SPDX-License-Identifier: Apache-2.0
"""The CUDA runtime through ctypes, against a library with its prototypes that works in host memory."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from shadowc.runtime.engine import Engine
from shadowc.runtime.load import read_manifest
from shadowc.runtime.tensorrt import cuda
from shadowc.runtime.tensorrt.cuda import Cudart, Gpu
from shadowc.runtime.tensorrt.device import Arena, bytes_at
from shadowc.runtime.tensorrt.engine import TensorRtEngine
from shadowc.spec.errors import InternalError, SetupError
from tests.conftest import TINY
from tests.runtime.host_device import HostDevice, HostExecution, HostPlan, load_model
from tests.runtime.tensorrt_folder import write_folder

SOURCE = Path(__file__).parent / "fake_cudart.c"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    out = tmp_path_factory.mktemp("cudart") / "libcudart.so.13"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", str(SOURCE), "-o", str(out)], check=True)
    return out


@pytest.fixture
def fake(library: Path, tmp_path: Path) -> Cudart:
    """A library of its own for each test: its memory is limited."""
    return Cudart(str(shutil.copy(library, tmp_path / "libcudart.so")))


def test_the_gpu_has_a_name_and_a_capability(fake: Cudart) -> None:
    assert fake.gpu == Gpu("Fake GPU", (8, 6))
    assert str(fake.gpu) == "Fake GPU (compute capability 8.6)"


def test_bytes_go_to_the_device_and_back(fake: Cudart) -> None:
    arena = Arena(fake)
    address, (host, view) = arena.allocate(100), arena.pinned(100)
    view[:] = np.arange(100)
    fake.upload(address, host, 100)
    view[:] = 0
    fake.download(host, address, 100)
    fake.synchronize()
    assert view.tolist() == list(range(100))
    arena.close()


def test_rows_are_copied_with_their_pitches(fake: Cudart) -> None:
    source, to = fake.allocate(6), fake.allocate(12)
    bytes_at(source, 6)[:] = range(6)
    bytes_at(to, 12)[:] = 99
    fake.copy_rows(to, 4, source, 2, 2, 3)
    fake.synchronize()
    assert bytes_at(to, 12).tolist() == [0, 1, 99, 99, 2, 3, 99, 99, 4, 5, 99, 99]


def test_a_graph_replays_what_was_recorded(fake: Cudart) -> None:
    arena = Arena(fake)
    address, (host, view) = arena.allocate(4), arena.pinned(4)
    fake.begin_capture()
    fake.upload(address, host, 4)
    graph = fake.end_capture()
    assert bytes_at(address, 4).tolist() == [255] * 4
    view[:] = 7
    fake.launch(graph)
    assert bytes_at(address, 4).tolist() == [7] * 4
    fake.release_graph(graph)


def test_events_tell_the_time_between_them(fake: Cudart) -> None:
    first, second = fake.event(), fake.event()
    assert fake.milliseconds(first, second) == 1.0


def test_too_little_memory_says_how_much_there_is(fake: Cudart) -> None:
    with pytest.raises(SetupError, match="34 MB more are needed on Fake GPU, of whose 17 MB 17 are free") as caught:
        fake.allocate(1 << 25)
    assert "fewer rows" in caught.value.hint


def test_a_failure_names_the_function_and_the_error(fake: Cudart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_RUN", "700")
    with pytest.raises(InternalError, match=r"cudaStreamSynchronize failed: cudaErrorFake \(700\), as it was told to"):
        fake.synchronize()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"FAKE_STATUS": "35", "FAKE_DRIVER": "0"}, "this machine has no NVIDIA driver"),
        ({"FAKE_STATUS": "35", "FAKE_DRIVER": "12040"}, r"supports CUDA 12\.4, running needs 13\.4"),
        ({"FAKE_STATUS": "100", "CUDA_VISIBLE_DEVICES": "7"}, r"sees no GPU \(CUDA_VISIBLE_DEVICES='7'\)"),
        ({"FAKE_DEVICES": "0"}, "sees no GPU"),
    ],
)
def test_without_a_usable_gpu_the_sentence_says_what_is_missing(
    library: Path, monkeypatch: pytest.MonkeyPatch, settings: Mapping[str, str], says: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(cuda.VARIABLE, str(library))
    with pytest.raises(SetupError, match=says) as caught:
        cuda.open_cuda.__wrapped__()
    assert caught.value.hint


@pytest.mark.parametrize("call", ["FAKE_STATUS", "FAKE_SET", "FAKE_STREAM", "FAKE_PROPERTIES"])
@pytest.mark.parametrize("status", ["46", "802", "803", "804", "999"])
def test_a_gpu_that_fails_while_it_is_opened_is_a_matter_of_the_machine(
    library: Path, monkeypatch: pytest.MonkeyPatch, call: str, status: str
) -> None:
    monkeypatch.setenv(call, status)
    monkeypatch.setenv(cuda.VARIABLE, str(library))
    says = rf"cannot be used: cuda\w+ failed: cudaErrorFake \({status}\), as it was told to"
    with pytest.raises(SetupError, match=says) as caught:
        cuda.open_cuda.__wrapped__()
    assert caught.value.hint.startswith("nvidia-smi")


def test_too_little_pinned_memory_is_told_and_other_failures_stay_ours(
    fake: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_PINNED", "2")
    with pytest.raises(SetupError, match="34 MB more of pinned host memory") as caught:
        fake.allocate_pinned(1 << 25)
    assert "fewer rows" in caught.value.hint
    monkeypatch.setenv("FAKE_PINNED", "1")
    with pytest.raises(InternalError, match="cudaHostAlloc failed"):
        fake.allocate_pinned(1)


def test_a_release_that_fails_keeps_no_other_from_its_memory(fake: Cudart, monkeypatch: pytest.MonkeyPatch) -> None:
    arena, gone = Arena(fake), []
    for size in (1, 2, 3):
        arena.allocate(size)
    middle = arena._held[1][1]

    def release(address: int) -> None:
        gone.append(address)
        if address == middle:
            raise InternalError("cudaFree failed")

    arena._held[:] = [(release, address) for _, address in arena._held]
    wanted = [address for _, address in reversed(arena._held)]
    with pytest.raises(InternalError, match="cudaFree failed"):
        arena.close()
    assert gone == wanted


def test_a_library_that_does_not_load_is_passed_over(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_candidates", lambda: iter(("/nowhere/libcudart.so", str(SOURCE), str(library))))
    assert cuda.open_cuda.__wrapped__().path == str(library)


class DirectPlan(HostPlan):
    """Runs at once on plain addresses, since the device under test has no queue."""

    def execution(self, *, steady: bool) -> HostExecution:
        return DirectExecution(self)


class DirectExecution(HostExecution):
    def enqueue(self) -> None:
        self._run(dict(self.addresses), dict(self.sizes))


class OpenDevice(HostDevice):
    """Addresses of another device's memory."""

    def view(self, memory: Mapping[int, np.ndarray], address: int, size: int) -> np.ndarray:
        return bytes_at(address, size)


def test_a_whole_engine_runs_on_it(
    fake: Cudart, engine: Engine, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHADOWC_CUDA_GRAPH", "0")  # what a plan does here cannot be recorded
    manifest = write_folder(folders["fp32"], tmp_path / "engine")
    plans = {
        name: DirectPlan(OpenDevice(), part, load_model(tmp_path / "engine", part.onnx))
        for name, part in manifest.tensorrt.plans.items()
    }
    host = TensorRtEngine(tmp_path / "engine", read_manifest(tmp_path / "engine"), fake, plans)
    ids = np.random.default_rng(0).integers(4, TINY["vocab_size"], (2, 9), dtype=np.int64)
    found, expected = (one.generate(ids, max_new_tokens=12, density=0.5) for one in (host, engine))
    np.testing.assert_array_equal(found, expected)
    host.close()
