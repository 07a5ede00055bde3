# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to an engine folder for TensorRT: files, manifest, and the gate with planted defects.

Where the builder or the plugin is missing, a stand-in writes the plans; everything else is real, the gate included.
The tests at the end build for real and are skipped with a reason otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shadowc.compiler import compile_engine
from shadowc.emit import rows
from shadowc.emit.tensorrt import checks, emit
from shadowc.emit.tensorrt.builder import BuildRequest, BuildResult
from shadowc.passes import dense_prefill
from shadowc.runtime.tensorrt.bindings import Bindings
from shadowc.runtime.verification import file_problems, read_manifest
from shadowc.spec.errors import InputError, UnsupportedError, VerificationError
from shadowc.spec.options import CompileOptions
from shadowc.spec.progress import Event, EventProgress
from tests.conftest import TINY
from tests.e2e import compiled, watched
from tests.emit import rtx

FAKE = Bindings(SimpleNamespace(), "tensorrt_rtx", "rtx1", "1.7.1.116", None)
PLUGIN = "libshadowc_trt11.so"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads of 32: the narrowest that the kernels handle. Read only."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(11)
        config = OPTConfig(**{**TINY, "num_attention_heads": 2}, attn_implementation="eager")
        model = OPTForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    folder = tmp_path_factory.mktemp("wide") / "opt-wide"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[BuildRequest]]:
    """Replaces builder and plugin; gives the requests for plans."""
    plugin = tmp_path / "installed" / PLUGIN
    plugin.parent.mkdir()
    plugin.write_bytes(b"plugin")
    asked: list[BuildRequest] = []

    def build(request: BuildRequest, progress: object) -> BuildResult:
        asked.append(request)
        (request.folder / request.plan.file).write_bytes(b"plan")
        return BuildResult(4, 0.1, 1 << 20, "1.7.1.116", ("shadowc::SparseFFN::1",))

    monkeypatch.setattr(checks, "builder_of", lambda target: FAKE)
    monkeypatch.setattr(checks, "plugin_of", lambda bindings: plugin)
    monkeypatch.setattr(emit, "build_plan", build)
    return asked


def options(checkpoint: Path | str, out: Path, **changes: object) -> CompileOptions:
    return compiled.options(checkpoint, out, **{"target": "tensorrt-rtx", "max_batch": 2, **changes})


def test_folder_holds_what_the_contract_lists(checkpoint: Path, tmp_path: Path, stand_in: list[BuildRequest]) -> None:
    summary = compile_engine(options(checkpoint, tmp_path / "wide.engine"))
    names = {path.name for path in summary.folder.iterdir()}
    assert names == {
        "engine.json", "weights.bin", "decode.onnx", "prefill.onnx", "decode.plan", "prefill.plan", PLUGIN,
        "controls.safetensors", "means.safetensors", "orders.safetensors",
    }  # fmt: skip
    manifest = read_manifest(summary.folder)
    assert file_problems(summary.folder, manifest) == []
    part = manifest.tensorrt
    assert part is not None
    assert (manifest.target, manifest.weights, part.activations) == ("tensorrt-rtx", "fp16", "float16")
    assert (part.family, part.library_version) == ("rtx1", "1.7.1.116")
    assert (part.max_batch, part.max_context, part.chunk) == (2, 64, 64)
    assert part.compute_capabilities == ("8.0", "8.6", "8.9", "12.0")
    assert part.portable_above == "12.0"
    assert [plugin.file for plugin in part.plugins] == [PLUGIN]
    table = {weight.name: weight for weight in part.weights}
    for plan in part.plans.values():
        for tensor in plan.inputs:
            if tensor.kind == "weight":
                assert (table[tensor.name].dtype, table[tensor.name].shape) == (tensor.dtype, tensor.shape)
    assert sorted(request.plan.file for request in stand_in) == ["decode.plan", "prefill.plan"]
    assert summary.build.keys() == {"decode", "prefill"}


