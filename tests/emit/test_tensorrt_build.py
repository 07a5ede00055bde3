# SPDX-License-Identifier: Apache-2.0
"""Real plans by TensorRT for RTX, built here without a GPU; skipped with a reason where builder or plugin is missing.

Nothing here runs a kernel: a build checks names, types, shapes, profiles and the plugin's fields.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shadowc.emit.tensorrt import builder
from shadowc.emit.tensorrt.builder import build_plan, private_links
from shadowc.emit.tensorrt.interface import describe
from shadowc.spec.errors import InternalError, SetupError
from shadowc.spec.progress import Event, EventProgress, NullProgress
from tests.emit import rtx
from tests.trace import deep


@pytest.fixture(autouse=True, scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory):
    rtx.required()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHADOWC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


FEW = ["fp16", "int8", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bf16", "fp32"))]


@pytest.mark.parametrize("weights", FEW)
def test_decode_builds_with_a_plugin_for_every_operator(weights: str, tmp_path: Path) -> None:
    request = rtx.request(tmp_path, "decode", rtx.program("decode", weights=weights))
    result = build_plan(request, NullProgress())
    content = (tmp_path / "decode.plan").read_bytes()
    assert len(content) == result.bytes > 100_000
    assert sorted(request.operators) == [
        "layers.0.attention", "layers.0.ffn", "layers.1.attention", "layers.1.ffn", "select.heads", "select.neurons",
    ]  # fmt: skip
    for name in (*request.operators, "SparseAttention", "SparseFFN", "SelectThreshold", "skip_zeros"):
        assert name.encode() in content, name
    assert result.registered == ("shadowc::SelectThreshold::1", "shadowc::SparseAttention::1", "shadowc::SparseFFN::1")


@pytest.mark.parametrize("weights", FEW)
def test_prefill_builds_without_a_plugin(weights: str, tmp_path: Path) -> None:
    made = rtx.program("prefill", weights=weights)
    build_plan(rtx.request(tmp_path, "prefill", made), NullProgress())
    content = (tmp_path / "prefill.plan").read_bytes()
    assert b"SparseFFN" not in content


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 80, 96, 128])
def test_fused_attention_exists_for_every_head_size_of_published_models(head_size: int, tmp_path: Path) -> None:
    """fp16 prefill has no other way: TensorRT refuses an Attention that no fused kernel covers."""
    facts = dataclasses.replace(rtx.SMALL, hidden=2 * head_size, head_size=head_size)
    made = rtx.program("prefill", facts=facts, sparsity=None)
    assert build_plan(rtx.request(tmp_path, "prefill", made), NullProgress()).bytes > 100_000


def test_weights_never_reach_the_builder(tmp_path: Path) -> None:
    made = rtx.program()
    assert build_plan(rtx.request(tmp_path, "decode", made), NullProgress()).peak_bytes < 600e6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decode.onnx", "decode.plan"]


def test_steps_of_the_builder_are_reported(tmp_path: Path) -> None:
    events: list[Event] = []
    build_plan(rtx.request(tmp_path), EventProgress(events.append))
    steps = [event for event in events if event.kind == "advance"]
    assert steps
    assert steps[-1].done == steps[-1].total > 0


@pytest.mark.slow
@pytest.mark.parametrize("capabilities", [(), ("8.0", "8.6", "8.9", "12.0"), ("12.1",)])
def test_plans_are_built_for_the_cards_asked_for(capabilities: tuple[str, ...], tmp_path: Path) -> None:
    assert build_plan(rtx.request(tmp_path, capabilities=capabilities), NullProgress()).bytes


# --- what goes wrong comes out as one sentence


def test_builder_that_ends_itself_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = rtx.request(tmp_path)
    monkeypatch.setattr(builder, "_CHILD", "tests.emit.aborting_child")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    ending = r"its process ended itself \(SIGABRT\) after 'the first error'"
    with pytest.raises(SetupError, match=rf"could not build decode\.plan: {ending}"):
        build_plan(request, NullProgress())


def test_builder_that_was_killed_tells_the_estimate_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = rtx.request(tmp_path, memory_note="a compile of this model needs about 9.9 GB, 1.0 GB are free")
    monkeypatch.setattr(builder, "_CHILD", "tests.emit.killed_child")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with pytest.raises(SetupError, match=r"killed, as the system does when memory runs out: .* needs about 9\.9 GB"):
        build_plan(request, NullProgress())


def test_missing_plugin_is_named(tmp_path: Path) -> None:
    request = rtx.request(tmp_path, plugin=tmp_path / "libshadowc_gone.so")
    with pytest.raises(SetupError, match=r"the plugin .*libshadowc_gone\.so is missing"):
        build_plan(request, NullProgress())


def test_library_that_is_no_plugin_is_named(tmp_path: Path) -> None:
    import ctypes.util

    from shadowc.runtime.library import library_path

    assert ctypes.util.find_library("c")
    stranger = tmp_path / "libstranger.so"
    shutil.copyfile(library_path(), stranger)
    with pytest.raises(SetupError, match=r"libstranger\.so (is no plugin library|cannot be loaded)"):
        build_plan(rtx.request(tmp_path, plugin=stranger), NullProgress())


def test_operator_that_no_plugin_provides_is_told_with_what_is_registered(tmp_path: Path) -> None:
    made = rtx.program()
    node = next(node for node in made.graph.nodes if node.name == "layers.1.ffn")
    node.op = "SparseGated"
    with pytest.raises(SetupError, match=r"an operator of the graph is not in libshadowc_.*shadowc::SparseFFN::1"):
        build_plan(rtx.request(tmp_path, "decode", made), NullProgress())


def test_attribute_that_is_missing_is_told_with_the_plugins_own_reason(tmp_path: Path) -> None:
    made = rtx.program()
    del next(node for node in made.graph.nodes if node.name == "layers.1.ffn").attrs["block"]
    with pytest.raises(SetupError, match="block"):
        build_plan(rtx.request(tmp_path, "decode", made), NullProgress())


def test_type_that_the_plugin_refuses_is_told(tmp_path: Path) -> None:
    made = rtx.program()
    scales = next(value for value in made.graph.inputs if value.name == "layers.1.ffn.scales")
    scales.dtype = np.dtype(np.float16)
    with pytest.raises(SetupError, match=r"could not build decode\.plan: .*scales"):
        build_plan(rtx.request(tmp_path, "decode", made), NullProgress())


def test_float32_for_turing_is_told(tmp_path: Path) -> None:
    made = rtx.program("prefill", weights="fp32")
    request = rtx.request(tmp_path, "prefill", made, capabilities=("7.5",))
    with pytest.raises(SetupError, match=r"compute capability 7\.5 has no float32 products"):
        build_plan(request, NullProgress())


def test_profile_that_is_upside_down_is_told(tmp_path: Path) -> None:
    request = rtx.request(tmp_path)
    turned = tuple(
        tensor.model_copy(update={"smallest": tensor.largest, "largest": tensor.smallest})
        if tensor.name == "past"
        else tensor
        for tensor in request.plan.inputs
    )
    wrong = dataclasses.replace(request, plan=request.plan.model_copy(update={"inputs": turned}))
    with pytest.raises(SetupError, match=r"could not build decode\.plan: the profile is upside down .*tensors past"):
        build_plan(wrong, NullProgress())


def test_missing_graph_is_told(tmp_path: Path) -> None:
    request = rtx.request(tmp_path)
    (tmp_path / "decode.onnx").unlink()
    with pytest.raises(SetupError, match=r"could not build decode\.plan"):
        build_plan(request, NullProgress())


def test_network_other_than_the_described_one_is_refused(tmp_path: Path) -> None:
    request = rtx.request(tmp_path)
    outputs = tuple(
        tensor.model_copy(update={"dtype": "float16"}) if tensor.name == "logits" else tensor
        for tensor in request.plan.outputs
    )
    wrong = request.plan.model_copy(update={"outputs": outputs})
    with pytest.raises(InternalError, match=r"output logits is \('float32'.* the table says \('float16'"):
        build_plan(dataclasses.replace(request, plan=wrong), NullProgress())
    more = {**request.operators, "layers.9.ffn": "SparseFFN"}
    with pytest.raises(InternalError, match=r"layers\.9\.ffn is 'no operator' in the plan, 'SparseFFN' in the graph"):
        build_plan(dataclasses.replace(request, operators=more), NullProgress())


def test_links_name_what_the_library_opens(tmp_path: Path) -> None:
    links = private_links(rtx.request(tmp_path).bindings, tmp_path / "links")
    if links is None:
        pytest.skip("this package carries its libraries under their own names")
    assert Counter(path.name.split(".so")[0] for path in links.iterdir()) == {
        "libtensorrt_rtx": 2, "libtensorrt_onnxparser_rtx": 2,
    }  # fmt: skip
    assert all(path.resolve().is_file() for path in links.iterdir())


def test_description_has_the_interface_of_the_plan() -> None:
    part = describe(rtx.program(), "decode", rtx.SIZES)
    past = next(tensor for tensor in part.inputs if tensor.name == "past_key_values.1.key")
    assert (past.shape, past.smallest, past.best, past.largest) == (
        (-1, 2, -1, 32), (1, 2, 48, 32), (1, 2, 48, 32), (4, 2, 48, 32),
    )  # fmt: skip
    aliases = {tensor.name: tensor.alias_of for tensor in part.outputs if tensor.alias_of}
    assert aliases == {
        f"present.{layer}.{kind}": f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")
    }
    assert deep.BLOCK == 16
