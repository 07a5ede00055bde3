# SPDX-License-Identifier: Apache-2.0
"""What is refused before a builder starts, and what builders' messages become. Needs no TensorRT."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from shadowc.emit.tensorrt import checks, child, memory, readiness
from shadowc.emit.tensorrt.builder import private_links, timing_cache
from shadowc.emit.tensorrt.interface import Sizes, check_profile
from shadowc.emit.tensorrt.memory import BUILDER_BYTES, host_bytes, host_note
from shadowc.emit.tensorrt.messages import explained, first_cause
from shadowc.runtime.tensorrt.bindings import Bindings, Messages
from shadowc.spec.errors import InputError, InternalError, SetupError, UnsupportedError
from shadowc.spec.manifest import PlanPart, PlanTensor
from shadowc.spec.options import CompileOptions
from shadowc.spec.program import WeightRecipe
from tests.emit.engines import tiny_facts

RTX = Bindings(SimpleNamespace(), "tensorrt_rtx_bindings", "rtx1", "1.7.1.116", None)
TRT10 = Bindings(SimpleNamespace(), "tensorrt", "trt10", "10.14.1", None)
ECHO = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version ...)"


def options(**changes: object) -> CompileOptions:
    return CompileOptions.model_validate({"model": "opt-mini", "target": "tensorrt-rtx", **changes})


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch):
    """Pretend that exactly these packages are installed."""

    def install(*found: Bindings) -> None:
        problems = tuple(f"{name}: not installed" for name in ("tensorrt", "tensorrt_rtx") if not found)
        monkeypatch.setattr(checks, "installed_bindings", lambda: (found, problems))

    return install


@pytest.mark.parametrize(("target", "extra"), [("tensorrt-rtx", "rtx"), ("tensorrt", "tensorrt")])
def test_missing_builder_is_told_with_what_to_install(only, target: str, extra: str) -> None:
    only()
    with pytest.raises(SetupError, match=rf"the builder of target {target}, .* is not installed") as caught:
        checks.builder_of(target)
    assert caught.value.hint == f"pip install 'shadowc[{extra}]'"


def test_builder_of_another_family_does_not_count(only) -> None:
    only(RTX)
    with pytest.raises(SetupError, match=r"TensorRT, is not installed; installed is TensorRT for RTX 1\.7\.1\.116"):
        checks.builder_of("tensorrt")
    only(RTX, TRT10)
    assert checks.builder_of("tensorrt") is TRT10
    assert checks.builder_of("tensorrt-rtx") is RTX


@pytest.mark.parametrize(("version", "known"), [("10.13.3.9", False), ("10.14.1", True), ("10.16", True)])
def test_builder_that_cannot_parse_the_prefill_is_too_old(only, version: str, known: bool) -> None:
    only(dataclasses.replace(TRT10, version=version))
    if known:
        assert checks.builder_of("tensorrt").version == version
        return
    with pytest.raises(SetupError, match=r"TensorRT 10\.13\.3\.9 is too old: .* expected 10\.14 or newer") as caught:
        checks.builder_of("tensorrt")
    assert "--upgrade" in caught.value.hint


def test_missing_plugin_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHADOWC_TRT_LIBRARY", str(tmp_path / "gone.so"))
    with pytest.raises(SetupError, match=r"names .*gone\.so, which is no file"):
        checks.plugin_of(RTX)


@pytest.mark.parametrize(
    ("name", "bindings", "refusal"),
    [
        ("libshadowc_trt11.so", RTX, ""),
        ("libshadowc_trt10.so", RTX, ""),
        ("libshadowc_trt10.so", TRT10, ""),
        ("libshadowc_trt11.so", TRT10, "was built for another TensorRT, this builder is TensorRT 10.14.1"),
        ("libshadowc_rtx1.so", TRT10, "was built for another TensorRT"),
        ("libshadowc_trt11_auto.so", RTX, "registers itself"),
    ],
)
def test_plugin_must_be_of_the_builders_family(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, bindings: Bindings, refusal: str
) -> None:
    (tmp_path / name).write_bytes(b"elf")
    monkeypatch.setenv("SHADOWC_TRT_LIBRARY", str(tmp_path / name))
    if not refusal:
        assert checks.plugin_of(bindings) == tmp_path / name
        return
    with pytest.raises(SetupError, match=refusal) as caught:
        checks.plugin_of(bindings)
    assert "SHADOWC_TRT_LIBRARY" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        (
            {"compute_capability": ("9.0",)},
            UnsupportedError,
            r"does not build for compute capability 9\.0; it has 7\.5",
        ),
        ({"compute_capability": ("8.6", "7.5")}, UnsupportedError, r"7\.5 has no float32 products, .* predictor needs"),
        (
            {"compute_capability": ("7.5",), "predictor": "none", "weights": "fp32"},
            UnsupportedError,
            "--weights fp32 means",
        ),
        ({"target": "tensorrt", "compute_capability": ("8.0",)}, InputError, "it builds for the GPU of this machine"),
    ],
)
def test_compute_capabilities_that_cannot_be_built_are_refused(changes, kind, words: str) -> None:
    with pytest.raises(kind, match=words):
        checks.check_capabilities(options(**changes))


def test_turing_is_allowed_for_a_dense_half_precision_engine() -> None:
    checks.check_capabilities(options(compute_capability=("7.5",), predictor="none"))


@pytest.mark.parametrize("capability", ["8", "sm86", "8.6.1", ""])
def test_compute_capability_has_two_numbers(capability: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        options(compute_capability=(capability,))


def test_batch_beyond_the_kernels_is_refused() -> None:
    with pytest.raises(InputError, match=r"--max-batch 17 is out of range, expected 1 to 16"):
        checks.check_sizes(options(max_batch=17))


def test_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(InputError, match="--max-context 65 is more than opt-tiny has positions for, which is 64"):
        checks.sizes_of(options(max_context=65), dataclasses.replace(tiny_facts(), head_size=32, heads=2))


def test_shape_that_the_kernels_do_not_handle_is_named_before_anything_is_built() -> None:
    with pytest.raises(UnsupportedError, match="no kernels for opt-tiny: its heads are 16 wide, expected 32, 64"):
        checks.sizes_of(options(), tiny_facts())
    deep = dataclasses.replace(tiny_facts(), layers=80)
    with pytest.raises(UnsupportedError, match=r"heads are 16 wide.*it has 80 layers, expected at most 65") as caught:
        checks.sizes_of(options(), deep)
    assert len(caught.value.problems) == 2


def test_limits_that_nobody_set_are_the_models() -> None:
    facts = dataclasses.replace(tiny_facts(), head_size=32, heads=2)
    assert checks.sizes_of(options(), facts) == Sizes(4, 64)
    assert checks.sizes_of(options(max_context=20), facts).chunk == 20


def test_doctor_names_what_is_missing_and_the_next_command(only) -> None:
    only()
    found = readiness.readiness("tensorrt")
    assert (found.builds, found.runs) == (False, False)
    assert "not installed" in found.text
    assert found.hint == "pip install 'shadowc[tensorrt]'"


# --- profiles


def plan(**past: object) -> PlanPart:
    ids = {"smallest": (1, 1), "best": (1, 1), "largest": (4, 8)}
    values = {"smallest": (1,), "best": (1,), "largest": (4,), **past}
    tensors = (
        PlanTensor(name="input_ids", kind="token", dtype="int64", shape=(-1, -1), **ids),
        PlanTensor(name="past", kind="state", dtype="int64", shape=(-1,), **values),
    )
    return PlanPart(file="decode.plan", onnx="decode.onnx", inputs=tensors, outputs=())


@pytest.mark.parametrize(
    ("past", "words"),
    [
        ({"smallest": (3,)}, "past may have 3 to 4 at axis 0, best 1"),
        ({"smallest": None}, "past has no complete profile"),
        ({"largest": (4, 4)}, "past has no complete profile"),
        ({"largest": (2,)}, r"the batch ends at \[2, 4\], depending on the input"),
    ],
)
def test_profile_that_is_not_consistent_is_refused(past: dict[str, object], words: str) -> None:
    check_profile(plan())
    with pytest.raises(InternalError, match=words):
        check_profile(plan(**past))


def test_profile_with_a_wrong_fixed_size_is_refused() -> None:
    cache = {"kind": "cache", "dtype": "float16", "shape": (-1, 2, -1, 32)}
    sizes = {"smallest": (1, 2, 8, 32), "best": (1, 2, 8, 32), "largest": (4, 3, 8, 32)}
    part = plan().model_copy(update={"inputs": (PlanTensor(name="past_key_values.0.key", **cache, **sizes),)})
    with pytest.raises(InternalError, match="may have 2 to 3 at axis 1"):
        check_profile(part)


# --- what builders say


def test_first_cause_is_no_echo_of_the_missing_driver() -> None:
    where = "ModelImporter.cpp:140: While parsing node number 15"
    assert first_cause(Messages(errors=[ECHO, where, "the cause", ECHO, "a consequence"])) == "the cause"
    assert first_cause(Messages(errors=[ECHO, where]), ["what the parser lists"]) == "what the parser lists"
    assert first_cause(Messages(errors=[ECHO])) == ECHO
    assert first_cause(Messages()) == ""


@pytest.mark.parametrize(
    ("errors", "meaning"),
    [
        (["Assertion !formatTacticCombinations.empty() failed"], "no kernel for the types of its inputs"),
        (["x", "FP32 GEMM is not supported on SM75"], "compute capability 7.5 has no float32 products"),
        (["kMAX values are not self-consistent"], "sizes that the profile allows cannot occur together"),
        (["MyelinCheckException: graph_jit.cpp CHECK(status == CUDA_SUCCESS) failed"], "needs an NVIDIA GPU"),
        ([ECHO], "needs an NVIDIA GPU"),
        (["Requested amount of GPU memory: out of memory"], "memory ran out"),
        (["something new"], "something new"),
    ],
)
def test_known_errors_are_explained_with_the_next_command(errors: list[str], meaning: str) -> None:
    text, hint = explained(Messages(errors=errors), {"step": "build"}, Path("libshadowc_trt11.so"))
    assert meaning in text
    assert hint


def test_operator_that_is_not_registered_is_explained_with_what_is(tmp_path: Path) -> None:
    refused = {"step": "parse", "registered": ["shadowc::SparseFFN::1"], "reasons": []}
    errors = ["Plugin not found, are the plugin name, version, and namespace correct?"]
    text, _ = explained(Messages(errors=errors), refused, tmp_path / "libshadowc_trt11.so")
    assert text == "an operator of the graph is not in libshadowc_trt11.so, which registered shadowc::SparseFFN::1"


@pytest.mark.parametrize(
    ("name", "errors", "meaning"),
    [
        ("gone.so", [], "is missing"),
        ("libshadowc_trt11_auto.so", [], "registers itself"),
        ("a.so", ["SymbolAddress for getCreators could not be loaded"], "exports no getCreators"),
        ("a.so", ["shadowc: this plugin was built for TensorRT 10"], "cannot be loaded (shadowc: this plugin was"),
    ],
)
def test_plugin_that_does_not_load_is_explained(tmp_path: Path, name: str, errors: list[str], meaning: str) -> None:
    if name != "gone.so":
        (tmp_path / name).write_bytes(b"elf")
    text, _ = explained(Messages(errors=errors), {"step": "plugin"}, tmp_path / name)
    assert meaning in text


def test_libraries_that_a_package_lacks_are_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"holds no libtensorrt_rtx\.so"):
        private_links(dataclasses.replace(RTX, folder=tmp_path), tmp_path / "links")
    assert private_links(TRT10, tmp_path / "none") is None


# --- caches and estimates


def test_timing_cache_belongs_to_a_version_and_is_not_kept_for_rtx(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SHADOWC_CACHE", str(tmp_path))
    assert timing_cache(RTX) is None  # its builder measures nothing, and says so in a warning
    assert timing_cache(TRT10) == tmp_path / "tensorrt" / "trt10-10.14.1.timing"


def test_timing_cache_is_replaced_as_a_whole(tmp_path: Path) -> None:
    kept = tmp_path / "tensorrt" / "trt10.timing"
    for content in (b"first", b"second"):
        child._keep(kept, SimpleNamespace(serialize=lambda content=content: content))
        assert kept.read_bytes() == content
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_free_memory_counts_cached_files_that_would_make_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    4000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert memory.free_bytes() == 4000 * 1024
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    assert memory.free_bytes() > 0


def test_estimate_of_memory_grows_with_the_weights_but_not_the_builders_share() -> None:
    small = {"a": WeightRecipe("copy", ("a",), (1000, 1000), "float16")}
    assert host_bytes(small) == BUILDER_BYTES + 2 * 2_000_000
    assert "needs about 1.2 GB" in host_note(small)