def test_manifest_says_that_nothing_ran_on_a_device_and_what_was_checked_instead(
    checkpoint: Path, tmp_path: Path, stand_in: list[BuildRequest]
) -> None:
    parity = compile_engine(options(checkpoint, tmp_path / "wide.engine")).manifest.parity
    assert parity["on_device"] is False
    assert "operators as ONNX functions" in str(parity["checked"])
    assert parity["selection"] == 0
    for part, tolerance in (("logits", "logits_tolerance"), ("scores", "scores_tolerance"), ("prefill",) * 2):
        limit = parity["prefill_tolerance"] if part == "prefill" else parity[tolerance]
        assert 0 <= parity[part] <= limit <= 1e-4  # type: ignore[operator]


@pytest.mark.parametrize("changes", [{"weights": "int8"}, {"predictor": "none", "weights": "bf16"}])
def test_other_engines_pass_the_gate_too(
    checkpoint: Path, tmp_path: Path, stand_in: list[BuildRequest], changes: dict[str, object]
) -> None:
    manifest = compile_engine(options(checkpoint, tmp_path / "wide.engine", **changes)).manifest
    assert manifest.weights == changes["weights"]
    assert manifest.parity["on_device"] is False


def test_compile_is_up_to_date_when_repeated_and_not_when_the_plugin_has_changed(
    checkpoint: Path, tmp_path: Path, stand_in: list[BuildRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shadowc.runtime import load

    monkeypatch.setattr(load, "verify", lambda folder: SimpleNamespace(problems=()))
    chosen = options(checkpoint, tmp_path / "wide.engine")
    assert not compile_engine(chosen).up_to_date
    assert compile_engine(chosen).up_to_date
    (tmp_path / "installed" / PLUGIN).write_bytes(b"another plugin")
    assert not compile_engine(chosen).up_to_date


@pytest.mark.parametrize(
    ("free", "told"),
    [
        (10_000_000, "memory may run out: a compile of this model needs about 1.2"),
        (64 << 30, "a compile of this model"),
    ],
)
def test_memory_that_a_compile_takes_is_told_before_it_is_used(
    checkpoint: Path,
    tmp_path: Path,
    stand_in: list[BuildRequest],
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    told: str,
) -> None:
    monkeypatch.setattr(emit, "free_bytes", lambda: free)
    events: list[Event] = []
    compile_engine(options(checkpoint, tmp_path / "wide.engine", predictor="none"), EventProgress(events.append))
    texts = [event.text for event in events]
    (note,) = [event for event in events if "a compile of this model needs" in event.text]
    assert note.text.startswith(told)
    assert note.fields["needed"] > 1.2e9
    assert note.fields["free"] == free
    assert texts.index(note.text) < texts.index("decode.plan")


def _swapped_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """w1 holds fc2, w2t holds fc1."""
    real = rows._rows

    def swapped(recipe, source):
        return real(dataclasses.replace(recipe, part=1 - recipe.part) if recipe.kind == "ffn_rows" else recipe, source)

    monkeypatch.setattr(rows, "_rows", swapped)


def _swapped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads of q change places in one layer."""
    real = rows._rows

    def swapped(recipe, source):
        made = real(recipe, source)
        hit = recipe.kind == "attention_rows" and recipe.part == 0 and "layers.2." in recipe.sources[0]
        return np.ascontiguousarray(np.roll(made, 32, axis=0)) if hit else made

    monkeypatch.setattr(rows, "_rows", swapped)


def _prefill_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the prefill mistakes keys for queries."""
    monkeypatch.setattr(dense_prefill, "ATTENTION_ROWS", ("wk", "wq", "wv", "wot"))


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        (_swapped_halves, "does not compute what torch computes"),
        (_swapped_heads, "does not compute what torch computes"),
        (_prefill_of_its_own, "the prefill graph does not compute what the decode graph computes"),
    ],
    ids=["halves", "heads", "prefill"],
)
def test_planted_defect_leaves_no_engine(
    checkpoint: Path, tmp_path: Path, stand_in: list[BuildRequest], monkeypatch: pytest.MonkeyPatch, defect, words: str
) -> None:
    defect(monkeypatch)
    with pytest.raises(VerificationError, match=words) as caught:
        compile_engine(options(checkpoint, tmp_path / "wide.engine"))
    if defect is _swapped_heads:
        assert [problem.split(":")[0] for problem in caught.value.problems] == ["layer 2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["installed"]


def test_heads_that_no_kernel_handles_are_refused_before_any_stage(
    tiny_checkpoint: Path, tmp_path: Path, stand_in: list[BuildRequest]
) -> None:
    with pytest.raises(UnsupportedError, match="its heads are 16 wide"):
        compile_engine(options(tiny_checkpoint, tmp_path / "tiny.engine"))
    assert not stand_in


def test_all_problems_are_told_at_once(checkpoint: Path, tmp_path: Path, stand_in: list[BuildRequest]) -> None:
    with pytest.raises(InputError) as caught:
        compile_engine(options(checkpoint, tmp_path / "x.engine", max_batch=99, compute_capability=("9.0",)))
    assert len(caught.value.problems) == 2


def _assert_complete(folder: Path, plans: dict[str, dict[str, float]], layers: int) -> None:
    """Every operator of every layer is a plugin of the decode plan; no weights went through the builder."""
    content = (folder / "decode.plan").read_bytes()
    for layer in range(layers):
        for part in ("attention", "ffn"):
            assert f"layers.{layer}.{part}".encode() in content
    for name in ("select.heads", "select.neurons", "SelectThreshold", "SparseAttention", "SparseFFN"):
        assert name.encode() in content
    assert plans.keys() == {"decode", "prefill"}
    for plan in plans.values():
        assert plan["bytes"] < 64e6
        assert plan["peak_bytes"] < 800e6


def _real(model: str, out: Path) -> tuple[dict[str, dict[str, float]], int]:
    """Compile in a process of its own: its plans, and the most memory that it held, its builder included, in bytes."""
    rtx.required()
    compiling = ["-c", "from shadowc.cli.app import main; main()", "compile", "--model", model, "--json"]
    asked = ["--load-format", "dummy", "--target", "tensorrt-rtx", "--out", str(out)]
    said, peak = watched.run([sys.executable, *compiling, *asked])
    told = json.loads(said)
    return told["plans"], max(peak, *(stage["peak_bytes"] for stage in told["stages"]))


def test_opt_mini_builds_for_real(tmp_path: Path) -> None:
    plans, peak = _real("opt-mini", tmp_path / "mini.engine")
    _assert_complete(tmp_path / "mini.engine", plans, layers=8)
    assert 0.5e9 < peak < 1.6e9  # torch and the builder, whatever the model


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_opt_1_3b_builds_for_real(tmp_path: Path) -> None:
    plans, peak = _real("opt-1.3b", tmp_path / "large.engine")
    _assert_complete(tmp_path / "large.engine", plans, layers=24)
    weights = (tmp_path / "large.engine" / "weights.bin").stat().st_size
    assert 2.6e9 < weights < peak <= 2.5 * weights


HOLDER = """
import subprocess, sys, time
held = bytearray(b"x") * 100_000_000
if len(sys.argv) > 1:
    subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
else:
    time.sleep(1)
print(len(held))
"""


def test_watching_counts_the_memory_of_children_too() -> None:
    said, alone = watched.run([sys.executable, "-c", HOLDER])
    assert said == "100000000\n"
    _, both = watched.run([sys.executable, "-c", HOLDER, HOLDER])
    assert 100e6 < alone < 180e6
    assert both > alone + 90e6


def test_watching_tells_why_a_command_failed() -> None:
    with pytest.raises(AssertionError, match="the reason"):
        watched.run([sys.executable, "-c", "import sys; sys.exit('the reason')"])
