# SPDX-License-Identifier: Apache-2.0
"""The plugin inside TensorRT-RTX, which builds plans without a GPU: registration, typing, shapes, fields, refusals.

The builder never runs a kernel, so nothing here says anything about their results.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.tensorrt_plugin import toolchain
from tests.tensorrt_plugin.nodes import Shapes, select_threshold, sparse_attention, sparse_ffn

TYPES = (("f32", None), ("f16", None), ("bf16", None), ("f32", "i8"), ("f16", "i8"), ("bf16", "i8"))
RTX_TYPES = {"f32": "FLOAT", "f16": "HALF", "bf16": "BF16", "i32": "INT32", "i64": "INT64"}
HEAD_SIZES = (32, 64, 80, 96, 128)


def test_plugin_registers_exactly_its_three_creators(rtx, rtx_plugin):
    answer = rtx(load=rtx_plugin)
    assert answer["loaded"]
    triples = sorted(map(tuple, answer["creators"]))
    assert triples == [(name, "1", "shadowc") for name in ("SelectThreshold", "SparseAttention", "SparseFFN")]


def test_creators_take_the_attributes_of_the_operators_and_no_others(rtx, rtx_plugin):
    from shadowc.spec.ops import OPS

    assert rtx(load=rtx_plugin)["fields"] == {op.name: [a.name for a in op.attributes] for op in OPS}


def test_every_type_and_head_size_builds_into_a_plan_that_names_the_operator(rtx, rtx_plugin):
    nodes = [select_threshold(), *(sparse_ffn(*types) for types in TYPES), *(sparse_attention(*t) for t in TYPES)]
    nodes += [sparse_attention(sizes=Shapes(head_size=d, hidden=2 * d)) for d in HEAD_SIZES]
    nodes += [sparse_ffn(sizes=Shapes(neurons=100))]  # a short last block
    answer = rtx(load=rtx_plugin, builds=nodes)
    assert answer["sentences"] == []
    for node, built in zip(nodes, answer["builds"], strict=True):
        assert built["plan"] is not None, (node, built["errors"], built["log"])
        assert built["plan"]["words"] == [node.op, "shadowc"]
        assert built["outputs"] == [
            [name, RTX_TYPES[kind], [axis if isinstance(axis, int) else -1 for axis in shape]]
            for name, kind, shape in node.outputs
        ]
        assert not [line for line in built["log"] if line[0] == "ERROR"]


def test_int8_weights_make_the_plan_smaller(rtx, rtx_plugin):
    big = Shapes(hidden=512, heads=8, neurons=2048)
    built = rtx(load=rtx_plugin, builds=[sparse_ffn("f16", None, big), sparse_ffn("f16", "i8", big)])["builds"]
    assert built[0]["plan"]["bytes"] - built[1]["plan"]["bytes"] == pytest.approx(2 * 2048 * 512, rel=0.05)


def test_cache_is_updated_in_place_only_with_the_preview_feature(rtx, rtx_plugin):
    built = rtx(load=rtx_plugin, builds=[sparse_attention()], aliasing=False)["builds"][0]
    assert built["plan"] is None
    assert any("Aliased I/O used by plugin" in message for _, message in built["log"])


ffn, attention = sparse_ffn(), sparse_attention()
REFUSED = {
    "float field": (
        ffn.with_attributes(layer=1.5),
        "attribute layer: expected one int of at least 0, found float32 with 1 value",
    ),
    "string field": (
        ffn.with_attributes(block="16"),
        "attribute block: expected one int of at least 1, found string with",
    ),
    "list field": (
        ffn.with_attributes(layer=[1, 2]),
        "attribute layer: expected one int of at least 0, found int32 with 2 values",
    ),
    "range": (ffn.with_attributes(skip_zeros=2), "attribute skip_zeros: expected one int from 0 to 1, found 2"),
    "block 0": (ffn.with_attributes(block=0), "attribute block: expected one int of at least 1, found 0"),
    "misspelled": (
        ffn.with_attributes(block=None, blck=16),
        "attribute block: expected one int of at least 1, found none",
    ),
    "choice": (
        attention.with_attributes(kv="some"),
        "attribute kv: expected one of the strings all, active, found 'some'",
    ),
    "int for choice": (
        attention.with_attributes(kv=1),
        "attribute kv: expected one of the strings all, active, found int32 with 1 value",
    ),
    "scope": (
        select_threshold().with_attributes(scope="layer"),
        "attribute scope: expected one of the strings local, global, found 'layer'",
    ),
    "exempt too long": (
        select_threshold().with_attributes(exempt=[0] * 65),
        "attribute exempt: expected 1 to 64 ints of at least -1, found int32 with 65 values",
    ),
    "activation type": (ffn.with_input("x", type="i32"), "input x: expected float32, float16 or bfloat16, found int32"),
    "score type": (ffn.with_input("scores", type="f16"), "input scores: expected float32, found float16"),
    "weight type": (ffn.with_input("w1", type="f32"), "input w1: expected the type of x, or int8, found float32"),
    "second weight type": (ffn.with_input("w2t", type="i8"), "input w2t: expected the type of w1, found int8"),
    "cache type": (
        attention.with_input("past_key", type="f32"),
        "input past_key: expected the type of x, found float32",
    ),
    "position type": (attention.with_input("past", type="i32"), "input past: expected int64, found int32"),
    "rank": (ffn.with_input("scales", shape=(96,)), "input scales [F, 2]: expected 2 axes, found [96]"),
    "weight shape": (
        ffn.with_input("w2t", shape=(96, 64)),
        "input w2t [F, E]: expected E = 128 as in x, found [96, 64]",
    ),
    "fixed axis": (
        attention.with_input("scales", shape=(2, 3, 64)),
        "input scales [H, 4, D]: expected 4 = 4, found [2, 3, 64]",
    ),
    "units": (ffn.with_attributes(block=32), "units of scores (N): expected ceil(F / block) = 3, found 6"),
    "layer": (ffn.with_attributes(layer=3), "attribute layer: expected less than L = 3, found 3"),
    "head size": (
        sparse_attention(sizes=Shapes(head_size=48, hidden=96)),
        "head size (D): expected 32, 64, 80, 96 or 128, found 48",
    ),
    "hidden size": (sparse_attention(sizes=Shapes(hidden=192)), "hidden size (E): expected H * D = 2 * 64, found 192"),
    "heads of the mask": (
        attention.with_input("scores", shape=("B", "S", 3, 4)),
        "units of scores (N): expected heads (H) = 2, found 4",
    ),
    "profile too large": (
        replace(attention, ranges={"B": (1, 1, 40000), "S": (1, 1, 1), "T": (128, 128, 128)}),
        "at the largest shapes of the profile (B = 40000, D = 64, E = 128, H = 2,",
    ),
    "too many layers": (select_threshold(Shapes(layers=65)), "layers of scores (L): expected 1 to 64, found 65"),
}


@pytest.fixture(scope="module")
def refused(rtx, rtx_plugin):
    """One child for all refused nodes: name -> (the node's answer, sentences of the plugin)."""
    answer = rtx(load=rtx_plugin, builds=[node for node, _ in REFUSED.values()])
    return answer, dict(zip(REFUSED, answer["builds"], strict=True))


@pytest.mark.parametrize("what", REFUSED)
def test_a_node_that_does_not_fit_is_refused_with_name_expected_and_found(refused, what):
    answer, builds = refused
    node, sentence = REFUSED[what]
    assert builds[what]["plan"] is None
    assert any(line.startswith(f"{node.op} 'the_node': ") and sentence in line for line in answer["sentences"]), (
        sentence,
        answer["sentences"],
    )


def test_each_refusal_is_said_for_one_node_only(refused):
    answer, _ = refused
    assert len(answer["sentences"]) >= len(REFUSED)
    assert all("the_node" in line for line in answer["sentences"])


def test_a_creator_refuses_a_field_that_it_does_not_know(rtx, rtx_plugin):
    good = [["layer", "INT32", [0]], ["block", "INT32", [16]], ["skip_zeros", "INT32", [0]]]
    answer = rtx(
        load=rtx_plugin,
        creates=[
            {"op": "SparseFFN", "fields": good},
            {"op": "SparseFFN", "fields": [*good, ["colour", "INT32", [1]]]},
            {"op": "SparseAttention", "fields": [["layer", "INT32", [0]], ["kv", "CHAR", "all"]]},
        ],
    )
    assert [created["made"] for created in answer["creates"]] == [True, False, True]
    assert answer["sentences"] == ["SparseFFN 'direct': attribute colour is unknown: expected layer, block, skip_zeros"]


def test_the_twin_registers_itself_when_rtx_is_loaded_before(rtx, rtx_plugin):
    answer = rtx(dlopen=toolchain.twin(rtx_plugin))
    if "trt10" in rtx_plugin.name:  # its registry has another table; the twin says so instead of calling into it
        assert answer["creators"] == []
        assert "cannot use the registry of libtensorrt_rtx.so.1" in answer["sentences"][0]
    else:
        assert len(answer["creators"]) == 3
        assert answer["sentences"] == []


def test_the_twin_given_to_load_library_by_mistake_is_an_error_and_no_crash(rtx, rtx_plugin):
    answer = rtx(load=toolchain.twin(rtx_plugin), builds=[select_threshold()])
    assert answer["loaded"] is False
    assert any("getCreators" in message for _, message in answer["log"])


def test_without_the_plugin_a_node_is_not_found(rtx):
    built = rtx(builds=[select_threshold()])["builds"][0]
    assert built["plan"] is None
    assert any("Plugin not found" in error for error in built["errors"])


IN_PROCESS = """
import ctypes, sys
for path in sys.argv[1:]:
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
import tensorrt_rtx_bindings as trt
from tests.tensorrt_plugin.nodes import select_threshold
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
assert trt.get_plugin_registry().load_library(PLUGIN) is not None
node = select_threshold()
assert trt.OnnxParser(network, logger).parse(node.model())
profile = builder.create_optimization_profile()
for name, shapes in node.profile().items():
    profile.set_shape(name, *shapes)
config = builder.create_builder_config()
config.add_optimization_profile(profile)
print(builder.build_serialized_network(network, config).nbytes > 0)
"""


@pytest.mark.parametrize("named", [True, False], ids=["with", "without"])
def test_rtx_finds_its_own_name_with_the_name_library_and_ends_the_process_without(rtx, rtx_plugin, named):
    del rtx  # for its skip: RTX is not installed
    name = rtx_plugin.with_name("libshadowc_rtx_name.so")
    folder = toolchain.rtx_folder()
    names = ("libcudart", "libtensorrt_rtx", "libtensorrt_onnxparser_rtx")
    opened = [next(folder.glob(f"{library}.so.*")) for library in names] + ([name] if named else [])
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESS.replace("PLUGIN", repr(str(rtx_plugin))), *map(str, opened)],
        cwd=toolchain.TOP, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == ("True\n" if named else "")
    assert (done.returncode == 0) is named
