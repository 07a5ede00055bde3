# SPDX-License-Identifier: Apache-2.0
"""`shadowc doctor` names what is wrong with a machine and its packages, and what to type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shadowc.cli import doctor_checks as checks
from shadowc.runtime import hardware, ort_package
from shadowc.runtime.hardware import Hardware
from shadowc.runtime.library import VARIABLE, OpLibrary
from shadowc.spec.errors import SetupError
from tests.cli.conftest import Shadowc

MACHINE = Hardware("A CPU", ("AVX2",), 2, 4, 1.5, 8_000_000_000, 6_000_000_000, "madvise")


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Distributions that are said to be installed, whatever is; "module" is what the module says of itself."""
    real, given = checks._version, {}
    monkeypatch.setattr(checks, "_version", lambda name: given[name] if name in given else real(name))
    monkeypatch.setattr(
        ort_package, "installed", lambda: {name: given[name] for name in ort_package.ORT_PACKAGES if given.get(name)}
    )
    monkeypatch.setattr(checks, "_module_version", lambda: given.get("module"))
    return given


def said(versions: dict[str, str | None], module: str | None, **found: str) -> checks.Finding:
    versions.update(dict.fromkeys(ort_package.ORT_PACKAGES))
    versions.update({"module": module, **{name.replace("_", "-"): version for name, version in found.items()}})
    return checks.onnx_runtime()


def test_one_runtime_with_its_own_files_is_fine(versions: dict[str, str | None]) -> None:
    assert said(versions, "1.31.1", onnxruntime_gpu="1.31.1").state == "ok"


def test_two_runtimes_are_named_with_the_version_of_the_files_that_are_there(versions: dict[str, str | None]) -> None:
    found = said(versions, "1.31.1", onnxruntime="1.32.0", onnxruntime_gpu="1.31.1")
    assert found.state == "fails"
    for text in ("onnxruntime 1.32.0", "onnxruntime-gpu 1.31.1", "overwrite each other", "the module says 1.31.1"):
        assert text in found.found
    assert found.hint == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


def test_files_left_of_another_runtime_are_noticed(versions: dict[str, str | None]) -> None:
    """What is left when one of two was uninstalled: metadata of one, files of the other, or none."""
    wrong = said(versions, "1.32.0", onnxruntime_gpu="1.31.1")
    assert (wrong.state, "its files are those of 1.32.0" in wrong.found) == ("fails", True)
    gone = said(versions, None, onnxruntime="1.32.0")
    assert (gone.state, "cannot be imported" in gone.found) == ("fails", True)
    assert gone.hint == "pip uninstall -y onnxruntime && pip install onnxruntime"


def test_runtime_that_is_too_old_is_named(versions: dict[str, str | None]) -> None:
    found = said(versions, "1.22.0", onnxruntime="1.22.0")
    assert (found.state, found.hint) == ("fails", "pip install 'onnxruntime>=1.23'")


