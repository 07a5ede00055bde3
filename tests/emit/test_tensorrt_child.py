# SPDX-License-Identifier: Apache-2.0
"""The builder's process with the API of enterprise TensorRT, which a machine without its GPU cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shadowc.emit.tensorrt import child
from shadowc.emit.tensorrt.messages import explained
from shadowc.runtime.tensorrt.bindings import Bindings, Messages
from tests.emit import enterprise
from tests.emit.enterprise import Enterprise, Flag

PAST = {"name": "past", "smallest": [1], "best": [1], "largest": [4]}
WEIGHT = {"name": "layers.0.ffn.w1", "smallest": None, "best": None, "largest": None}


@pytest.fixture
def request_(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "decode.onnx").write_bytes(b"graph")
    return {
        "family": "trt10",
        "plugin": str(tmp_path / "libshadowc_trt10.so"),
        "onnx": str(tmp_path / "decode.onnx"),
        "plan": str(tmp_path / "decode.plan"),
        "inputs": [PAST, WEIGHT],
        "capabilities": [],
        "timing_cache": str(tmp_path / "cache" / "trt10.timing"),
    }


def build(trt: Enterprise, request: dict[str, Any]) -> tuple[dict[str, object], list[tuple[str, dict[str, object]]]]:
    """The result, and what was sent."""
    sent: list[tuple[str, dict[str, object]]] = []
    bindings = Bindings(trt, "tensorrt", "trt10", "10.14.1", None)
    return child._build(bindings, request, lambda kind, **fields: sent.append((kind, fields))), sent


def test_enterprise_builds_are_strongly_typed_with_aliases_and_without_capabilities(request_: dict[str, Any]) -> None:
    trt = Enterprise()
    result, _ = build(trt, request_)
    assert trt.network is not None
    assert trt.config is not None
    assert trt.network.flags == 1 << Flag.STRONGLY_TYPED
    assert trt.config.features == {"aliases": True}
    assert trt.calls == ["builder", "plugin"]  # the other way round the plugin's errors go nowhere
    assert [profile.shapes for profile in trt.config.profiles] == [{"past": [(1,), (1,), (4,)]}]
    assert Path(request_["plan"]).read_bytes() == b"".join(enterprise.PLAN)
    assert (result["bytes"], result["version"]) == (len(b"".join(enterprise.PLAN)), "10.14.1")
    assert result["operators"] == {"layers.0.ffn": "SparseFFN block=16 layer=0 skip_zeros=1"}
    assert result["registered"] == ["shadowc::SparseFFN::1"]
    assert result["inputs"] == [{"name": "past", "dtype": "INT64", "shape": [-1]}]
    assert result["outputs"] == [{"name": "logits", "dtype": "FLOAT", "shape": [-1, -1, 96]}]


def test_enterprise_knows_no_capabilities(request_: dict[str, Any]) -> None:
    with pytest.raises(AttributeError):
        build(Enterprise(), {**request_, "capabilities": ["8.6"]})


def test_steps_are_sent_and_chatter_is_not(request_: dict[str, Any]) -> None:
    _, sent = build(Enterprise(), request_)
    assert {kind for kind, _ in sent} == {"advance"}
    assert [fields["done"] for _, fields in sent] == [0, 1, 2, 3, 3]


def test_timing_cache_is_read_and_written(request_: dict[str, Any]) -> None:
    kept = Path(request_["timing_cache"])
    trt = Enterprise()
    build(trt, request_)
    assert trt.config is not None
    assert trt.config.read == b""
    assert kept.read_bytes() == enterprise.NEW_TIMES
    kept.write_bytes(enterprise.OLD_TIMES)
    build(trt, request_)
    assert trt.config.read == enterprise.OLD_TIMES
    assert kept.read_bytes() == enterprise.NEW_TIMES


@pytest.mark.parametrize(
    ("found", "refuses"),
    [(enterprise.DAMAGED_TIMES, False), (enterprise.OLD_TIMES, True)],
    ids=["damaged", "other card"],
)
def test_times_that_cannot_be_used_are_measured_again(request_: dict[str, Any], found: bytes, refuses: bool) -> None:
    kept = Path(request_["timing_cache"])
    kept.parent.mkdir()
    kept.write_bytes(found)
    trt = Enterprise(refuse_times=refuses)
    build(trt, request_)
    assert trt.config is not None
    assert trt.config.read == found
    assert kept.read_bytes() == enterprise.NEW_TIMES


def test_plan_is_built_when_its_times_cannot_be_kept(request_: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    trt = Enterprise()
    built, _ = build(trt, {**request_, "timing_cache": str(tmp_path / "file" / "trt10.timing")})
    assert built["bytes"] == sum(map(len, enterprise.PLAN))


def test_float32_products_keep_all_their_bits(request_: dict[str, Any]) -> None:
    trt = Enterprise()
    build(trt, request_)
    assert trt.config is not None
    assert not trt.config.flags


def test_without_a_timing_cache_none_is_made(request_: dict[str, Any]) -> None:
    trt = Enterprise()
    build(trt, {**request_, "timing_cache": ""})
    assert trt.config is not None
    assert trt.config.read is None
    assert trt.config.cache is None


def test_profile_that_the_builder_refuses_ends_the_build(request_: dict[str, Any]) -> None:
    sent: list[tuple[str, dict[str, Any]]] = []
    bindings = Bindings(Enterprise(refuse_profiles=True), "tensorrt", "trt10", "10.14.1", None)
    with pytest.raises(child.RefusedError, match="profile") as caught:
        child._build(bindings, request_, lambda kind, **fields: sent.append((kind, fields)))
    assert not Path(request_["plan"]).exists()
    errors = [fields["text"] for kind, fields in sent if kind == "error"]
    refused = {"step": caught.value.step, **caught.value.facts}
    text, _ = explained(Messages(errors=errors), refused, Path("p.so"))
    assert text.startswith("the profile is upside down or incomplete (IOptimizationProfile::isValid")


def test_profile_that_the_builder_changes_ends_the_build(request_: dict[str, Any]) -> None:
    with pytest.raises(child.RefusedError, match="profile") as caught:
        build(Enterprise(clip_profiles=True), request_)
    assert not Path(request_["plan"]).exists()
    refused = {"step": caught.value.step, **caught.value.facts}
    text, _ = explained(Messages(), refused, Path("p.so"))
    assert text == (
        "the builder keeps another profile than it was given "
        "(the profile of past is [(1,), (1,), (1,)], asked for [(1,), (1,), (4,)])"
    )