def test_the_package_to_upgrade_is_the_one_that_is_there(
    versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    from shadowc.runtime.session import check_ort

    monkeypatch.setattr(onnxruntime, "__version__", "1.22.0")
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"):
        versions.update({**dict.fromkeys(ort_package.ORT_PACKAGES), name: "1.22.0"})
        with pytest.raises(SetupError, match=r"1\.22\.0 is installed") as caught:
            check_ort()
        assert caught.value.hint == f"pip install --upgrade {name}"


def test_no_memory_to_measure_with_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    library = OpLibrary.installed()
    monkeypatch.setattr(checks, "STREAM_BYTES", 1 << 60)
    finding, speed = checks.stream(MACHINE, library)
    assert (finding.state, speed) == ("note", None)
    assert "how fast memory is read could not be measured: that takes" in finding.found


def test_op_library_of_another_version_is_named_with_both_versions(
    shadowc: Shadowc, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = OpLibrary.installed().version
    monkeypatch.setattr("shadowc.runtime.library.__version__", "9.9.9")
    result = shadowc("doctor", "--json")
    assert result.exit_code == 6
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert findings["op library"]["state"] == "fails"
    assert f"is of version {built}, shadowc of version 9.9.9" in findings["op library"]["found"]
    assert findings["cpu"]["found"] == "cannot build or run: see op library"
    assert findings["bandwidth"]["state"] == "note"
    assert json.loads(result.stdout)["machine"]["bytes_per_second"] is None


def test_op_library_for_a_newer_runtime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_api_of", lambda _: 99)
    monkeypatch.setattr(checks, "_module_version", lambda: "1.31.1")
    found, _ = checks.op_library()
    assert (found.state, found.hint) == ("fails", f"pip install '{ort_package.to_install()}>=1.99'")
    assert "built for API 99 of ONNX Runtime, version 1.31.1 offers 31" in found.found


def test_op_library_that_the_runtime_does_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    def refuse(*_: object) -> None:
        raise RuntimeError("undefined symbol: Ort\nand a page of addresses")

    monkeypatch.setattr(onnxruntime.SessionOptions, "register_custom_ops_library", refuse)
    found, _ = checks.op_library()
    assert (found.state, found.found) == ("fails", "ONNX Runtime does not take it: undefined symbol: Ort")


def test_library_that_is_named_by_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(OpLibrary.installed().path))
    found, _ = checks.op_library()
    assert (found.state, f"{VARIABLE} names it" in found.found) == ("ok", True)


def test_missing_package_stops_the_cpu_target(shadowc: Shadowc, versions: dict[str, str | None]) -> None:
    versions.update(
        {"onnxscript": None, "module": checks._version("onnxruntime-gpu") or checks._version("onnxruntime")}
    )
    result = shadowc("doctor")
    assert result.exit_code == 6
    assert "cannot build or run: see onnxscript" in result.stdout
    assert "pip install 'onnxscript>=" in result.stderr


def test_machine_is_told_with_what_its_container_grants() -> None:
    found = checks.processor(MACHINE, None)
    assert found.found == "A CPU, 2 of 4 cores (a container grants 1.5), AVX2"
    assert checks.memory(MACHINE).found == "8.0 GB, 6.0 GB of it free; large pages: madvise"


def test_large_pages_that_are_off_are_a_note_with_a_command() -> None:
    import dataclasses

    found = checks.memory(dataclasses.replace(MACHINE, large_pages="never"))
    assert (found.state, "transparent_hugepage" in found.hint) == ("note", True)


@pytest.mark.parametrize(("speed", "state"), [(34e9, "ok"), (2e9, "note")])
def test_bandwidth_is_told_in_time_per_gigabyte_and_noted_when_slow(speed: float, state: str) -> None:
    class Library:
        def stream_read(self, size: int, threads: int, repeats: int) -> float:
            assert (size, threads) == (checks.STREAM_BYTES, MACHINE.cores)
            return speed

    found, measured = checks.stream(MACHINE, Library())  # type: ignore[arg-type]  # what is needed of one
    assert (found.state, measured) == (state, speed)
    assert f"{1e12 / speed:.0f} ms for every GB" in found.found


def test_json_holds_the_machine_and_every_target(shadowc: Shadowc) -> None:
    found = json.loads(shadowc("doctor", "--json").stdout)
    assert found["machine"]["bytes_per_second"] > 1e8
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["isa"] == OpLibrary.installed().isa
    assert {"cpu", "tensorrt", "tensorrt-rtx"} <= {finding["name"] for finding in found["findings"]}


X86 = "processor\t: 0\nmodel name\t: AMD EPYC 9R14\nflags\t\t: fpu avx2 avx512f avx512_vnni\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nBogoMIPS\t: 243\nFeatures\t: fp asimd asimddp i8mm\n"
MEMORY = "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\n"


@pytest.mark.parametrize(
    ("cpuinfo", "extensions"),
    [(X86, ("AVX2", "AVX-512", "AVX-512 VNNI")), (ARM, ("NEON", "dot products", "int8 matrices"))],
)
def test_processor_and_memory_are_read_as_the_kernel_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str, extensions: tuple[str, ...]
) -> None:
    for name, text in (("_CPUINFO", cpuinfo), ("_MEMINFO", MEMORY), ("_LARGE_PAGES", "always [madvise] never\n")):
        path = tmp_path / name
        path.write_text(text)
        monkeypatch.setattr(hardware, name, path)
    found = hardware.here()
    assert found.extensions == extensions
    assert (found.memory, found.available) == (16_384_000_000, 8_192_000_000)
    assert found.large_pages == "madvise"
    if cpuinfo is X86:
        assert found.processor == "AMD EPYC 9R14"


def test_system_that_tells_nothing_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_CPUINFO", "_MEMINFO", "_LARGE_PAGES"):
        monkeypatch.setattr(hardware, name, tmp_path / "none")
    found = hardware.here()
    assert (found.extensions, found.memory, found.large_pages) == ((), None, None)
    assert found.processor
    assert checks.memory(found).state == "ok"
